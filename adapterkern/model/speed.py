"""How long a step takes on each of n GPUs, derived from its operations and from the bytes that ``scale.py`` counts.

Compute: a product of t tokens by a matrix of m parameters is 2tm floating-point operations, causal attention 2·length·a
per token and layer forward. Backward, a frozen matrix has the gradient of its input alone (as much as the forward), a
trained one that of its weight too; attention twice its forward. The first adapted layer counts whole unless
its adapter runs after it. Checkpointed, the layers from the first adapter's on run forward once more. With cached
prefixes the layers below the first adapter do not run.

Exposed: what no computation hides. DDP's all-reduce runs beside the backward but for its last bucket: 25 MiB, or if all
parameters are trained the embeddings, whose gradient comes last, tied or not, and which DDP does not cut. FSDP2 and
ZeRO-3 gather a layer while the one before runs: exposed are the root, the first layer of the forward and the backward,
what is longer than a layer's computation, and the adapters' gradients at the end. All at the bandwidth of the links,
without latency.

Not counted: the optimizer's time, and a cache's transfer from the host.
"""

import math
from typing import NamedTuple

from adapterkern.model.scale import DDP, ZERO3, Scale

BUCKET = 25 << 20  # bytes, of DDP
PEAK = {"bf16": 989e12, "fp32": 67e12}  # of an H100 SXM, dense; fp32 without TF32, as PyTorch's default is


class Cluster(NamedTuple):
    """GPUs and what joins them.

    Attributes:
        gpus: n, one process each.
        per_node: GPUs of a node.
        link: bytes per second that a GPU sends within its node.
        network: bytes per second that a node sends to the others.
        flops: floating-point operations per second of a GPU, its peak.
        utilization: the share of them that the products of a step reach.
    """

    gpus: int
    per_node: int = 8
    link: float = 450e9
    network: float = 400e9
    flops: float = PEAK["bf16"]
    utilization: float = 0.4

    @property
    def bandwidth(self) -> float:
        """Of all rings together: each enters and leaves a node once, by a network adapter of its own."""
        if self.gpus <= self.per_node:
            return self.link
        return self.network if self.per_node == 1 else min(self.link, self.network)


class Step(NamedTuple):
    """Seconds of a step, and the tokens per second of all GPUs; derived, not measured."""

    compute: float
    exposed: float
    tokens_per_second: float


def step(scale: Scale, engine: str, cluster: Cluster) -> Step:
    """Of a step of ``scale``, derived from operations and bytes."""
    speed, layers = cluster.flops * cluster.utilization, scale.training.shape.num_layers
    forward, backward = (flops / speed for flops in _layer_flops(scale))
    run = layers - scale.cached_layers if scale.cached else layers
    again = min(run, layers - scale.first) if scale.checkpointed else 0
    back = scale.through * backward + again * forward
    compute = _end_flops(scale) / speed + run * forward + back
    exposed = 0.0
    if cluster.gpus > 1 and engine == DDP:
        exposed = _of_ddp(scale, cluster, back)
    elif cluster.gpus > 1:
        exposed = _of_pieces(scale, engine, cluster, forward, backward + (forward if scale.checkpointed else 0))
    return Step(compute, exposed, cluster.gpus * scale.rows * scale.training.length / (compute + exposed))


def _of_ddp(scale: Scale, cluster: Cluster, back: float) -> float:
    """Seconds exposed, ``back`` of them being those of the backward."""
    shape, gpus = scale.training.shape, cluster.gpus
    seconds = scale.exchanged(DDP, gpus).reduced / cluster.bandwidth
    last = max(BUCKET, 4 * shape.vocab_size * shape.hidden_size if scale.full else 0)
    return max(min(seconds, 2 * last * (gpus - 1) / gpus / cluster.bandwidth), seconds - back)


def _of_pieces(scale: Scale, engine: str, cluster: Cluster, forward: float, backward: float) -> float:
    """Seconds exposed of FSDP2 and ZeRO-3; ``forward`` and ``backward`` are those of a layer."""
    gpus, layers = cluster.gpus, scale.training.shape.num_layers
    seconds = (gpus - 1) / gpus / cluster.bandwidth  # per byte
    received = scale.exchanged(engine, gpus)
    root, layer = scale.units(gpus)
    first, again = scale.layers_gathered()
    times = 1.0  # that a layer is gathered in the backward
    if engine == ZERO3:
        first, again = layers, layers - scale.first if scale.checkpointed else scale.through
        one, recomputed = (sum(map(math.prod, sizes)) for sizes in (scale.layer(), scale.recomputed()))
        times, layer = (scale.through + recomputed / one) / max(1, again), scale.width * one
        root = max(0, received.gathered * gpus // (gpus - 1) - round(layer * (first + times * again)))
    gather, reduce, end = seconds * layer, 0.0, received.reduced / cluster.bandwidth
    if scale.full:  # a layer's gradients while the one below runs, the root's at the end
        share = layer / (layer * layers + root)
        reduce, end = end * share, end * (1 - layers * share)
    hidden = (first - 1) * max(0.0, gather - forward)
    hidden += max(0, again - 1) * max(0.0, times * gather + reduce - backward)
    return seconds * root + gather * (1 + times * (again > 0)) + hidden + reduce + end


def _layer_flops(scale: Scale) -> tuple[int, int]:
    """Of a layer, forward and backward."""
    shape, tokens = scale.training.shape, scale.rows * scale.training.length
    products = 2 * tokens * sum(out * into for out, into in shape.matrices)
    attention = 2 * tokens * scale.training.length * shape.attention
    return products + attention, products * (2 if scale.full else 1) + 2 * attention


def _end_flops(scale: Scale) -> int:
    """Of LM head and adapters, forward and backward."""
    shape, tokens = scale.training.shape, scale.rows * scale.training.length
    head = 2 * scale.rows * scale.training.learned * shape.hidden_size * shape.vocab_size
    return 3 * head if scale.full else 2 * head + 6 * tokens * scale.trained_params
