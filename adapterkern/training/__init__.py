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

from adapterkern.training.checkpoint import CheckpointError
from adapterkern.training.config import TrainConfig
from adapterkern.training.data import load_examples
from adapterkern.training.evaluation import evaluate
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.loop import NonFiniteError, TrainResult, train
from adapterkern.training.outputs import load_task, push_to_hub
from adapterkern.training.prefix import PrefixCache
from adapterkern.training.report import plot_history, read_metrics
from adapterkern.training.rows import DataError
from adapterkern.training.task import Task

__all__ = [
    "CheckpointError",
    "ClassificationHead",
    "DataError",
    "NonFiniteError",
    "PrefixCache",
    "Task",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "load_examples",
    "load_task",
    "plot_history",
    "push_to_hub",
    "read_metrics",
    "train",
]
