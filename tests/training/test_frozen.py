"""Frozen weights under autocast are cast once, with the same bits."""

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adapterkern.training import train
from adapterkern.training.parallel.frozen import cast_once
from tests.support import tiny_run


class Casts(TorchDispatchMode):
    """Counts the casts to 16 bits, by the shape of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and made.dtype in (torch.bfloat16, torch.float16):
            self.shapes[tuple(made.shape)] += 1
        return made


def learn(model: Any, dtype: torch.dtype, times: int = 1) -> list[Tensor]:
    ids = torch.arange(1, 13).view(2, 6)
    model.zero_grad()
    for _ in range(times):
        with torch.autocast("cpu", dtype):
            loss = model(ids, labels=ids).loss
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.adapter_parameters())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bits_stay_and_each_weight_is_cast_once(dtype: torch.dtype) -> None:
    model = tiny_run.model(init="xavier").train()
    expected = learn(model, dtype)
    with cast_once(model):
        for got, wanted in zip(learn(model, dtype), expected, strict=True):
            assert torch.equal(got, wanted)
        with Casts() as after:
            learn(model, dtype, times=3)
    with Casts() as without:
        learn(model, dtype, times=3)
    of_backbone = {(64, 32): 2, (32, 64): 1, (16, 32): 2}  # per layer: up and gate, down, keys and values
    assert {shape: without.shapes[shape] for shape in of_backbone} == {k: 3 * 4 * n for k, n in of_backbone.items()}
    assert not any(after.shapes[shape] for shape in of_backbone)


def test_an_evaluation_first_leaves_copies_that_a_backward_can_use() -> None:
    model = tiny_run.model(init="xavier").train()
    expected = learn(model, torch.bfloat16)
    with cast_once(model):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(torch.arange(1, 7)[None])
        assert torch.equal(learn(model, torch.bfloat16)[1], expected[1])


def test_nothing_else_changes_and_all_is_restored() -> None:
    model = tiny_run.model().train()
    before = {name: set(vars(m)) for name, m in model.named_modules()}
    ids = torch.arange(1, 7)[None]
    expected = model(ids).logits
    own = model.base.model.layers[0].mlp.up_proj
    own.forward = lambda x: nn.Linear.forward(own, x)  # as accelerate's hooks do
    with contextlib.suppress(KeyError), cast_once(model):
        assert vars(own)["forward"].__name__ == "<lambda>"
        assert torch.equal(model(ids).logits, expected)  # without autocast: the weights themselves
        assert not any("forward" in vars(m) for a in model.adapters.values() for m in a.modules())  # trained
        raise KeyError
    del own.forward
    assert {name: set(vars(m)) for name, m in model.named_modules()} == before


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_training_casts_once_and_learns_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(epochs: int) -> tuple[list[Tensor], int]:
        model = tiny_run.model(init="xavier")
        config = tiny_run.quiet(precision=precision, epochs=epochs)
        with Casts() as casts:
            train(model, tiny_run.rows(12), config, tokenizer=tiny_run.tokenizer())
        return [p.detach().clone() for p in model.adapter_parameters()], casts.shapes[64, 32]

    (once, casts), (_, of_three_epochs) = trained(1), trained(3)
    assert casts == of_three_epochs
    monkeypatch.setattr("adapterkern.training.api.cast_once", lambda module: contextlib.nullcontext())
    every_time, more_casts = trained(1)
    assert more_casts > casts or precision == "fp32"
    assert all(torch.equal(p, q) for p, q in zip(once, every_time, strict=True))
