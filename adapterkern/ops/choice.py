"""Which implementation of the adapter runs, and why.

eager         ``reference.adapter_eager``, around the operator: ``fused=False``, ``ADAPTERKERN_FUSED=0``, inputs on
              a CPU that are too small for the operator to pay, forward-mode AD and torch.func's transforms
Triton        kernels/: CUDA tensors, and under ``TRITON_INTERPRET=1`` CPU tensors
clusters      kernels/clusters.py: a second generation of some of the Triton kernels, in CUDA, where it is asked for or
              has been seen right and faster
native        native.py: other CPU tensors, where the extension has kernels for the machine
closed form   closed_form.py: where it has none, and on any device fp64, which no kernels have
"""

import importlib.util
import logging
import os
from functools import cache

import torch
from torch import Tensor
from torch.autograd import forward_ad

from adapterkern.checks import switch
from adapterkern.ops import native

logger = logging.getLogger(__name__)

# Triton reads the variable when the kernels are imported, once per process.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

EAGER = "eager PyTorch"
NATIVE = "native CPU kernels"
CLOSED_FORM = "closed form in PyTorch operations"
TRITON = "Triton kernels"
TRITON_INTERPRETED = "Triton kernels in the interpreter"
CLUSTERS = "CUDA kernels by clusters, Triton kernels for the rest"

# By a card's name: the result under bench/results that shows both kernels by clusters right and faster there.
CLUSTERS_PROVEN: dict[str, str] = {}


def fused_enabled() -> bool:
    """False when ``ADAPTERKERN_FUSED=0`` in the environment turns every fused path off, for bisecting.

    Raises:
        ValueError: ``ADAPTERKERN_FUSED`` is neither 0 nor 1.
    """
    return switch("ADAPTERKERN_FUSED")


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """The implementation that a fused adapter on ``device`` with x of ``dtype`` runs, and why: (name, reason)."""
    kind = torch.device(device).type
    if not fused_enabled():
        return EAGER, "ADAPTERKERN_FUSED=0 is set"
    if dtype == torch.float64:
        return CLOSED_FORM, "the kernels have no fp64"
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return CLOSED_FORM, "triton is not installed"
        by_clusters, why = clusters(torch.device(device))
        return (CLUSTERS, why) if by_clusters else (TRITON, f"it is a GPU; no kernels by clusters: {why}")
    if INTERPRETED:
        return TRITON_INTERPRETED, "TRITON_INTERPRET=1 is set"
    if kind == "cpu":
        name, reason = native.instruction_set()
        if name is not None:
            return NATIVE, f"{name}, {reason}; small inputs run as {EAGER}"
        return CLOSED_FORM, f"{reason}; small inputs run as {EAGER}"
    return CLOSED_FORM, "it is not a GPU"


def kernels_asked() -> str | None:
    """The generation of GPU kernels that ``ADAPTERKERN_KERNELS`` asks for; None: the best that has been proven.

    Raises:
        ValueError: it is neither triton nor cluster.
    """
    asked = os.environ.get("ADAPTERKERN_KERNELS") or None
    if asked not in (None, "triton", "cluster"):
        raise ValueError(f"ADAPTERKERN_KERNELS: expected triton or cluster, got {asked!r}")
    return asked


def clusters(device: torch.device) -> tuple[bool, str]:
    """Whether forward and backward on a GPU run by clusters where they can, and why."""
    asked = kernels_asked()
    if asked == "triton":
        return False, "ADAPTERKERN_KERNELS=triton is set"
    asks_card = CLUSTERS_PROVEN and torch.cuda.is_available()
    proof = CLUSTERS_PROVEN.get(torch.cuda.get_device_name(device)) if asks_card else None
    if asked is None and proof is None:
        return False, "no card has shown it right and faster (ADAPTERKERN_KERNELS=cluster tries it)"
    from adapterkern.ops.kernels.clusters import Pass, capacity  # Triton takes a third of a second to import

    for kernel in Pass:
        found, why_not = capacity(kernel, 64, 4096, device)
        if not found:
            return False, f"{kernel.name.lower()}: {why_not}"
    return True, "ADAPTERKERN_KERNELS=cluster is set" if asked else f"bench/results/{proof}"


@cache
def runs_clusters(device: torch.device) -> bool:
    """Whether the kernels on ``device`` run by clusters where they can; says so once if that was asked for in vain."""
    if device.type != "cuda":
        return False
    found, why = clusters(device)
    if not found and kernels_asked() == "cluster":
        logger.warning("ADAPTERKERN_KERNELS=cluster: the Triton kernels run: %s", why)
    return found


@cache
def runs_triton(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the operator runs as Triton kernels rather than the closed form; logged once per kind of x."""
    name, reason = backend(device_type, dtype)
    logger.info("fused adapters on %s in %s run as %s: %s", device_type, dtype, name, reason)
    return name in (TRITON, CLUSTERS, TRITON_INTERPRETED)


@cache
def runs_native(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the operator runs in the extension's CPU kernels."""
    return backend(device_type, dtype)[0] == NATIVE


def prefers_eager(x: Tensor, adapter_dim: int, with_grad: bool) -> bool:
    """Whether eager PyTorch runs even with ``fused=True``: x is on a CPU and too small for the operator to pay.

    Compiled code always holds the operator, without a guard on the shape.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or INTERPRETED:
        return False
    if runs_native(x.device.type, x.dtype):
        return _prefers_eager_to_native(x, adapter_dim, with_grad)
    # On 2 cores (AMD EPYC, AVX-512), forward + backward of the closed form took 0.79 to 1.02 of eager's time in bf16
    # and fp32 above these bounds, and up to 2.3 times at one row.
    return x.numel() < _least_numel(x.dtype) or x.numel() < 8 * adapter_dim * x.shape[-1]


def _prefers_eager_to_native(x: Tensor, adapter_dim: int, with_grad: bool) -> bool:
    """Of few rows the preparation of the weights shows, and in a backward the sums of r·d numbers.

    On 2 cores (AMD EPYC, AVX512-BF16), at d of 576 and 4096, r of 16, 64 and 256, the kernels take 0.63 to 0.94 of
    eager's time in bf16 above these bounds, 0.66 to 1.06 in fp32, and below them up to 1.96 and 3.3.
    """
    d = x.shape[-1]
    rows = x.numel() // d
    if x.dtype != torch.float32:
        return rows < (max(64, 2 * adapter_dim) if with_grad else 16)
    work = rows * d * adapter_dim
    if with_grad:
        return rows < adapter_dim or work < 1 << 24
    return work < 1 << 22 or d * adapter_dim < 1 << 15


@cache
def _least_numel(dtype: torch.dtype) -> int:
    # AMX makes bf16's products so cheap that the operator's fp32 statistics show, until eager's activations leave the
    # cache: on 2 cores of a Xeon 1.18, 1.13, 1.05 of eager's time at 4, 8, 12 M elements, 0.78 to 0.81 from 16 M on.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return 1 << 24 if dtype == torch.bfloat16 and amx() else 1 << 21


def in_transform() -> bool:
    """Whether the call is under forward-mode AD or a torch.func transform, which need a formula for each operation."""
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None


def keys(t: Tensor) -> int:
    """What the dispatcher does with ``t`` besides calling a kernel: negate it, batch it, trace it..."""
    return torch._C._dispatch_keys(t).raw_repr()


@cache
def keys_of_plain_tensors(device_type: str) -> frozenset[int]:
    """Those of which ``keys`` tells nothing besides: see registered.py."""
    with torch.inference_mode():
        made_for_inference = torch.empty(0, device=device_type)
    with torch.inference_mode(False):
        return frozenset(keys(t) for t in (made_for_inference, torch.empty(0, device=device_type)))


def operand_dtype(x: Tensor, compute_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype of the products' operands and of z. CPUs emulate fp16 products, about ten times slower than fp32's."""
    dtype = compute_dtype or x.dtype
    return torch.float32 if dtype == torch.float16 and x.device.type == "cpu" and not INTERPRETED else dtype
