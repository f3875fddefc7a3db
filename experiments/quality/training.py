"""One run: a method on one set, from one seed. All methods share this loop, the head, the optimizer and the schedule.

AdamW with global-norm clipping (``ak.ClippedAdamW``, the defaults of ``ak.TrainConfig``: weight decay 0.01 of matrices,
norm 1, warmup, then linear decay), 8 texts per step, fp32. The head, if the set needs one, learns at a rate of its own,
the same for all methods. The last parameters count: the number of epochs is a part of the description. A run is judged
on the validation texts, a final one on the test texts.

Seeds draw the training texts from the pool, their order, the head's initial weights, in this order and alike for all
methods, and then the method's; methods are compared seed by seed.
"""

import dataclasses
import functools
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapterkern as ak
from adapterkern.training.drift import kl
from adapterkern.training.optimization import decay_groups, make_schedule
from experiments.common import backbone
from experiments.quality import sets
from experiments.quality.methods import Applied, apply
from experiments.quality.models import MODELS, Model, Texts
from experiments.quality.sets import Set
from experiments.quality.statistics import packed
from experiments.quality.stream import stream, suffix

PROTOCOL = 2  # a row of another one is refused: what is a constant in this package is not in its description
BATCH = 8
DRIFT_TEXTS, KEPT_TEXTS, KEPT_PER_STEP = 32, 400, 4  # of a set's validation texts the first 32 and the next
LAYERS = 8  # of the smaller backbone
CHUNK = 256  # tokens whose logits exist at a time


@dataclasses.dataclass(frozen=True, order=True)
class Spec:
    """What determines a run's numbers."""

    data: str  # of sets.SETS
    layers: int  # of the backbone, from the first
    first: int  # the first layer that the method may change
    method: str  # of methods.METHODS
    budget: float  # parameters to train, as a share of the backbone's
    texts: int  # to train on; 0 is all
    epochs: int
    lr: float
    head_lr: float
    seed: int
    warmup: float = 0.06  # share of the steps
    keep: float = 0.0  # weight of KL(untouched || trained) on texts of another kind
    final: bool = False  # whether the test set is evaluated


class World:
    """What the runs of one process share, which needs one: the backbone, the sets, their cached streams."""

    @functools.cache  # noqa: B019
    def _loaded(self, layers: int) -> tuple[Any, Any]:
        return backbone(layers)

    def llama(self, layers: int) -> Any:
        """The first layers of the backbone."""
        return self._loaded(layers)[0]

    @functools.cache  # noqa: B019
    def set(self, name: str) -> Set:
        """A set by its name."""
        return sets.load(name, self._loaded(LAYERS)[1])

    @functools.cache  # noqa: B019
    def stream(self, data: str, part: str, layers: int, first: int) -> np.ndarray | None:
        """The stream of a part, or None if there is nothing below."""
        if not first:
            return None
        found, name = self.set(data), f"{data}-{part}-{self.set(data).digest}-{layers}"
        return stream(self.llama(layers), first, getattr(found, part), name)

    def texts(self, data: str, part: str, layers: int, first: int) -> Texts:
        """A part, as what a suffix from ``first`` on reads."""
        return Texts(getattr(self.set(data), part), self.stream(data, part, layers, first))

    @functools.cache  # noqa: B019
    def untouched(self, data: str, count: int, layers: int, first: int) -> Tensor:
        """The untouched model's states (N, L, d) after the final norm on the first validation texts."""
        applied = apply("head", suffix(self.llama(layers), first), 0)
        texts = self.texts(data, "validation", layers, first)
        found = torch.zeros(count, texts.part.ids.shape[1], applied.suffix.config.hidden_size)
        with torch.no_grad():
            for rows in np.split(np.arange(count), count // 8):
                x, lengths = texts(rows, applied)
                found[rows, : x.shape[1]] = applied.hidden(x, lengths)
        return found


def run(world: World, spec: Spec) -> dict[str, Any]:
    """Train and evaluate; the measured columns of the CSV. Seconds are of CPU."""
    started = time.process_time()
    place, found = (spec.layers, spec.first), world.set(spec.data)
    order = np.random.default_rng(spec.seed)
    pool = order.permutation(len(found.train))[: spec.texts or None]
    model = begin(world, spec)
    steps = -(-len(pool) // BATCH) * spec.epochs
    result = {"parameters": model.applied.size, "train_texts": len(pool), "steps": steps, "digest": found.digest}
    if not _train(world, spec, model, order, pool, steps):
        return result | {"status": "not finite"}
    result |= {"status": "finished", "train_seconds": time.process_time() - started}
    score = model.evaluate(world.texts(spec.data, "test" if spec.final else "validation", *place))
    if spec.final:
        right = score["right"]
        result |= {"test": score["accuracy"], "test_f1": score.get("f1", "")}
        result |= {"right": packed(right), "test_texts": len(right)}
    else:
        result |= {"validation": score["accuracy"], "validation_loss": score["loss"]}
    if spec.layers > LAYERS:  # the first few alone are no language model
        drifts = zip(("drift", "drift_elsewhere"), others(spec.data), strict=True)
        result |= {name: drift(world, spec, model.applied, other) for name, other in drifts}
    return result | {"seconds": time.process_time() - started}


def _train(world: World, spec: Spec, model: Model, order: np.random.Generator, pool: np.ndarray, steps: int) -> bool:
    """Whether the losses stayed finite."""
    if not steps:  # a model as it is, which may have nothing to train
        return True
    texts = world.texts(spec.data, "train", spec.layers, spec.first)
    optimizer = optimizer_of(model.applied, model.head, spec)
    schedule = make_schedule(optimizer, ak.TrainConfig(lr=spec.lr, warmup=spec.warmup), steps)
    keep = _Keep(world, spec) if spec.keep else None
    model.applied.train(True)
    for _ in range(spec.epochs):
        shuffled = order.permutation(pool)
        for start in range(0, len(shuffled), BATCH):
            loss = model.loss(texts, shuffled[start : start + BATCH])
            if keep is not None:
                loss = loss + spec.keep * keep(model.applied)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        if not torch.isfinite(loss):
            return False
    model.applied.train(False)
    return True


def begin(world: World, spec: Spec) -> Model:
    """A new head and the method, with weights drawn from the seed."""
    llama, found = world.llama(spec.layers), world.set(spec.data)
    torch.manual_seed(spec.seed)
    head = nn.Linear(llama.config.hidden_size, found.outputs) if found.outputs else nn.Identity()
    budget = round(spec.budget * llama.num_parameters())
    applied = apply(spec.method, suffix(llama, spec.first, share=spec.method != "full"), budget)
    return MODELS[found.asks](applied, head)


def optimizer_of(applied: Applied, head: nn.Module, spec: Spec) -> ak.ClippedAdamW:
    """AdamW of a method's parameters and of the head's, each at its rate."""
    # IA³'s factors, which are 1 at first, have the shape of matrices
    config = ak.TrainConfig(weight_decay=0.0) if spec.method == "ia3" else ak.TrainConfig()
    groups = decay_groups(applied.parameters, config)
    groups += [group | {"lr": spec.head_lr} for group in decay_groups(dict(head.named_parameters()), config)]
    return ak.ClippedAdamW([group for group in groups if group["params"]], lr=spec.lr, max_norm=config.max_norm)


# What a model has forgotten


def others(data: str) -> list[str]:
    """The two sets on which the drift of a run on ``data`` is measured; the first also is what a run may keep."""
    return [name for name in ("20news", "questions", "r8") if name != data][:2]


class Drift:
    """KL(untouched ‖ trained) on the first validation texts of another set, after each token that has a next one."""

    def __init__(self, world: World, spec: Spec, count: int, other: str) -> None:
        place = spec.layers, spec.first
        self._texts = world.texts(other, "validation", *place)
        self._untouched = world.untouched(other, count, *place)
        self._before = world.llama(spec.layers).lm_head

    def __call__(self, applied: Applied, rows: Any) -> tuple[Tensor, int]:
        """Its sum over the tokens of these rows, in nats, and their number."""
        x, lengths = self._texts(rows, applied)
        real = torch.arange(x.shape[1]) < lengths[:, None] - 1
        states, old = applied.hidden(x, lengths)[real], self._untouched[rows][:, : x.shape[1]][real]
        chunks = zip(states.split(CHUNK), old.split(CHUNK), strict=True)
        total = sum(divergence(*chunk, applied.suffix.lm_head, self._before) for chunk in chunks)
        return torch.as_tensor(total), len(states)


def divergence(states: Tensor, untouched: Tensor, lm_head: Any, before: Any) -> Tensor:
    """The summed KL(untouched ‖ trained) over tokens, in nats, of states (T, d) after the final norm."""
    log_p, log_q = F.log_softmax(before(untouched), -1), F.log_softmax(lm_head(states), -1)
    return kl(log_p, log_q, log_p.exp()).sum()


@torch.no_grad()
def drift(world: World, spec: Spec, applied: Applied, other: str) -> float:
    """KL(untouched ‖ trained) in nats per token, on held-out texts of another set."""
    measure = Drift(world, spec, DRIFT_TEXTS, other)
    sums = [measure(applied, rows) for rows in np.split(np.arange(DRIFT_TEXTS), DRIFT_TEXTS // 8)]
    return float(sum(total for total, _ in sums)) / sum(tokens for _, tokens in sums)


class _Keep:
    """The drift per token on a few more texts of the first of ``others``, drawn per step: what keeps behavior."""

    def __init__(self, world: World, spec: Spec) -> None:
        self._drift = Drift(world, spec, KEPT_TEXTS, others(spec.data)[0])
        self._draws = np.random.default_rng((spec.seed, 1))  # its own: the order of the texts is that without it

    def __call__(self, applied: Applied) -> Tensor:
        rows = self._draws.choice(np.arange(DRIFT_TEXTS, KEPT_TEXTS), KEPT_PER_STEP, False)
        total, tokens = self._drift(applied, rows)
        return total / max(tokens, 1)
