"""Tensors as the CPU kernels read them: their shapes are refused, or what is not so laid out is copied."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adapterkern.ops.dropout import Drop, keep_scale, threshold

PLAIN = (0, 0, 1.0, 0, 0)


def inputs(
    dy: Tensor, rows: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, w: Sequence[Any]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dy, z, mean and rstd as the kernels read them."""
    count = len(rows)
    r, d = w[2].shape[-2:]
    if w[0] is None:
        mean, rstd = (torch.full((count,), value, dtype=torch.float32, device="cpu") for value in (0.0, 1.0))
    mean, rstd = mean.to(torch.float32), rstd.to(torch.float32)
    given = {"x": (rows, (count, d)), "dy": (dy, (count, d)), "z": (z, (count, r))}
    for name, (t, shape) in (given | {"mean": (mean, (count,)), "rstd": (rstd, (count,))}).items():
        expect(name, t, shape)
    if z.dtype not in (torch.float32, torch.bfloat16):  # a hook on saved tensors may have made it another
        raise TypeError(f"z: expected dtype float32 or bfloat16, as the forward made it, got {z.dtype}")
    rows, dy = side_by_side(rows), side_by_side(dy.to(rows.dtype))
    return rows, dy, z.contiguous(), mean.contiguous(), rstd.contiguous()


def gating(count: int, gate: Tensor | None, drop: Drop | None) -> tuple[tuple[Any, ...], list[Tensor]]:
    """What the kernels read of both, and the tensors behind it."""
    if gate is None and drop is None:
        return PLAIN, []
    held = []
    pointers = [0, 0]
    for i, (name, t, dtype) in enumerate((("gate", gate, torch.float32), ("rows", drop and drop.rows, torch.int64))):
        if t is not None:
            expect(name, t, (count,))
            held.append(t := aligned(t.detach().to(dtype).contiguous()))
            pointers[i] = t.data_ptr()
    if drop is None:
        return (pointers[0], *PLAIN[1:]), held
    return (pointers[0], threshold(drop.rate), keep_scale(drop.rate), int(drop.seed), pointers[1]), held


def expect(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse what would be read beyond its end; ``adapter`` has checked it, a direct call of the operator has not."""
    if t.device.type != "cpu" or t.shape != shape:
        raise ValueError(f"{name}: expected shape {shape} on a CPU, got {tuple(t.shape)} on {t.device}")


def side_by_side(rows: Tensor) -> Tensor:
    """``rows`` (T, d), copied if the elements of a row are not beside each other."""
    return aligned(rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous())


def aligned(t: Tensor) -> Tensor:
    """``t``, copied if it does not begin at a multiple of an element's size, as in the middle of a file."""
    return t if t.data_ptr() % t.element_size() == 0 else t.clone()
