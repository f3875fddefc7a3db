"""Experts that a router chooses among: each sequence, or each token, runs one of them, several, or none.

router.py    the router, its settings and its losses
task.py      ``RoutedTask``, the task
"""

from typing import TYPE_CHECKING

from adapterkern import _lazy

if TYPE_CHECKING:
    from adapterkern.recipes.routing.router import RoutingConfig as RoutingConfig
    from adapterkern.recipes.routing.task import RoutedTask as RoutedTask

_HOMES = {"RoutedTask": "task", "RoutingConfig": "router"}
__all__ = list(_HOMES)
__getattr__, __dir__ = _lazy.attach(__name__, _HOMES)
