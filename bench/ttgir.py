"""Which products of a compiled kernel may read shared memory while it is filled again.

A warp-group product (wgmma) runs on after it was started. If a loop waits for it only in the next iteration, the loads
of this iteration must go to another slot than the one it reads. Triton decides how many slots a load gets before it
decides which products run on, and the two do not always agree (see ``settled`` in ops/kernels/primitives.py). The
interpreter has no asynchrony, so neither it nor any test without a GPU computes a wrong number.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_SLOTS = re.compile(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x")
_VIEW = re.compile(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)")
_COPY = re.compile(r"ttg\.async_copy_global_to_local %\w+, (%\w+)")
_PRODUCT = re.compile(r"ttng\.warp_group_dot (%\w+), (%\w+), ")
_WAIT = re.compile(r"ttng\.warp_group_dot_wait .*pendings = (\d+)")


@dataclass(frozen=True)
class Refill:
    """A load of a loop that may overwrite an operand of a product in flight."""

    buffer: str
    slots: int
    ahead: int  # number of iterations between a load and the product that reads it


@dataclass(frozen=True)
class _Event:
    kind: str  # "copy", "product" or "wait"
    buffers: tuple[str, ...] = ()
    left: int = 0  # products that a wait leaves in flight


def refills(text: str) -> list[Refill]:
    """Every load in the TTGIR ``text`` of a kernel that may overwrite an operand of a product in flight."""
    slots: dict[str, int] = {}
    views: dict[str, str] = {}
    ahead: dict[str, int] = {}  # loads before the loop
    loops: list[tuple[int, list[_Event]]] = []  # open ones: indentation, what the body does
    found: list[Refill] = []

    def buffer(value: str) -> str | None:
        while value in views:
            value = views[value]
        return value if value in slots else None

    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if loops and line.lstrip().startswith("}") and indent <= loops[-1][0]:
            found += _simulate(loops.pop()[1], slots, ahead)
        if m := _SLOTS.search(line):
            slots[m[1]], ahead[m[1]] = int(m[2]), 0
        elif m := _VIEW.search(line):
            views[m[1]] = m[2]
        elif " scf.for " in line:
            loops.append((indent, []))
        elif (m := _COPY.search(line)) and (filled := buffer(m[1])):
            if loops:
                loops[-1][1].append(_Event("copy", (filled,)))
            else:
                ahead[filled] += 1
        elif loops and (m := _PRODUCT.search(line)):
            read = tuple(b for b in (buffer(m[1]), buffer(m[2])) if b is not None)
            loops[-1][1].append(_Event("product", read))
        elif loops and (m := _WAIT.search(line)):
            loops[-1][1].append(_Event("wait", left=int(m[1])))
    return found


def _simulate(body: Sequence[_Event], slots: dict[str, int], ahead: dict[str, int]) -> list[Refill]:
    """Three iterations of a loop: iteration i reads slot i of a buffer and loads slot i + ahead."""
    found: dict[str, Refill] = {}
    flying: list[tuple[int, tuple[str, ...]]] = []
    for i in range(3):
        for event in body:
            if event.kind == "product":
                flying.append((i, event.buffers))
            elif event.kind == "wait":
                flying = flying[max(0, len(flying) - event.left) :]
            else:
                (b,) = event.buffers
                if any(b in read and (i + ahead[b] - began) % slots[b] == 0 for began, read in flying):
                    found[b] = Refill(b, slots[b], ahead[b])
    return list(found.values())
