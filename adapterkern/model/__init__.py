"""A LLaMA with adapters.

adapter.py, config.py    ``Adapter``, ``AdapterConfig``: they only need torch, the rest needs the ``train`` extra
llama.py                 ``LlamaAdapter``, whose base classes are in the next five
pretrained.py            what transformers expects of a model
running.py               which adapters run, and in which thread; running_site.py: at one layer
next_norm.py             ``fuse_norm``: the RMSNorm that reads an adapter's output, made with it
prefix.py                the layers below the first adapter, run separately
saving.py                its adapters, saved and loaded
decoder.py               adapters in a decoder's layers; parts of a decoder
sites.py                 where attention ends in a layer's forward, and which norm reads what
asking.py, logits.py     how a backbone behaves, found by running it: its layers, its logits
stack.py                 several adapters one after the other
mixing.py, deferred.py   different adapters within one batch, chosen before the forward or in it
prompt.py                gated prompts inside attention
linears.py               bias and scale of the linear layers; inside.py: what counts of these
extra.py, copies.py      ``modules_to_save``: copies of the backbone's modules, trained with an adapter
images.py                ``text_only`` in models that also read images
reference.py             a second model over the same parameters, for preference learning
backbone.py              load a backbone; quantized.py, attention.py, fast_dtype.py: what it may be asked for
digest.py                which backbone an adapter was trained on
memory.py                what a training step takes of a memory, without a model; scale.py, speed.py: of many GPUs
liger.py                 Liger's kernels in the backbone
low_rank.py              initial values from given matrices
files/                   the saved adapter, its card, AdapterHub's and PEFT's formats
"""
