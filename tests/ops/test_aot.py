"""The kernels compiled ahead of time: the resources they use, and one variant per shape."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from adapterkern.ops.kernels import cache, forward, hidden, launch, tiles
from bench import aot, sass, ttgir
from tests.support.numerics import make_weights

pytestmark = pytest.mark.slow

NO_PRODUCTS = ("prepare", "reduce", "hidden_finish")


@pytest.mark.parametrize(
    ("tiles_", "rows", "d", "R", "BD", "reads", "expected"),
    [
        (128, 64, 4096, 64, 64, 2, (1, 64)),  # T = 8192: a row tile for almost every SM
        (67, 64, 4096, 64, 64, 2, (3, 22)),  # T = 4225: two thirds of a tile each instead of half the device idle
        (133, 64, 4096, 64, 128, 1, (3, 11)),  # one tile more than SMs
        (5000, 64, 4096, 64, 64, 2, (1, 64)),
        (1, 1, 4096, 64, 64, 2, (64, 1)),  # decoding
        (1, 16, 576, 16, 64, 2, (1, 9)),  # less work than a second launch takes
    ],
)
def test_columns_are_shared_where_that_costs_the_busiest_sm_less(
    tiles_: int, rows: int, d: int, R: int, BD: int, reads: int, expected: tuple[int, int]
) -> None:
    assert tiles.column_split(tiles_, rows, d, R, BD, 132, reads) == expected


def fitting(variant: aot.Launch, sm: int) -> aot.Compiled:
    """The variant compiled: no spills, no operand overwritten in use, no more shared memory than the card has."""
    c = aot.compile_launch(variant, sm)
    assert c.stack == 0, c
    assert c.shared <= aot.SHARED_LIMIT[sm], c
    assert not c.refills, (c.kernel, c.refills)
    return c


@pytest.mark.parametrize(
    ("d", "r", "sm", "dtype"),
    [
        (4096, 64, 90, torch.bfloat16),
        (4096, 64, 80, torch.bfloat16),
        (8192, 256, 90, torch.float16),
        (576, 16, 100, torch.bfloat16),
        (2048, 128, 100, torch.bfloat16),
        (5120, 32, 80, torch.bfloat16),
        (577, 20, 90, torch.float32),
        (4096, 512, 86, torch.bfloat16),  # 99 KiB of shared memory, as on sm_89
        (4096, 512, 120, torch.bfloat16),  # the same, with early launches
    ],
    ids=str,
)
def test_fits_without_spilling_and_uses_tensor_cores(d: int, r: int, sm: int, dtype: torch.dtype) -> None:
    for variant in aot.variants(d, r, dtype, sm):
        c = fitting(variant, sm)
        if dtype != torch.float32 and c.kernel not in NO_PRODUCTS:
            assert c.wgmma + c.mma > 0, c
            if sm == 90 and r >= 64:
                assert c.wgmma > 0 or (c.kernel.startswith("hidden") and r == 256), c


@pytest.mark.parametrize(
    ("d", "r", "sm", "dtype", "compute"),
    [
        (4096, 64, 90, torch.float32, torch.bfloat16),  # an fp32 backbone under autocast
        (4096, 128, 90, torch.float32, torch.bfloat16),
        (576, 16, 80, torch.float32, torch.float16),
        (2048, 64, 90, torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_rows_of_another_dtype_than_the_products_compile_and_fit(
    d: int, r: int, sm: int, dtype: torch.dtype, compute: torch.dtype
) -> None:
    """Triton's interpreter multiplies operands of two dtypes, its compiler does not."""
    for variant in aot.variants(d, r, dtype, sm, compute):
        fitting(variant, sm)


@pytest.mark.parametrize(
    ("shape", "kernel", "parts"),
    [
        (aot.Shape(16, 577, "float32-bfloat16", 100), "forward", []),
        (aot.Shape(64, 577, "bfloat16", 90), "slice dx g u", []),
        (aot.Shape(512, 577, "float16", 120), "forward", []),
        (aot.Shape(8, 576, "float32-float16", 100), "forward", []),
        (aot.Shape(512, 4096, "float32", 86), "slice x-free dx g", []),  # 128 KiB of 99
        (aot.Shape(64, 4096, "tf32", 80), "slice dx g u", []),
        (aot.Shape(512, 4096, "float32-bfloat16", 90), "hidden", []),
        (aot.Shape(256, 4096, "bfloat16", 90), "forward_finish", ["gate", "dropout"]),
        (aot.Shape(128, 4096, "float32", 80), "slice dx g u", ["no-norm"]),
        (aot.Shape(256, 577, "bfloat16", 80), "forward", ["no-norm"]),
        (aot.Shape(256, 577, "float32", 100), "forward_partial", ["routed"]),
        (aot.Shape(128, 4096, "bfloat16", 100), "hidden_partial", ["routed"]),
    ],
    ids=str,
)
def test_what_spilled_or_did_not_fit_does_now(shape: aot.Shape, kernel: str, parts: list[str]) -> None:
    """A sample of what ``python -m bench aot`` compiles."""
    (variant,) = (v for v in shape.variants(**aot.settings(parts)) if v.name == kernel)
    fitting(variant, shape.sm)


@pytest.mark.parametrize("d", [577, 8192])
def test_the_norm_that_follows_fits(d: int) -> None:
    for sm, dtype in ((80, torch.bfloat16), (90, torch.bfloat16), (120, torch.float32)):
        made = [one for one in aot.variants(d, 16, dtype, sm, normed=True) if "norm" in one.name]
        assert sorted({one.name for one in made}) == ["norm", "norm_backward"]
        for one in made:
            fitting(one, sm)


def test_cards_that_share_their_ptx() -> None:
    (variant,) = (v for v in aot.Shape(64, 4096, "bfloat16", 80).variants() if v.name == "hidden_finish")
    for sm, of in aot.SAME_PTX.items():
        shared = aot.compile_for(variant, [of, sm])
        assert shared == [aot.compile_launch(variant, of), aot.compile_launch(variant, sm)]


def test_the_matrix_names_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    csv = tmp_path / "points.csv"
    point = ["-r", "16", "-d", "4096", "--dtype", "bfloat16", "--sm", "90", "--kernel", "hidden_finish"]
    assert aot.main([*point, "--csv", str(csv)]) == 0
    assert "1 compiled, 0 of them spill or do not fit" in capsys.readouterr().out
    assert csv.read_text().splitlines()[1].startswith(f"{triton.__version__},bfloat16,16,4096,90,1,")
    monkeypatch.setitem(aot.SHARED_LIMIT, 90, 100)
    assert aot.main(point) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("hidden_finish ")
    assert last.endswith("bytes of shared memory of 100")


@pytest.mark.parametrize(
    ("d", "r", "sm", "dtype", "parts"),
    [
        (4096, 64, 90, torch.bfloat16, {"residual": True, "scaled": True}),
        (4096, 64, 90, torch.bfloat16, {"norm": False}),
        (4096, 64, 80, torch.bfloat16, {"norm": False, "residual": True, "scaled": True}),
        (2048, 128, 100, torch.float16, {"norm": False, "residual": True}),
        (4096, 512, 86, torch.bfloat16, {"norm": False}),
        (4096, 256, 90, torch.bfloat16, {"residual": True, "scaled": True}),
        (577, 20, 90, torch.float32, {"norm": False, "residual": True, "scaled": True}),
        (4096, 64, 90, torch.bfloat16, {"gated": True, "dropped": True}),
        (4096, 64, 80, torch.bfloat16, {"routed": True, "gated": True, "dropped": True}),
    ],
    ids=str,
)
def test_what_is_not_plain_fits(d: int, r: int, sm: int, dtype: torch.dtype, parts: dict[str, bool]) -> None:
    plain = {launch.variant for launch in aot.variants(d, r, dtype, sm)}
    for variant in aot.variants(d, r, dtype, sm, **parts):
        if variant.variant in plain:  # such as the products of a split's columns
            continue
        c = fitting(variant, sm)
        if dtype != torch.float32 and c.kernel not in NO_PRODUCTS:
            assert c.wgmma + c.mma > 0, c


# Instructions per element of each loop with a product: d = 4096, r = 64, bf16, sm_90. NOTES.md has their history.
# Where the slice kernel has two, the first takes x unchanged, the second centers it, 32 rows at a time.
PER_ELEMENT = {
    "3.7": {
        "forward": [7.6, 16.1, 7.4],  # plain sums, shifted, y
        "forward_partial": [7.2, 20.6],
        "forward_finish": [8.0],
        "hidden": [3.4],
        "hidden_partial": [4.2],
        "slice dx g u": [19.4, 29.9],
        "slice x-free dx g u": [32.7],
    },
    "3.6": {
        "forward": [7.5, 17.0, 8.3],
        "forward_partial": [7.0, 21.3],
        "forward_finish": [8.6],
        "hidden": [3.2],
        "hidden_partial": [4.0],
        "slice dx g u": [22.2, 32.2],
        "slice x-free dx g u": [35.3],
    },
}


def test_the_loops_over_rows_and_columns_wait_for_no_load_and_stay_short() -> None:
    """In the machine code: every load of a loop that makes a product is asynchronous, and no loop grows by a tenth."""
    found = {}
    for variant in aot.variants(4096, 64, torch.bfloat16, 90):
        c, constants = aot.compile_launch(variant, 90), dict(variant.constants)
        loops = [loop for loop in c.loops if loop.wgmma + loop.mma]
        for loop in [*loops, *(loop for loop in c.loops if loop.async_loads)]:
            assert loop.plain_loads == 0, (c.kernel, loop)
        elements = [constants["BT"] * constants["BD"] for _ in loops]
        if c.kernel == "slice dx g u":
            elements[1] = 32 * constants["BD"]
        if loops:
            found[c.kernel] = [loop.per_element(n, c.warps) for loop, n in zip(loops, elements, strict=True)]
    expected = next((e for version, e in PER_ELEMENT.items() if triton.__version__.startswith(version)), None)
    assert set(found) == set(PER_ELEMENT["3.7"])
    if expected is None:
        pytest.skip(f"instructions were counted with Triton {' and '.join(PER_ELEMENT)}, not {triton.__version__}")
    for kernel, counts in found.items():
        assert len(counts) == len(expected[kernel]), kernel
        for count, was in zip(counts, expected[kernel], strict=True):
            assert count <= 1.1 * was, f"{kernel}: {count:.1f} instructions per element, was {was}"


SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, desc[UR4][R4.64] ;
.L_x_2:
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   LDG.E R2, desc[UR4][R4.64] ;
        /*0070*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0080*/              @!P2 BRA `(.L_x_3) ;
"""


def test_loops_are_read_from_machine_code() -> None:
    inner, last = sass.loops_of(SASS)  # the loop around the first is not innermost
    assert (inner.instructions, inner.plain_loads, inner.async_loads, inner.wgmma, inner.mma) == (3, 0, 1, 1, 0)
    assert (last.instructions, last.plain_loads, last.async_loads, last.wgmma, last.mma) == (3, 1, 0, 0, 1)
    assert last.per_element(elements=96, warps=4) == 4.0


@pytest.mark.parametrize("d", [256, 264, 269])
@pytest.mark.parametrize("x_free", [False, True])
def test_one_variant_whatever_the_rows_and_strides(d: int, x_free: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LAUNCH_BYTES", 0)  # columns are shared at this small d, too
    for module in (forward, hidden):
        monkeypatch.setattr(module, "column_split", tiles.column_split.__wrapped__)
    r = 20
    weights = make_weights(d, r)
    variants = defaultdict(set)
    base = torch.randn(5000, d + 16, dtype=torch.bfloat16)
    for x in (
        base[:1, :d],
        base[:16, 16:],
        base[:33, 3 : d + 3],
        base[:128, :d].contiguous(),
        base[::2, :d],
        base[:, :d],
    ):
        with aot.recorded_launches() as launches:
            cache.clear()
            _, z, mean, rstd = launch.adapter_forward(
                x, weights, None, eps=1e-5, activation="silu", compute=x.dtype, save=True
            )
            dy = x[:1].expand(x.shape)
            launch.adapter_backward(
                dy, x, z, mean, rstd, weights, None, activation="silu", needed=[True] * 7, x_free=x_free
            )
        for recorded in launches:
            variants[recorded.kernel.fn.__name__].add(recorded.variant)
    assert set(variants) == {
        "_prepare_kernel", "forward_kernel", "forward_partial_kernel", "forward_finish_kernel",
        "hidden_partial_kernel", "hidden_kernel", "slice_kernel", "reduce_kernel",
    }  # fmt: skip
    # hidden_kernel makes the product itself or adds up hidden_partial_kernel's.
    expected = {name: 2 if name == "hidden_kernel" else 1 for name in variants}
    assert {name: len(found) for name, found in variants.items()} == expected


def test_what_a_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton asks the device when it loads a kernel."""

    def load(self: JITFunction, *args: Any, **kwargs: Any) -> None:
        raise OutOfResources(131072, 65536, "shared memory")

    monkeypatch.setattr(JITFunction, "run", load)
    x, weights = torch.randn(4, 32), make_weights(32, 300)
    expected = (
        r"^down_weight: expected an r whose kernels fit into this GPU's 65536 bytes of shared memory, "
        r"got r = 300 in torch.float32, which takes 131072$"
    )
    with pytest.raises(ValueError, match=expected):
        launch.adapter_forward(x, weights, None, eps=1e-5, activation="silu", compute=x.dtype, save=True)
    z, stats = torch.randn(4, 300), torch.ones(4)
    with pytest.raises(ValueError, match=expected):
        launch.adapter_backward(
            x, x, z, stats, stats, weights, None, activation="silu", needed=[True] * 7, x_free=False
        )


def test_one_variant_however_many_rows_are_routed() -> None:
    """On meta tensors: the launchers know neither how many rows an adapter has nor where they are."""
    variants = defaultdict(set)
    for rows in (400, 1000, 4097, 8192):
        how = {"wide": True, "pdl": True, "rows": rows, "routed": True, "gated": True, "dropped": True}
        for recorded in aot.adapter_launches(4096, 64, torch.bfloat16, **how):
            variants[recorded.name].add(recorded.variant)
    assert "forward_partial" in variants
    assert {len(found) for found in variants.values()} == {1}


IR = """
  %b_x = ttg.local_alloc : () -> !ttg.memdesc<SLOTSx64x64xbf16, #shared, #smem, mutable>
  %0 = ttg.memdesc_index %b_x[%c0] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16>
  %1 = ttg.async_copy_global_to_local %p, %0 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
  %2 = ttg.memdesc_index %b_x[%c1] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16>
  %3 = ttg.async_copy_global_to_local %p, %2 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
  %4:2 = scf.for %i = %lo to %hi step %c1 iter_args(%acc = %zero) -> (tensor<64x64xf32>) {
    %5 = ttg.memdesc_index %b_x[%slot] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %6 = ttg.memdesc_trans %5 {order = array<i32: 1, 0>} : !ttg.memdesc<64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %7 = ttng.warp_group_dot %6, %b_a, %acc {isAsync = true} : !ttg.memdesc<64x64xbf16> -> tensor<64x64xf32>
    %8:2 = ttng.warp_group_dot_wait %7, %5 {pendings = LEFT : i32} : tensor<64x64xf32>
    %9 = ttg.memdesc_index %b_x[%next] : !ttg.memdesc<SLOTSx64x64xbf16> -> !ttg.memdesc<64x64xbf16>
    %10 = ttg.async_copy_global_to_local %p, %9 mask %m : tensor<64x64x!tt.ptr<bf16>> -> <64x64xbf16>
  }
"""


@pytest.mark.parametrize(("slots", "left", "safe"), [(2, 0, True), (2, 1, False), (3, 1, True), (4, 1, True)])
def test_a_load_into_the_memory_of_a_product_in_flight_is_found(slots: int, left: int, safe: bool) -> None:
    text = IR.replace("SLOTS", str(slots)).replace("LEFT", str(left))
    assert ttgir.refills(text) == ([] if safe else [ttgir.Refill("%b_x", 2, 2)])
