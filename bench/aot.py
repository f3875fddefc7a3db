"""Ahead-of-time compilation of the kernels, without a GPU: registers, shared memory, tensor-core instructions.

The launchers run on meta tensors, with Triton's launch replaced by a recorder. So what is compiled is what a GPU would
compile: the same kernels, signatures, constants and block sizes, for every shape in the matrix and every architecture.

A variant that several shapes, dtypes or cards share is compiled once. Of the hidden sizes only divisibility matters:
4096 stands for all multiples of 128 (the columns that weights are padded to), 576 for those of 8, 577 for odd ones.
"""

import argparse
import itertools
import json
import multiprocessing
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from adapterkern.ops.kernels.backward import Needed, backward
from adapterkern.ops.kernels.dropout import dropout
from adapterkern.ops.kernels.forward import forward
from adapterkern.ops.kernels.norm import Following, norm_backward
from adapterkern.ops.kernels.tiles import forward_tiles, hidden_tiles, slice_tiles
from adapterkern.ops.kernels.weights import padded_adapter_dim, prepare, scale_of
from bench import sass, ttgir

ADAPTER_DIMS = (8, 16, 32, 64, 128, 256, 512)
HIDDEN_SIZES = (576, 577, 4096)
# Dtypes of x and of the products, and the precision of fp32 products.
DTYPES = {
    "bfloat16": (torch.bfloat16, torch.bfloat16, "ieee"),
    "float16": (torch.float16, torch.float16, "ieee"),
    "float32": (torch.float32, torch.float32, "ieee"),
    "tf32": (torch.float32, torch.float32, "tf32"),
    "float32-bfloat16": (torch.float32, torch.bfloat16, "ieee"),  # an fp32 backbone under autocast
    "float32-float16": (torch.float32, torch.float16, "ieee"),
}
# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {
    80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024,
}  # fmt: skip
# What is not plain about an adapter, as ``adapter_launches`` takes it.
PARTS = {
    "no-norm": {"norm": False},
    "residual": {"residual": True},
    "scale": {"scaled": True},
    "gate": {"gated": True},
    "dropout": {"dropped": True},
    "routed": {"routed": True},
    "next-norm": {"normed": True},
}
# Triton makes the same PTX for these as for sm_80, but for the line that names the card.
SAME_PTX = {86: 80, 89: 80}
SMS = 132
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def settings(parts: Iterable[str]) -> dict[str, bool]:
    """What ``parts``, of ``PARTS``, are together."""
    return {name: value for part in parts for name, value in PARTS[part].items()}


@dataclass(frozen=True)
class Launch:
    """One recorded launch, as the compiler sees it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def variant(self) -> tuple[Any, ...]:
        """What identifies a compiled variant: everything but the grid."""
        return (self.kernel.fn.__name__, self.signature, self.constants, self.aligned, self.options)

    @property
    def name(self) -> str:
        """The kernel, and which of its options are on."""
        constants = dict(self.constants)
        marks = ["x-free"] if constants.get("X_FREE") else []
        if self.kernel.fn.__name__ == "slice_kernel":
            marks += [p for p in ("dx", "g", "u") if f"p_{p}" not in constants]
        name = self.kernel.fn.__name__.removesuffix("_kernel").lstrip("_")
        if name == "hidden" and "p_dh" not in constants:
            name = "hidden_finish"  # adds up the products of hidden_partial
        return " ".join([name, *marks])


def _describe(kernel: JITFunction, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg", "launch_pdl") if k in kwargs}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = {}, {}, []
    for i, p in enumerate(kernel.params):
        v = values[p.name]
        specialise = not p.do_not_specialize
        if p.is_constexpr or v is None:
            signature[p.name], constants[p.name] = "constexpr", v
        elif isinstance(v, torch.Tensor):
            signature[p.name] = "*" + _TYPES[v.dtype]
            if not p.do_not_specialize_on_alignment and v.data_ptr() % 16 == 0:
                aligned.append(i)
        elif isinstance(v, float):
            signature[p.name] = "fp32"
        elif specialise and v == 1:
            signature[p.name], constants[p.name] = "constexpr", 1
        else:
            signature[p.name] = "i32" if -(2**31) <= v < 2**31 else "i64"
            if specialise and v % 16 == 0:
                aligned.append(i)
    return Launch(
        kernel, grid, tuple(signature.items()), tuple(constants.items()), tuple(aligned), tuple(sorted(options.items()))
    )


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Inside the block, a launch neither compiles nor runs, but is added to the list."""
    launches: list[Launch] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        launches.append(_describe(self, tuple(grid), args, kwargs))

    with mock.patch.object(JITFunction, "run", record):
        yield launches


def adapter_launches(
    d: int,
    r: int,
    dtype: torch.dtype,
    *,
    wide: bool,
    pdl: bool,
    rows: int = 8192,
    x_free: bool = False,
    compute: torch.dtype | None = None,
    precision: str = "ieee",
    norm: bool = True,
    residual: bool = False,
    scaled: bool = False,
    gated: bool = False,
    dropped: bool = False,
    routed: bool = False,
    normed: bool = False,
) -> list[Launch]:
    """Every launch of one forward and backward with fp32 parameters, including the weight preparation.

    ``dtype`` is that of x, and unless ``compute`` is given that of the products. ``scaled``: by a learned scale;
    ``gated``: by a learned weight of each row; ``dropped``: h has dropout; ``routed``: each row has one of 8 adapters;
    ``normed``: an RMSNorm follows.
    """
    sizes = ((d,), (d,), (r, d), (r,), (d, r), (d,), *([(1,)] if scaled else []))
    params: list[Any] = [torch.empty(((8,) if routed else ()) + size, device="meta") for size in sizes]
    if not norm:
        params[:2] = None, None
    x = torch.empty(rows, d, dtype=dtype, device="meta")
    R, vec = padded_adapter_dim(r), 16 // dtype.itemsize if d % (16 // dtype.itemsize) == 0 else 1
    common: dict[str, Any] = {"activation": "silu", "precision": precision, "vec": vec, "sms": SMS, "pdl": pdl}
    compute = compute or dtype
    forward_with, hidden_with, slice_with = (
        table(compute.itemsize, R, wide) for table in (forward_tiles, hidden_tiles, slice_tiles)
    )
    with recorded_launches() as launches:
        prepared = prepare(params, compute)
        base = torch.empty_like(x) if residual else None
        common["gate"] = x.new_empty(rows, dtype=torch.float32) if gated else None
        common["drop"] = dropout(0.1, torch.empty(1, dtype=torch.int64, device="meta") if dropped else None)
        index = torch.empty(rows, dtype=torch.int64, device="meta") if routed else None
        how: dict[str, Any] = {"r": r, "eps": 1e-5, "save": True, "tiles": forward_with, "residual": base}
        if normed:
            rho = x.new_empty(rows, dtype=torch.float32)
            how["following"] = Following(x.new_empty(d, dtype=torch.float32), x, rho, 1e-6)
        y, z, mean, rstd = forward(x, index, prepared, **how, **common)
        assert z is not None
        none = x.new_empty(0)
        if normed:
            norm_backward(x, y, rho, how["following"].weight, pdl=pdl)
        backward(
            x, x, index, z, none if mean is None else mean, none if rstd is None else rstd, prepared, params,
            needed=Needed(True, norm, norm, True, True, True, True, scaled, gated), x_free=x_free, residual=residual,
            scale=scale_of(params, 1.0), row_tiles=hidden_with, tiles=slice_with, **common,
        )  # fmt: skip
    return launches


def variants(
    d: int,
    r: int,
    dtype: torch.dtype,
    sm: int,
    compute: torch.dtype | None = None,
    precision: str = "ieee",
    **parts: bool,
) -> list[Launch]:
    """One launch per variant that ``sm`` runs for this shape: fused and split forward, backward x-free or not.

    ``parts`` are ``norm``, ``residual`` (which has no x-free backward) and the others of ``adapter_launches``.
    """
    how: dict[str, Any] = {"wide": sm // 10 in (9, 10), "pdl": sm >= 90, "compute": compute}
    how |= {"precision": precision, **parts}
    few = 512 if parts.get("routed") else 16  # rows that are routed are sorted only from some tens on
    launches = adapter_launches(d, r, dtype, **how) + adapter_launches(d, r, dtype, rows=few, **how)
    launches += [] if parts.get("residual") else adapter_launches(d, r, dtype, x_free=True, **how)
    return list({launch.variant: launch for launch in launches}.values())


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for one architecture."""

    kernel: str
    sm: int
    registers: int
    stack: int
    shared: int
    warps: int
    wgmma: int
    mma: int
    cp_async: int
    loops: list[sass.Loop]
    refills: list[ttgir.Refill]


def compile_launch(launch: Launch, sm: int) -> Compiled:
    """Compile one launch for compute capability ``sm``. A ``stack`` above 0 means spills."""
    (compiled,) = compile_for(launch, [sm])
    return compiled


def compile_for(launch: Launch, sms: Iterable[int], loops: bool = True) -> list[Compiled]:
    """Compile one launch for cards that run the same PTX; ``loops``: also read those of sm_90."""
    first, *others = sms
    source = ASTSource(
        launch.kernel,
        dict(launch.signature),
        {(launch.kernel.arg_names.index(k),): v for k, v in launch.constants},
        {(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    out = triton.compile(source, target=GPUTarget("cuda", first, 32), options=dict(launch.options))
    ptx = out.asm["ptx"]
    cubins = {first: out.asm["cubin"]} | {sm: _assembled(ptx, first, sm, launch.options) for sm in others}
    return [
        Compiled(
            launch.name,
            sm,
            *sass.usage(cubin),
            shared=out.metadata.shared,
            warps=out.metadata.num_warps,
            wgmma=ptx.count("wgmma.mma_async"),
            mma=ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
            cp_async=len(re.findall(r"cp\.async\.(?:cg|ca)\.shared", ptx)),
            loops=sass.loops(cubin) if loops and sm == 90 else [],
            refills=ttgir.refills(out.asm["ttgir"]),
        )
        for sm, cubin in cubins.items()
    ]


def _assembled(ptx: str, made_for: int, sm: int, options: Iterable[tuple[str, int]]) -> bytes:
    """The cubin for ``sm`` of PTX that was made for another card."""
    backend = make_backend(GPUTarget("cuda", sm, 32))
    source = ptx.replace(f".target sm_{made_for}", f".target sm_{sm}")
    cubin: bytes = backend.make_cubin(source, {}, backend.parse_options(dict(options)), sm)
    return cubin


@dataclass(frozen=True)
class Shape:
    """A point of the matrix."""

    r: int
    d: int
    dtype: str
    sm: int

    def variants(self, **parts: bool) -> list[Launch]:
        """One launch per variant of this point."""
        x, compute, precision = DTYPES[self.dtype]
        return variants(self.d, self.r, x, self.sm, compute, precision, **parts)


def matrix(shapes: Iterable[Shape], kernel: str = "", **parts: bool) -> list[tuple[Launch, dict[int, Shape]]]:
    """Every distinct variant whose kernel's name contains ``kernel``, and the first point that has it, by card."""
    found: dict[tuple[Any, ...], tuple[Launch, dict[int, Shape]]] = {}
    for shape in shapes:
        for launch in shape.variants(**parts):
            if kernel in launch.name:
                key = (SAME_PTX.get(shape.sm, shape.sm), launch.variant)
                found.setdefault(key, (launch, {}))[1].setdefault(shape.sm, shape)
    return list(found.values())


_work: list[tuple[Launch, dict[int, Shape]]] = []  # of a pool: its processes inherit it


def _rows(i: int) -> list[dict[str, Any]]:
    launch, shapes = _work[i]
    compiled = compile_for(launch, shapes, loops=False)
    return [asdict(shape) | asdict(c) for shape, c in zip(shapes.values(), compiled, strict=True)]


def fault(row: dict[str, Any]) -> str:
    """What is wrong with a compiled variant; empty if nothing is."""
    faults = [f"spills {row['stack']} bytes"] * bool(row["stack"])
    if row["shared"] > (limit := SHARED_LIMIT[row["sm"]]):
        faults.append(f"takes {row['shared']} bytes of shared memory of {limit}")
    faults += ["overwrites an operand in use"] * bool(row["refills"])
    return ", ".join(faults)


def main(argv: list[str]) -> int:
    """``python -m bench aot``: compile the matrix and print it; 1 if a variant spills or does not fit."""
    parser = argparse.ArgumentParser(prog="python -m bench aot", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--csv", type=Path, help="write a line per point to this file: the most of its variants")
    parser.add_argument("-r", type=int, nargs="+", default=ADAPTER_DIMS)
    parser.add_argument("-d", type=int, nargs="+", default=HIDDEN_SIZES)
    parser.add_argument("--sm", type=int, nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of x, and after a dash of the products"
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=[], help="what is not plain about the adapter")
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    args = parser.parse_args(argv)

    points = itertools.product(args.r, args.d, args.dtype, args.sm)
    _work[:] = matrix(itertools.starmap(Shape, points), args.kernel, **settings(args.part))
    rows: list[dict[str, Any]] = []
    print(f"triton {triton.__version__}, {len(_work)} variants", flush=True)
    print(
        f"{'kernel':<23} {'r':>4} {'d':>5} {'dtype':<16} {'sm':>3} registers stack  shared warps wgmma   mma cp.async"
    )
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        for made in pool.imap(_rows, range(len(_work))):
            for row in made:
                rows.append(row)
                line = _line(row)
                print(f"{line}  <- {wrong}" if (wrong := fault(row)) else line, flush=True)
    faults = [(row, wrong) for row in rows if (wrong := fault(row))]
    print(f"{len(rows)} compiled, {len(faults)} of them spill or do not fit")
    for row, wrong in faults:
        print(f"{_line(row)}  {wrong}")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "rows": rows}, indent=1))
    if args.csv:
        args.csv.write_text("".join(f"{line}\n" for line in _by_point(rows)))
    return int(bool(faults))


def _by_point(rows: list[dict[str, Any]]) -> Iterator[str]:
    """CSV: of each point, and of the variants that no point before it has, how many and the most that one takes."""
    yield "triton,dtype,r,d,sm,variants,registers,stack,shared"
    points: dict[Shape, list[dict[str, Any]]] = {}
    for row in rows:
        points.setdefault(Shape(row["r"], row["d"], row["dtype"], row["sm"]), []).append(row)
    for p, of in points.items():
        most = ",".join(str(max(row[key] for row in of)) for key in ("registers", "stack", "shared"))
        yield f"{triton.__version__},{p.dtype},{p.r},{p.d},{p.sm},{len(of)},{most}"


def _line(row: dict[str, Any]) -> str:
    names = f"{row['kernel']:<23} {row['r']:>4} {row['d']:>5} {row['dtype']:<16} {row['sm']:>3}"
    widths = {"registers": 9, "stack": 5, "shared": 7, "warps": 5, "wgmma": 5, "mma": 5, "cp_async": 8}
    return " ".join([names, *(f"{row[key]:>{width}}" for key, width in widths.items())])
