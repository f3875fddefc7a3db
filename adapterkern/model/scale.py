"""What a training step takes of each of n GPUs, and what these exchange: arithmetic alone, as in ``memory.py``.

With N parameters, P of them trained, w bytes per element of the backbone, and T tokens in a forward, of which each GPU
runs one per step. "Received" is what a GPU receives, and sends as much, in a ring, by which all algorithms are measured
here: (n − 1)/n of what an all-gather gives or a reduce-scatter takes, twice that of an all-reduce.

DDP         each GPU has all weights, wN, and its trained parameters whole, 16P. Received: one all-reduce of their
            gradients, 2·(n − 1)/n·4P. Buffers: the buckets in which they travel, 4P.
FSDP2       each parameter is cut along its first dimension into n pieces, the last ones padded: U is the
            padded bytes of a unit. Units are the layers, and the root: embeddings, final norm, LM head, and all
            adapters, which are beside the layers.
            forward     gathers the root and every layer: U each
            backward    gathers the layers from the first adapter's on again, and one more below, which is prefetched
                        before it is known that no gradient goes there. The root has stayed.
            gradients   of trained parameters alone, one reduce-scatter, in fp32
            buffers     the root all the time, and what it was gathered in until the first layer is; later two layers,
                        the running one and the next; in the backward also the gradients, and again in their
                        reduce-scatter, padded. The most of these.
ZeRO-3      each parameter is flattened and cut, unless it has at most 100,000 elements (DeepSpeed's
            ``stage3_param_persistence_threshold``): those stay whole, and all are gathered once after the step.
            forward     gathers what it uses; with prompts W_k and W_v twice
            backward    the LM head, the layers above the first adapter, and the adapters again; checkpointed, also the
                        layers that run again, from the first adapter's on, but of each what its backward begins with,
                        which is there already: an adapter after the layer, or else W_down. DeepSpeed keeps up to 10⁹
                        parameters gathered (``stage3_max_live_parameters``), so that of a smaller model it may
                        gather fewer: what is counted is the most.
            gradients   one reduce-scatter, in w: DeepSpeed casts the adapters as well
            buffers     w for each of those 10⁹, or of all parameters if these are fewer, or of the embeddings if these
                        are more; and for each element of the bucket of gradients, 5·10⁸ (``reduce_bucket_size``),
                        however few are trained
            trained     16 + w per parameter, since it casts fp32 ones, cut into n

Full fine-tuning, beside it, trains all N in mixed precision: value, gradient and moments in fp32, 16N, computed and
gathered in w, and reduced in w (DDP: in fp32, with wN for the copies that autocast makes). It keeps, beside
what ``memory.py`` counts per layer, the inputs of the matrices and of the norms' weights, (4d + f)·w per token; of the
final norm's weight dw; and of the LM head dw per learned token. FSDP2 also holds gradients, in w: the root's, and a
layer's twice, as in its reduce-scatter.

``speed.py`` says how long it takes. Not counted: of the collectives a loss, norm or flag (4 or 8 bytes), and positional
buffers; evaluations, checkpoints, a classification's head.
"""

import bisect
import math
from collections.abc import Iterable
from typing import NamedTuple

from adapterkern.model.adapter import Adapter
from adapterkern.model.config import PROMPT, prefix_length
from adapterkern.model.memory import MOST_ROWS, WIDTHS, Choice, Training

ENGINES = DDP, FSDP2, ZERO3 = "DDP", "FSDP2", "ZeRO-3"
PERSISTENT = 100_000  # elements of a parameter that ZeRO-3 does not cut
LIVE = 10**9  # parameters that it keeps gathered
REDUCED = 5 * 10**8  # elements of the bucket that its gradients are reduced in

Sizes = Iterable[tuple[int, ...]]


class PerGpu(NamedTuple):
    """Bytes of one GPU, by the terms above."""

    weights: int
    trained: int
    buffers: int
    kept: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)


class Exchanged(NamedTuple):
    """Bytes that one GPU receives per step: parameters, and gradients."""

    gathered: int
    reduced: int


class Scale(NamedTuple):
    """A step on several GPUs, each of which runs one forward of ``rows`` rows.

    Attributes:
        training: backbone, adapters, length and dtypes.
        rows: of each GPU.
        full: all parameters are trained, without adapters.
        checkpointed: layers keep their inputs alone and run again in the backward.
        cached: layers below the first adapter do not run, as from the second epoch on where they are cached.
    """

    training: Training
    rows: int
    full: bool = False
    checkpointed: bool = False
    cached: bool = False

    # Memory

    def memory(self, engine: str, gpus: int) -> PerGpu:
        """Of one GPU of ``gpus``; with one the engine makes no difference."""
        taken = self.training.memory(self.rows, Choice(checkpointed=self.checkpointed))
        held = self._weights(engine, gpus), self._trained(engine, gpus), self._buffers(engine, gpus)
        if not self.full:
            return PerGpu(*held, taken.kept, taken.workspace)
        again = self._layer_kept() if self.checkpointed else 0
        return PerGpu(*held, self._kept(), self.training.workspace(self.rows, self.rows * self.training.length * again))

    def most_rows(self, memory: int, engine: str, gpus: int) -> int:
        """The most rows per forward that fit into ``memory`` bytes of each GPU; 0 if none do."""
        rows = range(1, MOST_ROWS)
        return bisect.bisect_right(rows, memory, key=lambda n: self._replace(rows=n).memory(engine, gpus).total)

    def _weights(self, engine: str, gpus: int) -> int:
        """Of the backbone; in full fine-tuning copies in w of what is counted as trained."""
        width, shape = self.width, self.training.shape
        if engine == ZERO3 and gpus > 1:
            whole = sum(map(math.prod, self._small()))
            return width * (sum(_pieces(self._frozen(), gpus)) + whole)
        if not self.full:
            return width * (shape.num_params if engine == DDP or gpus == 1 else _rows(self._frozen(), gpus))
        return width * shape.num_params if width < 4 and (engine == DDP or gpus == 1) else 0

    def _trained(self, engine: str, gpus: int) -> int:
        if engine == DDP or gpus == 1:
            return 16 * self.trained_params
        if engine == FSDP2:
            return 16 * _rows(self._learned(), gpus)
        return (16 + (0 if self.full else self.width)) * sum(_pieces(self._learned(), gpus))

    def _buffers(self, engine: str, gpus: int) -> int:
        if gpus == 1:
            return 0
        if engine == DDP:
            return 4 * self.trained_params
        if engine == ZERO3:
            sizes = [math.prod(size) for size in self._frozen() + ([] if self.full else self._adapters())]
            return self.width * (max(min(LIVE, sum(sizes)), *sizes) + REDUCED)
        root, layer = self.units(gpus)
        if self.full:  # the root's gradients from the LM head's on, a layer's before and in its reduce-scatter
            return max(self.gathered(gpus), 2 * root + max(4 * layer, root))
        backward = 4 * self.trained_params + max(2 * layer, 4 * gpus * _rows(self._adapters(), gpus))
        return max(self.gathered(gpus), root + backward)

    def gathered(self, gpus: int) -> int:
        """Bytes of parameters that FSDP2 has gathered at most."""
        root, layer = self.units(gpus)
        return root + layer + max(root, layer)

    def _kept(self) -> int:
        """Of full fine-tuning."""
        training, width = self.training, self.width
        d, vocabulary = training.shape.hidden_size, training.shape.vocab_size
        tokens, learned = self.rows * training.length, self.rows * training.learned
        layer = d * width if self.checkpointed else self._layer_kept()
        ends = 4 * d + 4 + d * width  # the final norm's input, and what its weight multiplies
        return tokens * (training.shape.num_layers * layer + ends) + learned * (d * width + 4 * vocabulary)

    def _layer_kept(self) -> int:
        d, f = self.training.shape.hidden_size, self.training.shape.intermediate_size
        return self.training.layer() + (4 * d + f) * self.width

    # Bytes

    def exchanged(self, engine: str, gpus: int, persistent: int = PERSISTENT) -> Exchanged:
        """Of a step of ``gpus`` GPUs. ``persistent``: elements of a parameter that ZeRO-3 does not cut."""
        if engine == DDP:
            return Exchanged(0, 2 * 4 * self.trained_params * (gpus - 1) // gpus)
        if engine == FSDP2:
            root, layer = self.units(gpus)
            forward, backward = self.layers_gathered()
            learned = _rows(self._learned(), gpus) * (self.width if self.full else 4)
            gathered = root + (forward + backward) * layer
            return Exchanged(gathered * (gpus - 1) // gpus, learned * (gpus - 1))
        used = self._used(backward=False) + self._used(backward=True) + self.recomputed()
        cut = sum(_pieces(used, gpus, persistent)) + sum(_pieces(self._small(persistent), gpus))
        learned = sum(_pieces(self._learned(), gpus))
        return Exchanged(cut * self.width * (gpus - 1), learned * self.width * (gpus - 1))

    def layers_gathered(self) -> tuple[int, int]:
        """By FSDP2, in the forward and in the backward."""
        layers, first = self.training.shape.num_layers, self.first
        return layers, layers - first + (first > 0)

    # What there is

    @property
    def cached_layers(self) -> int:
        """Layers that do not run where the frozen prefix is cached."""
        return prefix_length(self.training.adapter)

    @property
    def cached_bytes(self) -> int:
        """Of the host's memory, per token."""
        return self.width * self.training.shape.hidden_size

    @property
    def trained_params(self) -> int:
        """Number of parameters that are trained."""
        return self.training.shape.num_params if self.full else self.training.trained_params

    @property
    def width(self) -> int:
        """Bytes per element of the backbone."""
        return WIDTHS[self.training.dtype]

    @property
    def first(self) -> int:
        """The first layer with something to learn."""
        return 0 if self.full else self.training.first

    @property
    def _after(self) -> bool:
        """Whether the adapters are after their layers."""
        return not self.full and self.training.adapter.place == "layer" and not self.training.adapter.bias_scale

    @property
    def through(self) -> int:
        """Layers through which the backward goes."""
        return self.training.shape.num_layers - self.first - self._after

    def layer(self) -> list[tuple[int, ...]]:
        """The sizes of a layer's parameters."""
        d = self.training.shape.hidden_size
        return [*self.training.shape.matrices, (d,), (d,)]

    def _ends(self) -> list[tuple[int, ...]]:
        """Embeddings and, unless tied, LM head; the final norm."""
        shape = self.training.shape
        table = (shape.vocab_size, shape.hidden_size)
        return [*([table] if shape.tied else [table, table]), (shape.hidden_size,)]

    def _frozen(self) -> list[tuple[int, ...]]:
        """All of the backbone's parameters."""
        return self.layer() * self.training.shape.num_layers + self._ends()

    def _adapters(self) -> list[tuple[int, ...]]:
        """What an adapter run trains."""
        shape, adapter = self.training.shape, self.training.adapter
        if adapter.kind == PROMPT:
            gates = shape.num_heads if adapter.prompt_gate == "head" else 1
            site: list[tuple[int, ...]] = [(adapter.prompt_length, shape.hidden_size), (gates,)]
        else:
            one = Adapter(
                shape.hidden_size,
                adapter.adapter_dim,
                layer_norm=adapter.layer_norm,
                learned_scale=adapter.learned_scale,
                device="meta",
            )
            site = [tuple(p.shape) for p in one.parameters()] * adapter.depth
        if adapter.bias_scale:
            site += [(out,) for out, _ in shape.matrices for _ in ("bias", "scale")]
        return site * len(adapter.layers or ())

    def _learned(self) -> list[tuple[int, ...]]:
        return self._frozen() if self.full else self._adapters()

    def _small(self, persistent: int = PERSISTENT) -> list[tuple[int, ...]]:
        """What ZeRO-3 does not cut."""
        everything = self._frozen() + ([] if self.full else self._adapters())
        return [size for size in everything if math.prod(size) <= persistent]

    def _used(self, backward: bool) -> list[tuple[int, ...]]:
        """The parameters that a forward or a backward uses."""
        shape = self.training.shape
        layers = self.layer() * (self.through if backward else shape.num_layers)
        table: tuple[int, ...] = (shape.vocab_size, shape.hidden_size)
        tables = [table] * ((self.full or not backward) + (self.training.learned > 0))
        return layers + tables + [(shape.hidden_size,)] + self._of_adapters()

    def recomputed(self) -> list[tuple[int, ...]]:
        """What ZeRO-3 gathers to recompute."""
        if not self.checkpointed:
            return []
        adapter, shape = self.training.adapter, self.training.shape
        begins = not self.full and (adapter.place == "layer" or adapter.bias_scale)  # the backward of its layers
        after, layers = len(adapter.layers or ()) if begins else 0, shape.num_layers - self.first
        others = [(shape.hidden_size,)] * 2 + shape.matrices[:-1]
        inside = self._of_adapters()
        if self._after:  # of several at a site all but the last
            inside = inside[: len(inside) * (adapter.depth - 1) // adapter.depth]
        return self.layer() * after + others * (layers - after) + inside

    def _of_adapters(self) -> list[tuple[int, ...]]:
        """What adapters use: their own, and prompts once more the layer's matrices of keys and values."""
        if self.full:
            return []
        again = self.training.shape.matrices[1:3] * len(self.training.adapter.layers or ())
        return self._adapters() + (again if self.training.adapter.kind == PROMPT else [])

    def units(self, gpus: int) -> tuple[int, int]:
        """Padded bytes of FSDP2's root, and of a layer."""
        root = self.width * _rows(self._ends(), gpus)
        root += 0 if self.full else 4 * _rows(self._adapters(), gpus)
        return gpus * root, gpus * self.width * _rows(self.layer(), gpus)


def _rows(sizes: Sizes, gpus: int) -> int:
    """Elements of a GPU, each parameter's first dimension cut into equal pieces."""
    return sum(-(-rows // gpus) * math.prod(rest) for rows, *rest in sizes)


def _pieces(sizes: Sizes, gpus: int, above: int = 0) -> Iterable[int]:
    """Elements of a GPU of each parameter with more than ``above`` of them, flattened and cut into equal pieces."""
    return (-(-math.prod(size) // gpus) for size in sizes if math.prod(size) > above)
