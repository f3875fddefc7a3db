"""Rows → examples → batches, and the activations of the frozen prefix."""

from typing import TYPE_CHECKING

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.training.data.batches import collate as collate
    from adapterkern.training.data.examples import Example as Example
    from adapterkern.training.data.examples import load_examples as load_examples

_HOMES = {"Example": "examples", "collate": "batches", "load_examples": "examples"}
__all__ = list(_HOMES)
__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
