"""One run: train, evaluate, and what they work with. It knows no recipe.

api.py                   the doors: ``train``, ``evaluate``
loop.py                  steps, evaluations, checkpoints, in their order
task.py, heads.py        hidden states → loss, what is trained and saved
data/                    rows → examples → batches; the prefix cache
parallel/                how a step is made: one process, DDP, FSDP2, DeepSpeed; processes.py is for all of them
run/                     checkpoints, the folder, metrics, results
saved.py                 what a finished run leaves, read again
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkern.training.api import evaluate as evaluate
    from adapterkern.training.api import train as train
    from adapterkern.training.config import TrainConfig as TrainConfig
    from adapterkern.training.data.examples import load_examples as load_examples
    from adapterkern.training.data.prefix import PrefixCache as PrefixCache
    from adapterkern.training.data.rows import DataError as DataError
    from adapterkern.training.heads import ClassificationHead as ClassificationHead
    from adapterkern.training.run.checkpoint import CheckpointError as CheckpointError
    from adapterkern.training.run.report import plot_history as plot_history
    from adapterkern.training.run.report import read_metrics as read_metrics
    from adapterkern.training.run.results import NonFiniteError as NonFiniteError
    from adapterkern.training.run.results import TrainResult as TrainResult
    from adapterkern.training.saved import load_run as load_run
    from adapterkern.training.saved import push_to_hub as push_to_hub
    from adapterkern.training.task import Task as Task

# Imported when they are touched: the options of the command line are those of config.py, which needs nothing, and
# transformers and accelerate take seconds.
_HOMES = {
    "CheckpointError": "run.checkpoint",
    "ClassificationHead": "heads",
    "DataError": "data.rows",
    "NonFiniteError": "run.results",
    "PrefixCache": "data.prefix",
    "Task": "task",
    "TrainConfig": "config",
    "TrainResult": "run.results",
    "evaluate": "api",
    "load_examples": "data.examples",
    "load_run": "saved",
    "plot_history": "run.report",
    "push_to_hub": "saved",
    "read_metrics": "run.report",
    "train": "api",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "load_task":  # in the cards of adapters saved before 0.2
        name = "load_run"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
