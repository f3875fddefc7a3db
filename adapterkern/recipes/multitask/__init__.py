"""Many tasks, one backbone: each with its own adapter and head, trained together from batches that mix the tasks."""

from typing import TYPE_CHECKING

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.recipes.multitask.task import MultiTask as MultiTask
    from adapterkern.recipes.multitask.task import Prediction as Prediction

_HOMES = {"MultiTask": "task", "Prediction": "task"}
__all__ = list(_HOMES)
__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
