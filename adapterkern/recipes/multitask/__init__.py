"""Many tasks, one backbone: each with its own adapter and head, trained together from batches that mix the tasks."""

from adapterkern.recipes.multitask.task import MultiTask, Prediction

__all__ = ["MultiTask", "Prediction"]
