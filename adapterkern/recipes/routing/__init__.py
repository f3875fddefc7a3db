"""Experts that a router chooses among: each sequence runs one of them, several, or none."""

from typing import TYPE_CHECKING, Any

from adapterkern.recipes.routing.router import RoutingConfig

if TYPE_CHECKING:
    from adapterkern.recipes.routing.task import RoutedTask

__all__ = ["RoutedTask", "RoutingConfig"]


def __getattr__(name: str) -> Any:
    # Imported when it is touched: the command line makes options from RoutingConfig, which needs torch alone.
    if name != "RoutedTask":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from adapterkern.recipes.routing.task import RoutedTask

    return RoutedTask
