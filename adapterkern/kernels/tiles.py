"""The host table: block sizes, warps and pipeline stages by element size, d and r. Nothing autotunes.

A choice never depends on the number of rows, so one compiled variant serves every batch shape; what does depend on it (how many programs
share d or the rows) is a run-time argument.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel's block sizes: rows BT, columns of d BD."""

    BT: int
    BD: int
    num_warps: int
    num_stages: int


def forward_tiles(itemsize: int, R: int) -> Tiles:
    """Tiles of the forward kernels; also of the backward's first, which is the forward's first half with W_up in place of A."""
    if itemsize == 4:
        return Tiles(32, 32, 8 if R >= 256 else 4, 2)
    if R >= 512:
        return Tiles(32, 32, 8, 3)
    if R >= 128:
        return Tiles(64, 64 if R == 128 else 32, 8, 3)
    return Tiles(64, 64, 4, 4)


def slice_tiles(itemsize: int, R: int) -> Tiles:
    """Tiles of the backward's second kernel, whose two (R, BD) fp32 accumulators live in registers."""
    if itemsize == 4:
        return Tiles(32, max(16, min(64, 4096 // R)), 8, 1)
    if R >= 256:
        return Tiles(32, max(16, 8192 // R), 8, 2)
    return Tiles(64, min(128, 8192 // R), 8, 2)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at once, to the order that choosing a split needs.

    The interpreter counts as four: one program at a time runs there, and four lets small tests walk every path.
    """
    return _multiprocessors(device.index) if device.type == "cuda" else 4


def column_split(tiles: int, blocks: int, sms: int) -> int:
    """Over how many programs a row tile's columns go. One as long as row tiles alone keep half of the device busy."""
    return 1 if 2 * tiles >= sms else max(1, min(blocks, sms // tiles))


def row_shares(slices: int, tiles: int, sms: int) -> int:
    """Over how many programs the rows of one slice of d go in the backward. Each adds 2·R·d fp32 partial sums to write and read."""
    return max(1, min(tiles, sms // slices))
