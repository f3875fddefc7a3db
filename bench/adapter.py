"""The adapter: forward, backward and both, against what PyTorch users write.

The floor is 2 units of T·d·(bytes per element) forward (read x, write y) and 3 backward (read x and dy, write dx).
FLOPs are those of the products: two forward and four backward, 2·T·d·r each. Parameters are fp32, except in the
variants of one dtype. A variant's error is the worst over y and all seven gradients, against autograd in fp64.
"""

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

import adapterkern as ak
from adapterkern.ops import choice
from adapterkern.ops.reference import Weights, adapter_eager
from bench import before
from bench.cases import Case, Variant, error_budget, relative_error
from bench.measure import kept_for_backward

PASSES = {"forward": (2, 4), "backward": (3, 8), "both": (5, 12)}  # units of floor traffic, FLOPs / (T·d·r)
ADAPTERS = 4  # in a grouped case
ROWS = (1, 128, 2048, 4225, 8449, 32768)  # on a GPU, besides the main shape's; two are just over a wave of tiles
COMPILER = os.environ.get("BENCH_COMPILER", "inductor")  # torch.compile's backend; a rehearsal uses a faster one
BARE, BEFORE = "ours bare", "ours before"  # the kernels of this and of an earlier commit, with the same host path
CLUSTERS = "ours by clusters"  # on a GPU, where they are not the default yet; the backward where it can


def cases(device: torch.device, quick: bool) -> list[Case]:
    """A main shape in every pass, then T, r, d and dtype varied one at a time."""
    gpu = device.type == "cuda"
    main = T, d, r, dtype = _main(device)
    made = [adapter_case(*main, pass_) for pass_ in (PASSES if gpu or not quick else ("both",))]
    if quick:
        return [*made, adapter_case(256, 1024, 64, dtype, "both")]
    passes = ("forward", "backward") if gpu else ("both",)
    for pass_ in passes:
        made += [adapter_case(t, d, r, dtype, pass_) for t in (ROWS if gpu else (256, 1024, 8192))]
        made += [adapter_case(T, d, rank, dtype, pass_) for rank in (16, 32, 128, 256)[:: 1 if gpu else 3]]
        made += [adapter_case(T, width, r, dtype, pass_) for width in ((2048, 8192) if gpu else (576,))]
    if gpu:
        made += [adapter_case(T, d, r, "float16", "both")]
    else:  # 768×576 is a batch of the demo
        made += [adapter_case(768, 576, r, kind, "both") for kind in (dtype, "float32")]
        made += [adapter_case(T, d, r, "float32", pass_) for pass_ in ("forward", "both")]
    return [*made, adapter_case(T, d, r, dtype, "both", grouped=True)]


def _main(device: torch.device) -> tuple[int, int, int, str]:
    """T, d, r and dtype of the main shape."""
    return 8192 if device.type == "cuda" else 2048, 4096, 64, "bfloat16"


def adapter_case(T: int, d: int, r: int, dtype: str, pass_: str, grouped: bool = False) -> Case:
    """The case of one shape and pass; ``grouped``: ADAPTERS adapters in one batch."""
    units, products = PASSES[pass_]
    name = f"{pass_}, T={T}, d={d}, r={r}, {dtype}" + (f", {ADAPTERS} adapters mixed" if grouped else "")
    shape = {"T": T, "d": d, "r": r, "dtype": dtype, "pass": pass_, "grouped": grouped}
    itemsize = getattr(torch, dtype).itemsize
    return Case("adapter", name, shape, units * T * d * itemsize, products * T * d * r)


def names(case: Case, device: torch.device) -> list[str]:
    """The names of the case's variants, the baseline first."""
    if case.shape["grouped"]:
        return ["loop over adapters", "ours grouped"]
    low = ["eager autocast", "eager pure"] if case.shape["dtype"] != "float32" else ["eager"]
    more = ["Liger LayerNorm + linears"] if device.type == "cuda" else []
    # Autotuning takes longer than everything else of a case.
    if more and tuple(case.shape[k] for k in ("T", "d", "r", "dtype")) == _main(device):
        more.insert(0, "torch.compile max-autotune")
    clusters = [CLUSTERS] if device.type == "cuda" and case.shape["dtype"] == "bfloat16" else []
    return [*low, "torch.compile", *more, "ours", "ours x-free", *clusters]


@dataclass(frozen=True)
class Way:
    """One way to compute the adapter: a function of x and of these parameters."""

    call: Callable[[Tensor, Weights], Tensor]
    weights: Weights


def make_inputs(
    T: int, d: int, r: int, dtype: torch.dtype, device: torch.device, n: tuple[int, ...] = ()
) -> tuple[list[tuple[Tensor, Tensor]], Weights]:
    """(x, dy) for each call of a round, and fp32 parameters of shape ``n`` + their own.

    On a GPU each call has its own inputs, together more than fits into L2.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, generator=generator)

    sets = max(2, min(8, 2**30 // (T * d * dtype.itemsize))) if device.type == "cuda" else 1
    inputs = [(draw(T, d).to(dtype).requires_grad_(), draw(T, d).to(dtype)) for _ in range(sets)]
    sizes: tuple[tuple[int, ...], ...] = ((d,), (d,), (r, d), (r,), (d, r), (d,))
    return inputs, Weights(*(draw(*n, *s).div_(s[-1] ** 0.5).requires_grad_() for s in sizes))


def build(case: Case, device: torch.device, wanted: Sequence[str]) -> list[Variant]:
    """The variants ``wanted`` of ``case``, ready to run, with their errors measured."""
    torch._functorch.config.donated_buffer = False  # a retained graph is run again
    torch._dynamo.config.recompile_limit = 64  # beyond it, torch.compile silently runs eager code
    T, d, r, pass_ = (case.shape[k] for k in ("T", "d", "r", "pass"))
    dtype, grouped = getattr(torch, case.shape["dtype"]), case.shape["grouped"]
    inputs, weights = make_inputs(T, d, r, dtype, device, (ADAPTERS,) if grouped else ())
    index = torch.arange(T, device=device) * ADAPTERS // T if grouped else None

    ways = _ways(wanted, weights, dtype, index)
    stock = _stock(index)
    oracle = _results(Way(stock, _cast(weights, torch.float64)), *(t.double() for t in inputs[0]))
    eager = _errors(Way(stock, _cast(weights, dtype)), inputs[0], oracle)
    budgets = [error_budget(e, dtype) for e in eager]

    def made(name: str, way: Way) -> Variant:
        errors = _errors(way, inputs[0], oracle)
        # of the tensor that is closest to its budget, or farthest above it
        error, budget = max(zip(errors, budgets, strict=True), key=lambda pair: pair[0] / pair[1])
        return Variant(name, _runner(way, inputs, pass_), error, budget, _kept(way, inputs[0][0]))

    variants = []
    for name in wanted:
        way = ways[name]
        if isinstance(way, str):
            variants.append(Variant(name, missing=way))
            continue
        try:
            variants.append(made(name, way))
        except Exception as error:
            variants.append(Variant.broken(name, error))
    return variants


def kept(case: Case, device: torch.device) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield each variant's name and what it keeps for its backward."""
    dtype = getattr(torch, case.shape["dtype"])
    inputs, weights = make_inputs(case.shape["T"], case.shape["d"], case.shape["r"], dtype, device)
    for name, way in _ways(names(case, device), weights, dtype, None).items():
        if isinstance(way, Way):
            way.call(inputs[0][0], way.weights)  # prepares and compiles what later calls reuse
            yield name, _kept(way, inputs[0][0])


def _kept(way: Way, x: Tensor) -> dict[str, int]:
    return kept_for_backward(lambda: way.call(x, way.weights), way.weights, x)


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return Weights(*(w.detach().to(dtype).requires_grad_() for w in weights))


def _stock(index: Tensor | None) -> Callable[[Tensor, Weights], Tensor]:
    return lambda x, w: ak.adapter(x, *w, fused=False, index=index)


def _ways(wanted: Sequence[str], weights: Weights, dtype: torch.dtype, index: Tensor | None) -> dict[str, Way | str]:
    """Each of ``wanted``, or why it is missing; ``ours bare [slice_tiles=64,128,8,3]`` uses these tiles."""
    low = _cast(weights, dtype)

    def autocast(function: Callable[[Tensor, Weights], Tensor]) -> Callable[[Tensor, Weights], Tensor]:
        def call(x: Tensor, w: Weights) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                return function(x, w)

        return call

    def compiled(mode: str | None) -> Callable[[Tensor, Weights], Tensor]:
        return torch.compile(adapter_eager, mode=mode, dynamic=False, backend=COMPILER)

    ways: dict[str, Way | str] = {
        "loop over adapters": Way(_stock(index), weights),
        "ours grouped": Way(lambda x, w: ak.adapter(x, *w, index=index), weights),
        "eager": Way(adapter_eager, weights),
        "eager autocast": Way(autocast(adapter_eager), weights),
        "eager pure": Way(adapter_eager, low),
        "torch.compile": Way(compiled(None), low),
        # without CUDA graphs: the host's time is kept out of all variants in another way
        "torch.compile max-autotune": Way(compiled("max-autotune-no-cudagraphs"), low),
        "ours": Way(lambda x, w: ak.adapter(x, *w), weights),
        "ours x-free": Way(lambda x, w: ak.adapter(x, *w, x_free=True), weights),
    }
    if CLUSTERS in wanted:
        ways[CLUSTERS] = _no_clusters(weights) or Way(_by_clusters, weights)
    liger = importlib.util.find_spec("liger_kernel") is not None
    ways["Liger LayerNorm + linears"] = Way(_liger, low) if liger else "liger-kernel is not installed"
    for name in wanted:
        if name.startswith((BARE, BEFORE)):
            found = _launch(name)
            ways[name] = before.missing() if found is None else Way(before.through(found), weights)
    return {name: ways[name] for name in wanted}


@contextmanager
def _clusters() -> Iterator[None]:
    asked, choice.runs_clusters = choice.runs_clusters, lambda device: True  # type: ignore[assignment]
    try:
        yield
    finally:
        choice.runs_clusters = asked


def _by_clusters(x: Tensor, w: Weights) -> Tensor:
    with _clusters():
        y = ak.adapter(x, *w)
    if y.grad_fn is not None:  # the backward runs later
        around = ExitStack()
        y.grad_fn.register_prehook(lambda grads: around.enter_context(_clusters()))
        y.grad_fn.register_hook(lambda inputs, outputs: around.close())
    return y


def _no_clusters(weights: Weights) -> str:
    """Why no clusters can run; nothing if they can."""
    device = weights.down_weight.device
    if device.type != "cuda":
        return "a CPU has no clusters"
    from adapterkern.ops.kernels.clusters import Pass, capacity
    from adapterkern.ops.kernels.weights import padded_adapter_dim

    r, d = weights.down_weight.shape[-2:]
    return capacity(Pass.FORWARD, padded_adapter_dim(r), d, device)[1]


def _launch(name: str) -> Any:
    if name == BEFORE:
        return before.launch()
    from bench import tiling  # needs Triton, which the other variants do not

    tiles = name.removeprefix(BARE).strip(" []")
    return tiling.tiled_launch(*tiling.parse(tiles)) if tiles else tiling.launch


def _liger(x: Tensor, w: Weights) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    normed = LigerLayerNormFunction.apply(x, w.norm_weight, w.norm_bias, 1e-5)
    return x + F.linear(F.silu(F.linear(normed, w.down_weight, w.down_bias)), w.up_weight, w.up_bias)


def _results(way: Way, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = way.call(x, way.weights)
    return [y, *torch.autograd.grad(y, [x, *way.weights], dy)]


def _errors(way: Way, inputs: tuple[Tensor, Tensor], oracle: list[Tensor]) -> list[float]:
    return [relative_error(got, e) for got, e in zip(_results(way, *inputs), oracle, strict=True)]


def _runner(way: Way, inputs: list[tuple[Tensor, Tensor]], pass_: str) -> Callable[[], object]:
    if pass_ == "forward":
        turn = itertools.cycle(inputs)
        return lambda: way.call(next(turn)[0], way.weights)
    if pass_ == "both":
        turn = itertools.cycle(inputs)
        return lambda: _results(way, *next(turn))
    graphs = itertools.cycle([(way.call(x, way.weights), x, dy) for x, dy in inputs])

    def backward() -> object:
        y, x, dy = next(graphs)
        return torch.autograd.grad(y, [x, *way.weights], dy, retain_graph=True)

    return backward
