"""Batches whose adapters are chosen from the residual stream: decided once, below the first adapter, and kept."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.tiny_llama import IDS, LEFT_PADDED, NAMES, mixed

MODEL = mixed()

MIXED = ["a", "b", "d"]  # the first is after layer 1


class Chooser:
    """Returns a fixed index, and weights that depend on a parameter; records its inputs."""

    def __init__(self, index: list[int]) -> None:
        self.index = torch.tensor(index)
        self.scale = nn.Parameter(torch.ones(IDS.shape[1], 1, 32, dtype=torch.float64))
        self.seen: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(hidden.detach())
        weight = torch.einsum("bld,lkd->bk", hidden, self.scale).tanh()[:, 0]
        return self.index.repeat_interleave(hidden.shape[0] // len(self.index)), weight


def run(choice: Any, weight: Any = None, **kwargs: Any) -> Tensor:
    with MODEL.mixing(MIXED, choice, weight):
        return MODEL(IDS, attention_mask=LEFT_PADDED, **kwargs).logits


def test_is_asked_once_below_the_first_adapter_and_then_runs_as_given() -> None:
    chooser = Chooser([2, -1, 0])
    got = run(chooser)
    assert len(chooser.seen) == 1
    with MODEL.mixing(MIXED, chooser):
        assert MODEL.prefix_length == 2
        stream = MODEL.run_prefix(IDS, LEFT_PADDED)
    assert torch.allclose(chooser.seen[0][LEFT_PADDED > 0], stream[LEFT_PADDED > 0])
    index, weight = chooser(chooser.seen[0])
    assert torch.equal(got, run(index, weight))
    assert not torch.allclose(got, run(chooser.index))


def test_decides_the_same_from_a_cached_prefix() -> None:
    chooser = Chooser([2, -1, 0])
    with MODEL.mixing(MIXED, chooser):
        whole = MODEL.decoder(input_ids=IDS, attention_mask=LEFT_PADDED, use_cache=False).last_hidden_state
    with MODEL.mixing(MIXED, chooser):
        cut = MODEL.run_suffix(MODEL.run_prefix(IDS, LEFT_PADDED), LEFT_PADDED)
    assert len(chooser.seen) == 2
    assert torch.allclose(whole[LEFT_PADDED > 0], cut[LEFT_PADDED > 0])


def gradients(chooser: Chooser) -> list[Tensor]:
    MODEL.zero_grad()
    with MODEL.mixing(MIXED, chooser):
        MODEL(IDS, attention_mask=LEFT_PADDED, labels=IDS, use_cache=False).loss.backward()
    parameters = [chooser.scale, *(p for name in MIXED for p in MODEL.adapter_parameters(name))]
    return [p.grad.clone() for p in parameters]


def test_gradient_checkpointing_does_not_ask_again() -> None:
    chooser, again = Chooser([2, -1, 0]), Chooser([2, -1, 0])
    plain = gradients(chooser)
    assert plain[0].abs().max() > 0
    MODEL.gradient_checkpointing_enable()
    MODEL.train()
    try:
        recomputed = gradients(again)
    finally:
        MODEL.eval()
        MODEL.gradient_checkpointing_disable()
    assert len(again.seen) == 1
    assert all(torch.allclose(a, b) for a, b in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("beams", [1, 2])
def test_generate_decides_on_the_prompts_and_keeps_it(beams: int) -> None:
    chooser = Chooser([2, -1, 0])
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "attention_mask": LEFT_PADDED}
    with MODEL.mixing(MIXED, chooser):
        got = MODEL.generate(IDS, **how)
        assert MODEL.generate(IDS, **how).equal(got)
    assert [len(seen) for seen in chooser.seen] == [len(IDS) * beams] * 2
    index, weight = chooser(chooser.seen[0][::beams])
    with MODEL.mixing(MIXED, index, weight):
        assert MODEL.generate(IDS, **how).equal(got)
    assert not MODEL.generate(IDS, adapter_names=["__base__"] * 3, **how).equal(got)


def test_a_function_brings_its_own_weights() -> None:
    with pytest.raises(ValueError, match=r"^weight: expected None"):
        run(Chooser([0, 0, 0]), torch.ones(3))
    with pytest.raises(ValueError, match=r"^index: expected one entry for each"):
        run(lambda hidden: (torch.tensor([0, 1]), None))
    with pytest.raises(ValueError, match=f"^index: expected values from -1 to {len(MIXED) - 1}"):
        run(lambda hidden: (torch.full((3,), len(NAMES)), None))


def test_a_forward_without_a_backward_leaves_nothing_behind() -> None:
    """The decision's saved outputs must not keep their own graph alive: every routed forward would stay in memory."""

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, mark: Any) -> Tensor:
            ctx.mark = mark
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad, None

    class Mark:
        pass

    marks = [Mark()]
    held: Any = weakref.ref(marks[0])
    scale = torch.ones(2, requires_grad=True)

    def decide(hidden: Tensor) -> tuple[Tensor, Tensor]:
        weight = (Marked.apply(scale, marks[0]) * hidden.detach().mean((1, 2))[:, None]).softmax(-1)  # saves its output
        return torch.zeros(len(hidden), 2, dtype=torch.int64) + torch.arange(2), weight

    model = mixed()
    with model.mixing(NAMES[:2], decide):
        logits = model(IDS).logits
    assert logits.requires_grad
    del logits
    marks.clear()
    gc.collect()
    assert held() is None
