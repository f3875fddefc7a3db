"""A LLaMA with adapters.

adapter.py               ``Adapter`` and ``AdapterConfig``; they need torch alone, everything else the ``train`` extra
llama.py                 ``LlamaAdapter``, on pretrained.py (what transformers expects of a model) and saving.py
decoder.py, mixing.py    the decoder's layers, and adapters mixed within a batch
backbone.py, liger.py    backbones by name, and with Liger's kernels
low_rank.py              initial values from a backbone's weights
files/                   the saved adapter, its card, AdapterHub's format
"""
