"""Training of adapters on a frozen LLaMA: ``train``, ``evaluate``, ``TrainConfig`` and what they work with.

rows.py, data.py     files and lists → examples → padded batches
task.py, heads.py    hidden states → loss, what is trained and saved; the kinds below subclass Task
    multitask.py, routing.py (router.py), distillation.py (soft_labels.py), qa.py (spans.py, squad.py)
prefix.py            activations below the first adapter, computed once
loop.py              steps, evaluations, checkpoints, in their order
engine.py, zero.py   how a step is made: one process, DDP, FSDP2; DeepSpeed. distributed.py is for all of them
outputs.py           what a run leaves in its folder
ablation.py          many runs of a study (study.py, presets.py), and what they say (ablation_report.py, stability.py)
demo.py, corpora.py  the demo, and the texts and the model that things are shown on
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapterkern.training.checkpoint import CheckpointError as CheckpointError
    from adapterkern.training.config import TrainConfig as TrainConfig
    from adapterkern.training.data import load_examples as load_examples
    from adapterkern.training.evaluation import evaluate as evaluate
    from adapterkern.training.heads import ClassificationHead as ClassificationHead
    from adapterkern.training.loop import train as train
    from adapterkern.training.outputs import load_task as load_task
    from adapterkern.training.outputs import push_to_hub as push_to_hub
    from adapterkern.training.prefix import PrefixCache as PrefixCache
    from adapterkern.training.report import plot_history as plot_history
    from adapterkern.training.report import read_metrics as read_metrics
    from adapterkern.training.results import NonFiniteError as NonFiniteError
    from adapterkern.training.results import TrainResult as TrainResult
    from adapterkern.training.rows import DataError as DataError
    from adapterkern.training.task import Task as Task

# Imported when they are touched: the options of the command line are those of config.py, which needs nothing, and
# transformers and accelerate take seconds.
_HOMES = {
    "CheckpointError": "checkpoint",
    "ClassificationHead": "heads",
    "DataError": "rows",
    "NonFiniteError": "results",
    "PrefixCache": "prefix",
    "Task": "task",
    "TrainConfig": "config",
    "TrainResult": "results",
    "evaluate": "evaluation",
    "load_examples": "data",
    "load_task": "outputs",
    "plot_history": "report",
    "push_to_hub": "outputs",
    "read_metrics": "report",
    "train": "loop",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
