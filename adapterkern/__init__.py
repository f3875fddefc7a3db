"""Bottleneck adapters on a frozen LLaMA, made nearly free by fused Triton kernels and a fused clipped AdamW.

``import adapterkern`` needs torch alone; names that need an extra are imported when they are first used.
"""

from typing import TYPE_CHECKING

from adapterkern import _ctrl_c as _ctrl_c  # first: it is about the imports that follow
from adapterkern import _lazy
from adapterkern import _moved as _moved
from adapterkern.model.adapter import Adapter
from adapterkern.model.config import AdapterConfig
from adapterkern.ops import adapter
from adapterkern.optim import ClippedAdamW

if TYPE_CHECKING:
    from adapterkern.inference.api import load, predict
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.training import Callback, TrainConfig, evaluate, train

__version__ = "0.2.0.dev0"
__all__ = [
    "Adapter",
    "AdapterConfig",
    "Callback",
    "ClippedAdamW",
    "LlamaAdapter",
    "TrainConfig",
    "adapter",
    "evaluate",
    "load",
    "predict",
    "train",
]

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        "Callback": "training.run.callbacks",
        "LlamaAdapter": "model.llama",
        "TrainConfig": "training.config",
        "evaluate": "training.api",
        "load": "inference.api",
        "predict": "inference.api",
        "train": "training.api",
    },
)
