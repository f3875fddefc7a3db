"""The host table: block sizes, warps and pipeline stages by element size, d and r. Nothing autotunes.

A choice never depends on the number of rows, so one compiled variant serves every batch shape; what does depend on it
(how many programs share d or the rows) is a run-time argument.
"""

import math
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


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉. triton.cdiv, which kernels can call too, takes 6 µs for it on the host."""
    return -(-a // b)


@lru_cache
def forward_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the forward kernels.

    ``itemsize`` is the compute dtype's and ``wide`` says that the device has warp-group products, whose operands stay
    in shared memory.
    """
    if itemsize == 4:
        return Tiles(32, 32, 8 if R >= 256 else 4, 2)
    if R >= 256:
        return Tiles(64 if wide and R == 256 else 32, 32, 8, 3)
    if R == 128:
        return Tiles(64, 64, 8, 3 if wide else 2)
    return Tiles(64, 64, 4, 4 if wide else 3)


@lru_cache
def hidden_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the backward's first kernel: the forward's, but where z and an fp32 dz would leave registers."""
    if itemsize == 2 and R == 256:
        return Tiles(32, 64, 8, 2)
    if itemsize == 2 and R == 32 and not wide:
        return Tiles(64, 64, 8, 3)  # with 4 warps ptxas trades 16 bytes of stack for occupancy
    return forward_tiles(itemsize, R, wide)


@lru_cache
def slice_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the backward's second kernel. Its (R, BD) fp32 sums live in registers, two of them below R = 256.

    Without warp-group products its resident slice of A lives there as well, which is why the tiles are smaller.
    """
    if itemsize == 4:
        return Tiles(16, max(16, min(64, 4096 // R)), 8, 1)
    if wide:
        return Tiles(32, {16: 128, 32: 128, 64: 128, 128: 64, 256: 64, 512: 32}[R], 8, 3 if R <= 128 else 2)
    return Tiles(16 if R in (32, 64, 512) else 32, 128 if R <= 64 else 32, 8, 2)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at once, to the order that choosing a split needs.

    The interpreter counts as four: one program at a time runs there, and four lets small tests walk every path.
    """
    return _multiprocessors(device.index) if device.type == "cuda" else 4


@lru_cache
def has_wide_products(device: torch.device) -> bool:
    """True on Hopper and data-centre Blackwell. The interpreter takes their tiles as well."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


def column_split(tiles: int, rows: int, d: int, R: int, BD: int, sms: int) -> tuple[int, int]:
    """Over how many programs a row tile's columns go, and how many column blocks each takes; (1, all) for no split.

    One while row tiles alone keep half of the device busy. Beyond, a program of the second launch reads `splits` fp32
    partial sums (rows, R), and each program of both d/splits columns of x and the weights; the two are equal at the
    square root below, which is 8 for 64 rows at d = 4096 and R = 64, and 45 for one row.
    """
    blocks = ceil_div(d, BD)
    if 2 * tiles >= sms:
        return 1, blocks
    balanced = math.isqrt(int(d / 2 * (1 / R + 1 / rows)))
    width = ceil_div(blocks, max(1, min(blocks, sms // tiles, balanced)))
    return ceil_div(blocks, width), width


def row_shares(slices: int, tiles: int, sms: int) -> int:
    """Over how many programs a slice's rows go in the backward. Each writes 2·R·d fp32 partial sums, read once more."""
    return max(1, min(tiles, sms // slices))
