"""How much memory a training step takes, term by term, without a model: what autograd keeps follows from the equations.

With T tokens in a forward (rows · length), w bytes per element of the backbone, d = hidden_size, a = heads · head_dim,
f = intermediate_size, L = length, V = vocabulary, K = tokens that are learned (causal-lm):

weights     w per parameter. In 4 bits (nf4) a weight of the layers' seven matrices takes 1/2 + 1/64 + 4/(64·256): its
            code, and per 64 weights a scale in a byte, and per 256 scales one in fp32. In 8 bits it takes 1, and each
            row of a matrix a scale in fp32. Embeddings, norms and LM head keep w.
trained     16 per parameter of adapters and head: value, gradient and AdamW's two moments, all fp32.
kept        for the backward, from the first adapter on: a frozen matrix keeps nothing of its input, since the input's
            gradient needs its weight alone.
    layer       2·(4d + 4)      two norms: each its input in fp32 (which in 16 bits is a copy), and a factor per row
                4aw + 4·heads   sdpa: q, k, v and the output; a log-sum per head
                Lw              the mask of padding, as sdpa adds it. Without padding k and v are those of their own
                                heads; with it they are repeated for all, which is counted here
                3fw             SwiGLU: gate, up and silu(gate)
                                all that per token: 8d + 8 + 4aw + 4·heads + Lw + 3fw
                eager           3aw + heads·L·4, and heads·L·w more in 16 bits, in place of sdpa's two lines
                8 bits          bitsandbytes also keeps the input of each matrix: 2dw + fw
                checkpointed    dw: its input alone
                offloaded       nothing, it is in the host's memory; but what bitsandbytes keeps is not moved, with the
                                output of attention, another aw
    adapter     dw + rw + 8     its input, z (d → r), mean and 1/σ (8, if it has LayerNorm); checkpointed: nothing
    prompt      aw + 4·heads    the result of its attention and a log-sum per head, and aw of the first layer's q
    bias, scale ow              the outputs o of a layer's linear layers; and of the first of these layers all but the
                                first norm, since the backward goes through it
    loss        4d + 4 of the final norm, and 4KV: the logarithms of the probabilities
workspace   the most that comes on top at a time, of two: 8KV in the loss's backward (two gradients of logits), or in a
            layer's 3fw + 4d per token, what it keeps if that was recomputed or comes back, and, quantized, its largest
            matrix in w.

Not counted: an accelerator's own context (0.3 to 0.6 GB), rounding of its allocator, and cached prefixes, which are in
the host's memory. Layers below the first adapter keep nothing, with them or without.
"""

import bisect
from typing import NamedTuple

from adapterkern.model.config import PROMPT, AdapterConfig
from adapterkern.model.inside import Inside

WIDTHS = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes per element
MOST_ROWS = 1 << 20


class Shape(NamedTuple):
    """The sizes of a LLaMA."""

    hidden_size: int
    num_layers: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool = False  # the LM head is the embeddings

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of a layer's seven matrices."""
        d, f, a, k = self.hidden_size, self.intermediate_size, self.attention, self.num_kv_heads * self.head_dim
        return [(a, d), (k, d), (k, d), (d, a), (f, d), (f, d), (d, f)]

    @property
    def inside(self) -> Inside:
        """What the layers have inside."""
        return Inside(self.num_heads, (sum(out for out, _ in self.matrices),) * self.num_layers)

    @property
    def attention(self) -> int:
        """The width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return self.num_layers * sum(out * into for out, into in self.matrices) + self._others

    @property
    def _others(self) -> int:
        """Those of norms, embeddings and LM head."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return (2 * self.num_layers + 1) * self.hidden_size + embeddings

    def weights(self, width: int, load_in: str | None) -> int:
        """Bytes of all weights, ``width`` per element where they are not quantized."""
        if load_in is None:
            return width * self.num_params
        count, rows = (sum(sizes) for sizes in zip(*((o * i, o) for o, i in self.matrices), strict=True))
        layer = count + 4 * rows if load_in == "8bit" else count / 2 + count / 64 + 4 * count / (64 * 256)
        return round(self.num_layers * layer) + width * self._others


class Choice(NamedTuple):
    """What a run may be asked for to take less memory."""

    load_in: str | None = None  # "8bit" or "4bit"
    checkpointed: bool = False
    offloaded: bool = False


# From the smallest change to the largest: first what leaves all bits, then what rounds the weights
CHOICES = tuple(
    Choice(load_in, checkpointed, offloaded)
    for load_in in (None, "8bit", "4bit")
    for checkpointed, offloaded in ((False, False), (True, False), (False, True), (True, True))
)


class Memory(NamedTuple):
    """Bytes, by the terms above. ``host`` is what is offloaded to the host's memory."""

    weights: int
    trained: int
    kept: int
    workspace: int
    host: int = 0

    @property
    def total(self) -> int:
        """On the device of the backbone."""
        return self.weights + self.trained + self.kept + self.workspace


class Training(NamedTuple):
    """A training whose memory is asked for.

    Attributes:
        shape: of the backbone.
        adapter: resolved, see ``AdapterConfig.resolve``.
        length: tokens of each row.
        learned: of them those that causal-lm predicts; 0 for a classification.
        dtype: of the backbone, ``"fp32"``, ``"bf16"`` or ``"fp16"``, without autocast.
        attn: ``"eager"``, or an implementation that keeps no probabilities.
        padded: whether batches have rows of different lengths.
    """

    shape: Shape
    adapter: AdapterConfig
    length: int
    learned: int = 0
    dtype: str = "bf16"
    attn: str = "sdpa"
    padded: bool = True

    @property
    def trained_params(self) -> int:
        """Number of parameters of all adapters."""
        return self.adapter.num_params(self.shape.hidden_size, self.shape.num_layers, self.shape.inside)

    def memory(self, rows: int, choice: Choice = CHOICES[0]) -> Memory:
        """Of a step whose forwards have ``rows`` rows each."""
        shape, width, tokens = self.shape, WIDTHS[self.dtype], rows * self.length
        d, f = shape.hidden_size, shape.intermediate_size
        above = shape.num_layers - self.first - (not self.adapter.bias_scale)  # layers through which the backward goes
        inputs = tokens * (2 * d + f + shape.attention * choice.offloaded) * width if choice.load_in == "8bit" else 0
        again = tokens * (self.layer() + self._outputs()) + inputs if choice.checkpointed or choice.offloaded else 0
        layers = tokens * (self._inputs() if choice.checkpointed else self._stack())
        kept = tokens * (4 * d + 4) + 4 * rows * self.learned * shape.vocab_size
        kept += 0 if choice.offloaded else layers
        kept += 0 if choice.checkpointed else above * inputs
        matrix = 0 if choice.load_in is None else width * max(out * into for out, into in shape.matrices)
        return Memory(
            weights=shape.weights(width, choice.load_in),
            trained=16 * self.trained_params,
            kept=kept,
            workspace=self.workspace(rows, again + matrix),
            host=layers if choice.offloaded else 0,
        )

    def workspace(self, rows: int, again: int) -> int:
        """The most bytes that come on top at a time; in a layer with ``again`` bytes that it has back."""
        shape, width = self.shape, WIDTHS[self.dtype]
        in_layer = again + rows * self.length * (3 * shape.intermediate_size * width + 4 * shape.hidden_size)
        return max(8 * rows * self.learned * shape.vocab_size, in_layer)

    def most_rows(self, memory: int, choice: Choice = CHOICES[0]) -> int:
        """The most rows per forward that fit into ``memory`` bytes; 0 if none do."""
        return bisect.bisect_right(range(1, MOST_ROWS), memory, key=lambda rows: self.memory(rows, choice).total)

    @property
    def first(self) -> int:
        """The first layer with an adapter."""
        return (self.adapter.layers or (0,))[0]

    def _mlp(self) -> int:
        """Bytes per token that a layer's second half keeps."""
        return 4 * self.shape.hidden_size + 4 + 3 * self.shape.intermediate_size * WIDTHS[self.dtype]

    def layer(self) -> int:
        """Bytes per token that a whole layer keeps."""
        shape, width = self.shape, WIDTHS[self.dtype]
        heads, a = shape.num_heads, shape.attention
        if self.attn == "eager":
            attention = 3 * a * width + heads * self.length * (4 if width == 4 else 4 + width)
        elif self.padded:
            attention = 4 * a * width + 4 * heads + self.length * width
        else:
            attention = 2 * (a + shape.num_kv_heads * shape.head_dim) * width + 4 * heads
        return 4 * shape.hidden_size + 4 + attention + self._mlp()

    def _stack(self) -> int:
        """Bytes per token that all layers and adapters keep."""
        above = (self.shape.num_layers - 1 - self.first) * self.layer()
        attended = self.shape.attention * WIDTHS[self.dtype]
        if self.adapter.bias_scale:
            above += self.layer() - 4 * self.shape.hidden_size - 4 + len(self.adapter.layers or ()) * self._outputs()
        elif self.adapter.place != "layer":
            above += self._mlp() + (attended if self.adapter.kind == PROMPT else 0)
        if self.adapter.kind == PROMPT:
            return above + len(self.adapter.layers or ()) * (attended + 4 * self.shape.num_heads)
        adapter = (self.shape.hidden_size + self.adapter.adapter_dim) * WIDTHS[self.dtype]
        adapter += 8 if self.adapter.layer_norm else 0
        return above + len(self.adapter.layers or ()) * self.adapter.depth * adapter

    def _outputs(self) -> int:
        """Bytes per token that bias and scale of a layer's linear layers keep: what these give."""
        return sum(out for out, _ in self.shape.matrices) * WIDTHS[self.dtype] if self.adapter.bias_scale else 0

    def _inputs(self) -> int:
        """Bytes per token of the inputs of the layers from the first adapter's on."""
        return (self.shape.num_layers - self.first) * self.shape.hidden_size * WIDTHS[self.dtype]
