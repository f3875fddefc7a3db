"""Bottleneck adapters on a frozen LLaMA, made nearly free by fused Triton kernels and a fused clipped AdamW.

``import adapterkern`` needs torch alone; names that need an extra are imported when they are first touched.
"""

import importlib
from typing import TYPE_CHECKING, Any

from adapterkern import _moved as _moved
from adapterkern.model.adapter import Adapter, AdapterConfig
from adapterkern.ops.operator import adapter
from adapterkern.optim.clipped_adamw import ClippedAdamW

if TYPE_CHECKING:
    from adapterkern.model.llama import LlamaAdapter
    from adapterkern.training import TrainConfig, evaluate, train

__version__ = "0.1.0"
__all__ = [
    "Adapter",
    "AdapterConfig",
    "ClippedAdamW",
    "LlamaAdapter",
    "TrainConfig",
    "adapter",
    "evaluate",
    "train",
]

_NEED_TRAIN_EXTRA = {
    "LlamaAdapter": "adapterkern.model.llama",
    "TrainConfig": "adapterkern.training",
    "evaluate": "adapterkern.training",
    "train": "adapterkern.training",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_TRAIN_EXTRA:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_NEED_TRAIN_EXTRA[name]), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__name__):
            raise
        message = f"adapterkern.{name} needs {error.name}: pip install 'adapterkern[train]'"
        raise ModuleNotFoundError(message, name=error.name) from error
