"""Which kernel variants ``first``, ``second`` and ``cost`` launch, found without a GPU.

The launchers run on fake CUDA tensors, so every decision (tiles, splits, alignment, options of a launch) is that of a
GPU with 132 multiprocessors. Triton's own binder makes signature and options; a list replaces its compiler.
"""

import contextlib
import dataclasses
import types
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from adapterkern.ops.kernels import launch
from adapterkern.ops.reference import ACTIVATIONS
from bench import before, llama_step, tiling
from bench.adapter import ROWS
from bench.cost import of_7b
from bench.gpu.check import SHAPES
from bench.sweep import candidates

TARGET = GPUTarget("cuda", 90, 32)
MULTIPROCESSORS = 132
ALL, NOT_X, ONLY_X = (True,) * 7, (False, *(True,) * 6), (True, *(False,) * 6)
SWEPT = (64, 128, 16, 256)
LOW = ("bfloat16", "float16", "float32")
TEST_SHAPES = ((1, 4096, 64), (37, 576, 16), (129, 577, 59), (9000, 2048, 32), (300, 5120, 128), (520, 1024, 256),
               (70, 300, 512))  # fmt: skip
CLUSTER_SHAPES = ((64, 4096, 64), (300, 4096, 128), (500, 3072, 59), (300, 5120, 64), (70, 8192, 20),
                  (9000, 576, 16), (9000, 3072, 59))  # fmt: skip
MIXED_SHAPES = ((1, 4096, 64), (129, 577, 59), (1000, 1024, 64), (300, 5120, 128))


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the adapter, forward and, unless ``needed`` is None, backward."""

    T: int
    d: int
    r: int
    dtype: str = "bfloat16"
    activation: str = "silu"
    x_free: bool = False
    needed: tuple[bool, ...] | None = ALL
    sequences: int = 0  # of a call with an index; 0: no index
    tf32: bool = False
    compute: str = ""  # of the products; "": x's dtype
    tiles: str = ""  # as `tiling.parse` reads them; such a variant may not compile


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What Triton would compile for a launch."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    optional: bool


def headline() -> list[Call]:
    """The adapter bench at the main shape and at other numbers of rows."""
    return [Call(T, 4096, 64) for T in (8192, *ROWS)]


def sanitized() -> list[Call]:
    """What compute-sanitizer checks: one odd shape, every activation, mixed adapters."""
    odd = (129, 577, 59)
    calls = [Call(*odd, dtype, x_free=x_free) for dtype in LOW for x_free in (False, True)]
    return [*calls, *(Call(200, 512, 64, activation=a) for a in ACTIVATIONS), Call(600, 512, 32, sequences=6)]


def tests() -> list[Call]:
    """What tests/ops/test_gpu.py launches, and the backwards of test_gpu_clusters.py."""
    calls = [Call(1000, 1024, 64, dtype) for dtype in LOW]
    calls += [Call(*shape) for shape in CLUSTER_SHAPES]
    calls += [Call(*shape, dtype, x_free=x_free) for shape in TEST_SHAPES for dtype in LOW for x_free in (False, True)]
    calls += [
        Call(*shape, "float32", x_free=x_free, compute=compute)
        for shape in MIXED_SHAPES for compute in LOW[:2] for x_free in (False, True)
    ]  # fmt: skip
    calls += [Call(300, 1024, 64, "float32", tf32=tf32, needed=None) for tf32 in (False, True)]
    calls += [Call(5000, 1024, 64), Call(3000, 1024, 64), Call(300, 512, 32), Call(200, 512, 32, needed=NOT_X)]
    calls += [Call(2**19 + 100, 4096, 16, needed=None), Call(20000, 1280, 48, needed=None)]
    calls += [Call(T, 512, 32, needed=needed) for T in (200, 300) for needed in (None, ONLY_X)]  # frozen weights
    calls += [Call(400, 256, 16, dtype, needed=n) for dtype in ("bfloat16", "float32") for n in (ALL, NOT_X)]
    return [*calls, *sanitized()]


def steps() -> list[Call]:
    """The training step's calls: the first adapter's x needs no gradient."""
    return [Call(T, 4096, 64, needed=n) for T in (4096, 1304) for n in (ALL, NOT_X)]


def cost() -> list[Call]:
    """The calls of every iteration whose cost is measured."""
    shapes = [llama_step.StepSpec(**case.shape) for case in of_7b(torch.device("cuda"))]
    return [Call(s.tokens, s.hidden_size, s.adapter_dim, needed=n) for s in shapes for n in (ALL, NOT_X)]


def swept() -> list[Call]:
    """The sweep's candidates."""
    return [
        Call(8192, 4096, r, tiles=f"{kernel}={t.BT},{t.BD},{t.num_warps},{t.num_stages}")
        for r in SWEPT
        for kernel in tiling.TABLES
        for t in candidates(kernel, r)
    ]


def of_call(name: str, tiles: Iterable[str] = ()) -> list[tuple[Any, list[Call]]]:
    """(a generation's ``launch``, its calls) for ``first``, ``second`` or ``cost``, with the A/B's ``tiles``."""
    if name == "cost":
        return [(launch, cost())]
    calls = [*headline(), *steps(), *tests()] if name == "first" else [*headline(), *swept(), *sanitized()]
    calls += [Call(T, 4096, 64, tiles=t) for t in tiles for T in (8192, *ROWS)]
    old = before.launch()
    compared = [*headline(), *(Call(*shape) for shape in SHAPES)]
    return [(launch, [*calls, *compared]), *([(old, compared)] if old is not None else [])]


def compilations(work: Iterable[tuple[Any, Iterable[Call]]]) -> list[Compilation]:
    """Every variant once, in the order of the first launch."""
    found: dict[tuple[Any, ...], Compilation] = {}
    with _standing_in(found) as optional:
        for generation, calls in work:
            for call in calls:
                optional[0] = bool(call.tiles)
                _run(generation, call)
    return list(found.values())


class _Driver:
    """A driver that only knows the target."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def _standing_in(found: dict[tuple[Any, ...], Compilation]) -> Iterator[list[bool]]:
    """Inside the block, tensors on "cuda" are fake, and a launch is added to ``found`` instead of compiled."""
    optional = [False]

    def listed(self, key, signature, device, constants, options, attributes, warmup):  # type: ignore[no-untyped-def]
        made = Compilation(self, signature, constants, attributes, options.__dict__, optional[0])
        known = found.setdefault((self, key), made)
        if known.optional and not optional[0]:
            found[self, key] = made

    properties = types.SimpleNamespace(multi_processor_count=MULTIPROCESSORS, major=9, minor=0)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch.cuda, "is_available", lambda: False),  # fake tensors would initialize a GPU
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_properties", lambda device=None: properties),
            (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
            (FakeTensor, "data_ptr", lambda self: 0),  # aligned, as the allocator's are
            (JITFunction, "_do_compile", listed),
            (driver, "_active", _Driver()),
        ):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(torch.no_grad())
        yield optional


def _run(generation: Any, call: Call) -> None:
    """One call of a generation's launchers."""
    with contextlib.ExitStack() as stack:
        if call.tiles:
            stack.enter_context(tiling.replaced(*tiling.parse(call.tiles)))
        tf32 = torch.backends.cuda.matmul.allow_tf32
        stack.callback(setattr, torch.backends.cuda.matmul, "allow_tf32", tf32)
        torch.backends.cuda.matmul.allow_tf32 = call.tf32
        _launch(generation, call)


def _launch(generation: Any, call: Call) -> None:
    d, r, dtype = call.d, call.r, getattr(torch, call.dtype)
    n = (3,) if call.sequences else ()
    weights = [torch.empty(*n, *size, device="cuda") for size in ((d,), (d,), (r, d), (r,), (d, r), (d,))]
    x = torch.empty(call.T, d, device="cuda", dtype=dtype)
    index = torch.empty(call.sequences, dtype=torch.int64, device="cuda") if call.sequences else None
    how = {"eps": 1e-5, "activation": call.activation, "save": call.needed is not None}
    how["compute"] = getattr(torch, call.compute or call.dtype)
    _, *saved = generation.adapter_forward(x, weights, index, **how)
    if call.needed is not None:
        generation.adapter_backward(
            x, x, *saved, weights, index, activation=call.activation, needed=call.needed, x_free=call.x_free
        )
