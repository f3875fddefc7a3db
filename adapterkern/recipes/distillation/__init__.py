"""Soft labels of a teacher: a student learns from them, or a model keeps its behavior while it learns a task.

settings.py       temperature, weight, divergence
divergences.py    KL, its reverse, Jensen–Shannon, over all tokens or the teacher's likeliest
soft_labels.py    the loss
teacher.py        what both tasks share: the teacher, its checks, the files
labels.py         files of a teacher's likeliest tokens
context.py        what the teacher reads and the student does not
rollouts.py       the student's own completions, for on-policy steps
task.py           ``Distillation``: soft labels for the targets of the task's own rows
keeping.py        ``KeepBehaviour``: soft labels on other texts, beside a task
"""

from typing import TYPE_CHECKING

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.recipes.distillation.keeping import KeepBehaviour as KeepBehaviour
    from adapterkern.recipes.distillation.keeping import WithKept as WithKept
    from adapterkern.recipes.distillation.settings import ContextSettings as ContextSettings
    from adapterkern.recipes.distillation.settings import RolloutSettings as RolloutSettings
    from adapterkern.recipes.distillation.settings import SoftLabelSettings as SoftLabelSettings
    from adapterkern.recipes.distillation.task import Distillation as Distillation
    from adapterkern.recipes.distillation.task import first_layers as first_layers

# Imported on first use: the command line makes options from settings.py, and task.py takes seconds to import.
_HOMES = {
    "ContextSettings": "settings",
    "Distillation": "task",
    "KeepBehaviour": "keeping",
    "RolloutSettings": "settings",
    "SoftLabelSettings": "settings",
    "WithKept": "keeping",
    "first_layers": "task",
}
__all__ = list(_HOMES)
__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
