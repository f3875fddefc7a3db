"""Block sizes other than the host table's, inside a ``with`` block."""

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from adapterkern.ops.kernels import launch
from adapterkern.ops.kernels.tiles import Tiles, forward_tiles, hidden_tiles, slice_tiles

TABLES = {"forward_tiles": forward_tiles, "hidden_tiles": hidden_tiles, "slice_tiles": slice_tiles}


def parse(text: str) -> tuple[str, Tiles]:
    """Parse ``"slice_tiles=64,128,8,3"``: the table's name and BT, BD, warps, stages."""
    name, _, numbers = text.partition("=")
    sizes = numbers.split(",")
    if name not in TABLES or len(sizes) != 4 or not all(n.isdigit() for n in sizes):
        raise ValueError(
            f"tiles: expected one of {', '.join(TABLES)}, = and four numbers BT,BD,warps,stages, got {text!r}"
        )
    BT, BD, warps, stages = map(int, sizes)
    return name, Tiles(BT, BD, warps, stages)


@contextlib.contextmanager
def replaced(name: str, tiles: Tiles) -> Iterator[None]:
    """Inside the block, the table ``name`` returns ``tiles`` in every kernel module that imports it."""
    modules = [
        m for m in list(sys.modules.values())
        if getattr(m, "__name__", "").startswith("adapterkern.ops.kernels.") and getattr(m, name, None) is TABLES[name]
    ]  # fmt: skip
    for m in modules:
        setattr(m, name, lambda *_: tiles)
    try:
        yield
    finally:
        for m in modules:
            setattr(m, name, TABLES[name])


def tiled_launch(name: str, tiles: Tiles) -> Any:
    """A stand-in for the module ``launch`` that uses these tiles."""

    def call(function: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with replaced(name, tiles):
                return getattr(launch, function)(*args, **kwargs)

        return run

    return SimpleNamespace(adapter_forward=call("adapter_forward"), adapter_backward=call("adapter_backward"))
