"""The host's table of block sizes, warps and pipeline stages by element size, d and r. Nothing is autotuned.

No entry depends on the number of rows, so one compiled variant serves every batch shape. What does depend on it (how
many programs share d or the rows) is a run-time argument.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from adapterkern.checks import switch

# What an SM could load from L2 in the 2 µs that a second launch costs, at 6 TB/s over 132 SMs.
LAUNCH_BYTES = 90_000


@dataclass(frozen=True, slots=True)
class Tiles:
    """One kernel's block sizes: rows BT, columns of d BD.

    ``registers``: the most that a thread may take, up to 255. Without it ptxas keeps to numbers that let more programs
    run on an SM, 128 at 8 warps for two or 80 for three, even if that takes some bytes of stack.
    """

    BT: int
    BD: int
    num_warps: int
    num_stages: int
    registers: int | None = None

    @property
    def blocks(self) -> dict[str, int]:
        """The kernel's constants. Stages are among them: only ``tl.range`` pipelines every load of a loop."""
        return {"BT": self.BT, "BD": self.BD, "STAGES": self.num_stages}

    @property
    def options(self) -> dict[str, int]:
        """The compiler's options of a launch."""
        return {"num_warps": self.num_warps} | ({"maxnreg": self.registers} if self.registers else {})

    def reading(self, x: torch.Tensor, vec: int, compute: torch.dtype, few: int) -> "Tiles":
        """These tiles for rows of x that are loaded ``vec`` elements at a time, for products in ``compute``.

        Below 8 bytes per load (odd d) every element or two take an address of their own: then at most ``few`` rows.
        Below 4 bytes (odd d in 16 bits) no load is asynchronous, and stages would only take registers. Rows wider than
        the products' operands (fp32 under autocast) get at most 3 stages: each takes twice the memory.
        """
        tiles = self
        if x.element_size() > compute.itemsize:
            tiles = replace(tiles, num_stages=min(self.num_stages, 3))
        if vec * x.element_size() < 8:
            tiles = replace(tiles, BT=min(self.BT, few), BD=min(self.BD, 32), num_warps=8, registers=255)
        if vec * x.element_size() < 4:
            tiles = replace(tiles, num_stages=1)
        return tiles

    def of_mixed_rows(self, R: int, compute: torch.dtype) -> "Tiles":
        """These row tiles for a mixed batch, where each row's place and adapter take registers, too."""
        if compute == torch.float32 and R in (64, 128, 256):
            return replace(self, BT=16, BD=min(self.BD, 32 if R == 64 else 16))
        if compute == torch.float32 and R == 512:
            return replace(self, num_stages=1)
        if R == 128:
            return replace(self, BT=self.BT if self.BT > 32 else 16, registers=255)
        return self

    def of_forward(
        self, R: int, x: torch.Tensor, vec: int, compute: torch.dtype, *, norm: bool, mixed_rows: bool,
        gate_and_dropout: bool,
    ) -> "Tiles":  # fmt: skip
        """These row tiles of the forward, whose rows are loaded as ``reading`` says."""
        tiles = self.reading(x, vec, compute, few=16 if R * compute.itemsize >= 512 else 32)
        if mixed_rows:
            tiles = tiles.of_mixed_rows(R, compute)
        # 64 rows spill up to 32 bytes at R = 256, and at 512 the 128 registers that ptxas keeps to spill 16.
        if R >= 256 and gate_and_dropout:
            tiles = replace(tiles, BT=min(tiles.BT, 32), registers=255 if R == 512 else tiles.registers)
        if R >= 256 and not norm and vec * x.element_size() < 4:
            tiles = replace(tiles, num_warps=4)  # 8 spill up to 32 bytes
        return tiles

    def of_slices(
        self, R: int, x: torch.Tensor, compute: torch.dtype, *, norm: bool, x_free: bool, folded: bool, reads_x: bool,
        mixed_rows: bool,
    ) -> "Tiles":  # fmt: skip
        """These tiles of the backward's slices, which read x if ``reads_x``.

        If the products take x as it is (``folded`` as in backward.py, or no norm and one dtype), it does not go through
        registers. With ``x_free`` it is made of y, by a product more, with its operands.
        """
        mixed = x.dtype != compute
        unchanged = not x_free and (folded or not (norm or mixed))
        tiles = self
        if reads_x and not unchanged:
            few = x_free and (mixed or (R == 256 and not norm))  # 32 rows spill 48 bytes on sm_90
            tiles = replace(tiles, BT=min(tiles.BT, 16 if few else 32))
            if mixed and R == 64 and self.BT == 16:
                tiles = replace(tiles, BD=32)  # 128 columns spill 8 bytes on sm_80
            elif mixed and R == 64:
                tiles = replace(tiles, num_stages=2)  # 3 spill 32 bytes on sm_90
            # ptxas may choose how many programs share an SM for mixed dtypes below 128, and folded rows below 256:
            # above, two have no room or spill.
            if R >= 256 or not (folded or (mixed and R < 128)):
                tiles = replace(tiles, registers=255)
            if x_free and R == 512:  # in fp32 96 KiB of A, W_up, dz and h; 128 KiB with 16 columns
                tiles = replace(tiles, BD=32 // compute.itemsize, num_stages=1)
            elif x_free and R == 32 and compute == torch.float32:
                tiles = replace(tiles, BD=16)
            elif x_free and mixed and mixed_rows and R <= 64:
                tiles = replace(tiles, BD=tiles.BD // 2)
        if not norm and R == 128 and compute == torch.float32:
            tiles = replace(tiles, BD=16)  # 32 spill 340 bytes
        if tiles.BD == R == 32:
            tiles = replace(tiles, BD=16)  # the kernel tells how its sums lie from their shape
        return tiles


def ceil_div(a: int, b: int) -> int:
    """⌈a/b⌉. ``triton.cdiv``, which kernels can call too, takes 6 µs on the host."""
    return -(-a // b)


def early_launch(pdl: bool) -> dict[str, bool]:
    """The option of a launch that may start up while the previous kernel runs; that kernel calls ``follow``."""
    return {"launch_pdl": True} if pdl else {}


@lru_cache
def forward_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the forward kernels.

    ``itemsize`` is the compute dtype's in bytes. ``wide``: the device has warp-group products, whose operands stay in
    shared memory. Each tile loads A and W_up again: 2·R/BT units of L2 traffic beside x's 2. For R >= 128, where they
    outweigh x, 128 rows share them. Below, 64 rows keep one launch at T = 8192 (128 tiles on 132 SMs).
    """
    if itemsize == 4:
        return Tiles(16, 16, 8, 2, 255) if R == 512 else Tiles(32, 32, 8 if R == 256 else 4, 2, 255)
    if R == 512:
        return Tiles(32, 32, 8, 3 if wide else 2)
    if R == 256:
        return Tiles(64, 64, 8, 4) if wide else Tiles(32, 32, 8, 3)
    if wide:
        return Tiles(64, 128, 8, 4)
    return Tiles(64, 64, 8, 2) if R == 128 else Tiles(64, 64, 4, 3, 255 if R in (32, 64) else None)


@lru_cache
def hidden_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the backward's first kernel: the forward's, except where z and an fp32 dz would spill."""
    if itemsize == 2 and R == 512:
        return Tiles(16, 32, 8, 3 if wide else 2)
    if itemsize == 2 and R == 256:
        return Tiles(32, 64, 8, 3 if wide else 2)
    return forward_tiles(itemsize, R, wide)


@lru_cache
def slice_tiles(itemsize: int, R: int, wide: bool) -> Tiles:
    """Tiles of the backward's second kernel. Its (R, BD) fp32 sums live in registers, two of them below R = 256.

    Without warp-group products its resident slice of A is in registers as well, so the tiles are smaller. BT is for x
    that goes into the product unchanged; where it cannot, ``of_slices`` and the kernel take at most 32 rows, or 16.
    """
    registers = 255 if R == 512 else None
    if itemsize == 4:
        # 64 columns at R = 64 spill up to 200 bytes in tf32.
        return Tiles(16, {16: 64, 32: 64, 64: 32, 128: 32}.get(R, 16), 8, 1, 255)
    if wide:
        columns, stages = {128: (64, 3), 256: (64, 3), 512: (32, 2)}.get(R, (128, 3))
        return Tiles(64, columns, 8, stages, registers)
    return Tiles(16 if R in (32, 64, 512) else 32, {16: 64, 32: 64, 64: 128}.get(R, 32), 8, 2, registers)


@lru_cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many programs the device runs at once, roughly: what choosing a split needs.

    The interpreter counts as four. It runs one program at a time, but with four small tests reach every path.
    """
    return _multiprocessors(device.index) if device.type == "cuda" else 4


@lru_cache
def has_early_launches(device: torch.device) -> bool:
    """Programmatic dependent launch: Hopper and later. ``ADAPTERKERN_EARLY_LAUNCH=0`` turns it off, for bisecting."""
    wanted = switch("ADAPTERKERN_EARLY_LAUNCH")
    return wanted and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@lru_cache
def has_wide_products(device: torch.device) -> bool:
    """Warp-group products: Hopper and data-center Blackwell. The interpreter takes their tiles as well."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


@lru_cache(maxsize=4096)
def column_split(tiles: int, rows: int, d: int, R: int, BD: int, sms: int, reads: int) -> tuple[int, int]:
    """How many programs share a row tile's columns, and how many column blocks each takes; (1, all) for no split.

    Chosen for the fewest bytes of the busiest SM: its programs' columns of x and of the weights, ``reads`` times, and
    for a split also the fp32 partial sums (rows, R), written once and read by each of the tile's programs, and a second
    launch. At d = 4096 and R = 64 on 132 SMs this gives 3 for 67 tiles of 64 rows (T = 4225) and 1 for 100 to 132.
    """
    blocks = ceil_div(d, BD)
    best, least = (1, blocks), math.inf
    for width in range(blocks, 0, -1):
        splits = ceil_div(blocks, width)
        load = 2 * reads * (rows + R) * width * BD + (4 * (1 + splits) * rows * R if splits > 1 else 0)
        cost = ceil_div(tiles * splits, sms) * load + (LAUNCH_BYTES if splits > 1 else 0)
        if cost < least:
            best, least = (splits, width), cost
    return best


def row_shares(slices: int, tiles: int, sms: int) -> int:
    """How many programs share a slice's rows in the backward. Each writes 2·R·d fp32 partial sums, read once more."""
    return max(1, min(tiles, sms // slices))
