"""A training step on a frozen LLaMA, the same for every variant; needs only torch and transformers, for peers.

The weights are random: speed does not depend on them. The step is forward, loss, backward, clipping, AdamW. On a CPU
the loss is that of a text classifier (mean over tokens, a trained linear head of 8 labels), the demo's task: with a
vocabulary of 49,152, the LM head would take most of a small model's time. On a GPU it is the language model's own loss.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

LABELS = 8


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """The model's shape, the layers with adapters, the batch, the precision."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    sites: tuple[int, ...]
    adapter_dim: int
    batch: int
    length: int
    dtype: str = "float32"
    classify: bool = True
    device: str = "cpu"
    threads: int = 1
    written_out: bool = False  # attention, instead of by torch's flash kernel
    accumulate: int = 1  # batches per update, whose gradients are averaged

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def make_llama(spec: StepSpec) -> LlamaForCausalLM:
    """The backbone, frozen, with random weights."""
    torch.manual_seed(0)
    shape = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)[:6]}
    config = LlamaConfig(**shape, max_position_embeddings=max(2048, spec.length), use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, spec.dtype))
    try:
        with torch.device(spec.device):
            llama = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return llama.requires_grad_(False).train()


class Step:
    """One training step around the model's ``hidden_states(input_ids)``.

    Args:
        hidden_states: from token ids (B, L) to the decoder's last hidden state (B, L, d).
        parameters: what is trained, without the classifier's head.
        optimizer: from a list of parameters to a function that clips and updates; default clip_grad_norm_ and
            torch's fused AdamW.
    """

    def __init__(
        self,
        spec: StepSpec,
        llama: Any,
        hidden_states: Callable[[Tensor], Tensor],
        parameters: Sequence[Tensor],
        optimizer: Callable[[list[Tensor]], Callable[[], object]] | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.spec, self.llama, self.hidden_states = spec, llama, hidden_states
        ids = torch.randint(spec.vocab_size, (spec.batch, spec.length), generator=generator)
        self.input_ids = ids.to(spec.device)
        self.labels = torch.randint(LABELS, (spec.batch,), generator=generator).to(spec.device)
        torch.manual_seed(0)
        self.head: Any = nn.Linear(spec.hidden_size, LABELS, device=spec.device) if spec.classify else llama.lm_head
        self.parameters = list(parameters)
        trained = self.parameters + (list(self.head.parameters()) if spec.classify else [])
        self.update = (optimizer or clip_and_adamw)(trained) if trained else lambda: None
        self.trained = trained
        self.calls = 0

    def loss(self, rows: slice = slice(None)) -> Tensor:
        """The mean over ``rows``; over the batch, it is the mean of its rows' losses."""
        ids = self.input_ids[rows]
        hidden = self.hidden_states(ids)
        if self.spec.classify:
            return F.cross_entropy(self.head(hidden.mean(1).float()), self.labels[rows])
        logits = self.head(hidden[:, :-1].flatten(0, 1)).float()
        return F.cross_entropy(logits, ids[:, 1:].flatten())

    def __call__(self) -> None:
        with sdpa_kernel(SDPBackend.MATH) if self.spec.written_out else contextlib.nullcontext():
            loss = self.loss()
            (loss / self.spec.accumulate if self.spec.accumulate > 1 else loss).backward()
        self.calls += 1
        if self.calls % self.spec.accumulate == 0:
            self.update()
            for p in self.trained:
                p.grad = None


def clip_and_adamw(parameters: list[Tensor]) -> Callable[[], object]:
    """What PyTorch users write, with the fastest implementation."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()

    return update
