"""One run: train, evaluate, and what they work with.

api.py                      the entry points: ``train``, ``evaluate``; arguments.py: what they may be given
prediction.py               predictions for rows without labels, in bounded memory
config.py                   ``TrainConfig``
drift.py                    how far a model has gone from the untouched one
dry_run.py                  a run of a few steps that are undone, and what it will take
loop.py                     the order of steps, evaluations and checkpoints
task.py                     hidden states → loss; what is trained, scored and saved
feed.py                     batches on the device, with their prefix; sums over an evaluation
heads.py, head_kinds.py     what a head learns of labeled texts: one label, several, a number
losses.py, scores.py        smoothed labels and weighted classes; scores that are more than sums over rows
stack.py                    a run on a stack of adapters
compiled.py                 frozen layers compiled for a run's steps
attention.py                which attention kernel a step on a CPU takes
activations.py              recomputed or offloaded activations
padding.py                  how much of the batches is padding, and whether packing would help
optimization.py             the optimizer and its learning-rate schedule
data/                       rows → examples → batches; the prefix cache
parallel/, processes.py     one step in one process, under DDP, FSDP2 or DeepSpeed; what ranks share
run/                        the run's folder, checkpoints, metrics, result
saved.py                    what a finished run leaves, read again
"""

from typing import TYPE_CHECKING, Any

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.training.api import evaluate as evaluate
    from adapterkern.training.api import train as train
    from adapterkern.training.config import TrainConfig as TrainConfig
    from adapterkern.training.data.examples import load_examples as load_examples
    from adapterkern.training.data.prefix import PrefixCache as PrefixCache
    from adapterkern.training.data.rows import DataError as DataError
    from adapterkern.training.data.split import HeldOut as HeldOut
    from adapterkern.training.head_kinds import MultiLabelHead as MultiLabelHead
    from adapterkern.training.head_kinds import RegressionHead as RegressionHead
    from adapterkern.training.heads import ClassificationHead as ClassificationHead
    from adapterkern.training.run.callbacks import Callback as Callback
    from adapterkern.training.run.callbacks import RunInfo as RunInfo
    from adapterkern.training.run.plot import plot_history as plot_history
    from adapterkern.training.run.report import read_metrics as read_metrics
    from adapterkern.training.run.results import CheckpointError as CheckpointError
    from adapterkern.training.run.results import DryRun as DryRun
    from adapterkern.training.run.results import NonFiniteError as NonFiniteError
    from adapterkern.training.run.results import TrainResult as TrainResult
    from adapterkern.training.saved import load_run as load_run
    from adapterkern.training.saved import push_to_hub as push_to_hub
    from adapterkern.training.task import Task as Task

_HOMES = {
    "Callback": "run.callbacks",
    "CheckpointError": "run.results",
    "ClassificationHead": "heads",
    "DataError": "data.rows",
    "DryRun": "run.results",
    "HeldOut": "data.split",
    "MultiLabelHead": "head_kinds",
    "NonFiniteError": "run.results",
    "PrefixCache": "data.prefix",
    "RegressionHead": "head_kinds",
    "RunInfo": "run.callbacks",
    "Task": "task",
    "TrainConfig": "config",
    "TrainResult": "run.results",
    "evaluate": "api",
    "load_examples": "data.examples",
    "load_run": "saved",
    "plot_history": "run.plot",
    "push_to_hub": "saved",
    "read_metrics": "run.report",
    "train": "api",
}
__all__ = list(_HOMES)
_lazily, __dir__ = _lazy.attach(__name__, _HOMES)


def __getattr__(name: str) -> Any:
    return _lazily("load_run" if name == "load_task" else name)  # model cards written by 0.1.0 say load_task
