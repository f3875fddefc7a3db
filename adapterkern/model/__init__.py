"""A LLaMA with adapters.

adapter.py, config.py    ``Adapter``, ``AdapterConfig``: they only need torch, the rest needs the ``train`` extra
llama.py                 ``LlamaAdapter``, whose base classes are in the next three
pretrained.py            what transformers expects of a model
prefix.py                the layers below the first adapter, run separately
saving.py                its adapters, saved and loaded
decoder.py               adapters in a decoder's layers; parts of a decoder
prompt.py                gated prompts inside attention
linears.py               bias and scale of the linear layers; inside.py: what counts of these
mixing.py                different adapters within one batch
backbone.py              load a backbone; quantized.py, attention.py: what it may be asked for
memory.py                what a training step takes of a memory, without a model
liger.py                 Liger's kernels in the backbone
low_rank.py              initial values from given matrices
files/                   the saved adapter, its card, AdapterHub's and PEFT's formats
"""
