"""The soft-label loss against its definition in fp64, its gradient, and what it keeps in memory."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from adapterkern.recipes.distillation import SoftLabelSettings
from adapterkern.recipes.distillation.soft_labels import IGNORE, Teacher, soft_label_loss
from tests.support.soft_label_reference import Allocations, plain

# The loss, against its definition over whole logits


def case(tokens: int, vocabulary: int = 23, seed: int = 0, spread: float = 3.0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    heads = [nn.Linear(d, vocabulary, dtype=torch.float64).requires_grad_(False) for d in (6, 4)]
    for head in heads:
        head.weight.copy_(normal(*head.weight.shape) * spread)
        head.bias.copy_(normal(vocabulary))
    targets = torch.randint(vocabulary, (tokens,), generator=draw)
    targets[::3] = IGNORE
    return {
        "hidden": normal(tokens, 6).requires_grad_(),
        "head": heads[0],
        "teacher": Teacher(normal(tokens, 4), heads[1]),
        "targets": targets,
        "token_weights": normal(tokens).abs(),
    }


KINDS: list[dict[str, Any]] = [
    {"divergence": "kl"},
    {"divergence": "js"},
    {"divergence": "reverse-kl"},
    *({"divergence": "jsd", "beta": beta} for beta in (0.0, 0.1, 0.9, 1.0)),
    {"divergence": "kl", "top_k": 22},  # of 23: the others are one
    {"divergence": "reverse-kl", "top_k": 3},
    {"divergence": "jsd", "top_k": 1},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@given(
    tokens=st.integers(0, 9),
    chunk_tokens=st.integers(1, 10),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.0]),
    weight=st.sampled_from([0.0, 0.3, 1.0]),
    with_targets=st.booleans(),
    weighted=st.booleans(),
)
def test_value_and_gradient_are_the_definitions(
    kind: dict[str, Any],
    tokens: int,
    chunk_tokens: int,
    temperature: float,
    weight: float,
    with_targets: bool,
    weighted: bool,
) -> None:
    c = case(tokens, seed=tokens)
    z, t = c["head"](c["hidden"]), c["teacher"].head(c["teacher"].hidden)
    a = c["token_weights"] if weighted else torch.ones(tokens)
    divergences = (a * plain(z, t, temperature, **kind)).sum()
    hard = F.cross_entropy(z, c["targets"], reduction="sum", ignore_index=IGNORE)
    cross_entropy = hard if with_targets else 0 * z.sum()
    expected = (1 - weight) * cross_entropy + weight * temperature**2 * divergences
    (expected_gradient,) = torch.autograd.grad(5 * expected, c["hidden"])

    got = soft_label_loss(
        c["hidden"],
        c["head"],
        c["teacher"],
        c["targets"] if with_targets else None,
        a if weighted else None,
        temperature=temperature,
        weight=weight,
        **kind,
        chunk_tokens=chunk_tokens,
        count=True,
    )
    (gradient,) = torch.autograd.grad(5 * got.loss, c["hidden"])
    torch.testing.assert_close(got.loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.divergence, divergences.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.cross_entropy, cross_entropy.detach(), rtol=1e-12, atol=1e-12)
    assert got.agreement == (z.argmax(-1) == t.argmax(-1)).sum()
    if with_targets:
        assert got.correct == (z.argmax(-1) == c["targets"]).sum()
        taught = F.cross_entropy(t, c["targets"], reduction="sum", ignore_index=IGNORE)
        torch.testing.assert_close(got.teacher_cross_entropy, taught, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "kind", [*KINDS[:4], {"divergence": "reverse-kl", "top_k": 3}], ids=lambda kind: "-".join(map(str, kind.values()))
)
def test_the_written_gradient_is_the_values_own(kind: dict[str, Any]) -> None:
    c = case(4, vocabulary=7, spread=1.0)
    settings: Any = {"temperature": 1.7, "weight": 0.6, "chunk_tokens": 3} | kind

    def loss(hidden: Tensor) -> Tensor:
        return soft_label_loss(hidden, c["head"], c["teacher"], c["targets"], **settings).loss

    assert torch.autograd.gradcheck(loss, (c["hidden"],))


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_divergence_is_trls(beta: float) -> None:
    """Of its GKDTrainer, in fp32: values to 1e-6, whatever p and q are."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason="needs trl with trl.experimental.gkd")
    z, t = torch.randn(2, 40, 300, generator=torch.Generator().manual_seed(1))
    for spread in (0.01, 1.0, 12.0):
        for temperature in (0.7, 3.0):
            theirs = gkd.GKDTrainer.generalized_jsd_loss(
                spread * z[None], spread * t[None], beta=beta, temperature=temperature, reduction="sum"
            )
            ours = soft_label_loss(
                spread * z,
                nn.Identity(),
                Teacher(spread * t, nn.Identity()),
                temperature=temperature,
                divergence="jsd",
                beta=beta,
            ).divergence
            assert abs(ours - theirs).item() <= 1e-6 * max(40, abs(theirs).item())  # the sum of 40 tokens


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
@pytest.mark.parametrize("spread", [1e-4, 1e4])
def test_it_is_finite_and_no_less_than_zero_in_fp32(kind: dict[str, Any], spread: float) -> None:
    """Also where probabilities round to 0, and where all of p is in its likeliest tokens."""
    hidden = (spread * torch.randn(9, 23)).requires_grad_()
    teacher = Teacher(hidden.detach() + spread * torch.randn(9, 23), nn.Identity())
    result = soft_label_loss(hidden, nn.Identity(), teacher, weight=1, **kind)
    (gradient,) = torch.autograd.grad(result.loss, hidden)
    assert gradient.isfinite().all()
    exact = plain(hidden.detach().double(), teacher.hidden.double(), 1.0, **kind).sum()
    if exact.isfinite():  # the definition is not, where a probability is 0
        assert result.divergence.item() == pytest.approx(exact.item(), rel=1e-4, abs=2e-6)
    assert result.divergence >= -2e-6
    assert result.divergence.isfinite()


def both_ways(first: Tensor, second: Tensor, divergence: str) -> tuple[float, float]:
    def of(z: Tensor, t: Tensor) -> float:
        result = soft_label_loss(z, nn.Identity(), Teacher(t, nn.Identity()), weight=1, divergence=divergence)
        return result.loss.item()

    return of(first, second), of(second, first)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_js_is_symmetric_and_bounded_and_kl_is_neither(spread: float) -> None:
    first, step = torch.randn(2, 1, 50, dtype=torch.float64)
    second = first + spread * step
    there, back = both_ways(first, second, "js")
    assert there == pytest.approx(back, rel=1e-9)
    assert 0 <= there <= math.log(2) + 1e-12
    kl, kl_back = both_ways(first, second, "kl")
    if spread == 0:
        assert there == kl == 0
    elif spread == 1e-3:  # close distributions: a quarter
        assert there == pytest.approx(kl / 4, rel=0.01)
    else:
        assert kl > 2 * there
        assert kl != pytest.approx(kl_back, rel=0.01)


def test_the_gradient_keeps_its_size_when_the_temperature_rises() -> None:
    def size(temperature: float) -> float:
        c = case(8, spread=0.3)
        loss = soft_label_loss(c["hidden"], c["head"], c["teacher"], weight=1, temperature=temperature).loss
        return torch.autograd.grad(loss, c["hidden"])[0].norm().item()

    assert size(40.0) == pytest.approx(size(20.0), rel=0.05)  # both near the limit; without T² a quarter


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_it_is_as_accurate_as_whole_logits(dtype: torch.dtype) -> None:
    c = case(30, vocabulary=500, spread=0.5)
    exact = (0.4 * F.cross_entropy(c["head"](c["hidden"]), c["targets"], reduction="sum", ignore_index=IGNORE)) + (
        0.6 * plain(c["head"](c["hidden"]), c["teacher"].head(c["teacher"].hidden), 1.0, "kl").sum()
    )
    (exact_gradient,) = torch.autograd.grad(exact, c["hidden"])
    hidden = c["hidden"].detach().float().requires_grad_()
    head, teacher = c["head"].float(), Teacher(c["teacher"].hidden.float(), c["teacher"].head.float())
    with torch.autocast("cpu", dtype=dtype):
        z, t = head(hidden).float(), teacher.head(teacher.hidden).float()
        log_q, log_p = z.log_softmax(-1), t.log_softmax(-1)
        whole = 0.4 * F.cross_entropy(z, c["targets"], reduction="sum", ignore_index=IGNORE)
        whole = whole + 0.6 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        ours = soft_label_loss(hidden, head, teacher, c["targets"], weight=0.6, chunk_tokens=7).loss
    errors = []
    for loss in (whole, ours):
        (gradient,) = torch.autograd.grad(1024 * loss, hidden)
        errors.append((gradient.double() / 1024 - exact_gradient).norm() / exact_gradient.norm())
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert errors[1] <= 1.5 * errors[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", math.nan),
        ("weight", 1.5),
        ("divergence", "tv"),
        ("chunk_tokens", 0),
        ("top_k", 0),
    ],
)
def test_bad_settings_are_named(name: str, value: Any) -> None:
    for make in (SoftLabelSettings, functools.partial(soft_label_loss, torch.zeros(2, 3), nn.Identity())):
        with pytest.raises(ValueError, match=f"{name}: expected .*, got {value!r}"):
            make(**{name: value})
        with pytest.raises((TypeError, ValueError), match=rf"{name}: expected .*, got \[\]"):
            make(**{name: []})


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match=r"beta: expected None with divergence='kl', got 0\.3"):
        SoftLabelSettings(beta=0.3)
    with pytest.raises(ValueError, match=r"beta: expected a number in \[0, 1\], got 2"):
        SoftLabelSettings(divergence="jsd", beta=2)
    with pytest.raises(ValueError, match="top_k: expected an integer from 1 to 22, got 23"):
        soft_label_loss(*list(case(2).values())[:3], top_k=23)


# Memory


def saved_elements(compute: Callable[[], Tensor], weights: list[Tensor]) -> int:
    """Elements that autograd keeps for the backward, ``weights`` left out."""
    sizes = []
    known = {weight.data_ptr() for weight in weights}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = compute()
    loss.backward()
    return sum(sizes)


def test_no_tensor_of_all_tokens_and_the_vocabulary_is_ever_made() -> None:
    tokens, width, vocabulary, chunk_tokens = 96, 8, 1000, 5
    heads = [nn.Linear(width, vocabulary).requires_grad_(False) for _ in range(2)]
    weights = [p for head in heads for p in head.parameters()]
    hidden, taught = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    targets = torch.randint(vocabulary, (tokens,))

    def chunked(divergence: str) -> Tensor:
        teacher = Teacher(taught, heads[1])
        return soft_label_loss(
            hidden, heads[0], teacher, targets, divergence=divergence, chunk_tokens=chunk_tokens
        ).loss

    for divergence in ("kl", "js", "reverse-kl", "jsd"):
        with Allocations() as made:
            saved = saved_elements(lambda d=divergence: chunked(d), weights)  # type: ignore[misc]
        assert made.largest == width * vocabulary > chunk_tokens * vocabulary  # a transposed view of the weight
        assert saved == tokens * width  # the gradient in the hidden states, and nothing else

    def whole() -> Tensor:
        q, p = heads[0](hidden).log_softmax(-1), heads[1](taught).log_softmax(-1)
        return F.kl_div(q, p, reduction="sum", log_target=True)

    with Allocations() as made:
        assert saved_elements(whole, weights) >= 2 * tokens * vocabulary
    assert made.largest == tokens * vocabulary
