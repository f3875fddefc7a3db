"""Smoothed labels and weighted classes, against torch's own mean over a whole step."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from adapterkern.training import ClassificationHead, TrainResult, evaluate, train
from adapterkern.training.data.batches import collate
from adapterkern.training.task import Task
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
# 6 of one label, 18 of the other, in texts of different lengths
ROWS = [row for i, row in enumerate(tiny_run.rows(60, seed=4)) if row["label"] == "yes" or i % 3 == 0][:24]
HEAD = ["no", "yes"]


def run(model: Any, head: Any, **values: Any) -> TrainResult:
    config = tiny_run.quiet(**({"log_every": 1, "max_steps": 1, "batch_size": 24, "warmup": 0} | values))
    return train(model, ROWS, config, tokenizer=TOKENIZER, head=head, eval_data=ROWS)


def head(labels: list[str]) -> ClassificationHead:
    torch.manual_seed(0)
    return ClassificationHead(32, labels)


def scores_and_targets(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all rows before the first step, fp64."""
    model, config = tiny_run.model(), tiny_run.quiet(task=task)
    made = Task(model, head(HEAD) if task == "classification" else None)
    batch = collate(made.load(ROWS, config, TOKENIZER), config)
    with torch.no_grad():
        hidden = made.hidden(batch)
        if made.head is not None:
            return made.head(hidden, batch["attention_mask"]).double(), batch["targets"]
        return model.logits_of(hidden.flatten(0, 1)[batch["positions"]]).double(), batch["targets"]


@pytest.mark.parametrize(
    "values",
    [
        {"label_smoothing": 0.2},
        {"class_weights": "balanced"},
        {"class_weights": {"yes": 0.25, "no": 3}, "label_smoothing": 0.1},
        {"label_smoothing": 0.2, "task": "causal-lm"},
    ],
    ids=["smoothing", "balanced", "both", "causal-lm"],
)
def test_a_step_has_torch_s_mean_in_whatever_forwards_its_rows_are(values: dict[str, Any]) -> None:
    task = values.get("task", "classification")
    scores, targets = scores_and_targets(task)
    weights = values.get("class_weights")
    if weights == "balanced":
        counts = torch.bincount(targets).tolist()
        assert min(counts) < max(counts) / 2
        weights = dict(
            zip(HEAD, compute_class_weight("balanced", classes=np.arange(2), y=targets.numpy()), strict=True)
        )
    weight = None if weights is None else torch.tensor([weights[name] for name in HEAD], dtype=torch.float64)
    smoothing = values.get("label_smoothing", 0.0)
    expected = F.cross_entropy(scores, targets, weight=weight, label_smoothing=smoothing).item()
    plain = F.cross_entropy(scores, targets).item()
    assert abs(expected - plain) > 1e-3

    outcomes = []
    for batch_size, accumulation in ((24, 1), (5, 5)):
        model, own = tiny_run.model(), head(HEAD) if task == "classification" else None
        split = {"batch_size": batch_size, "accumulation": accumulation, "lr": 1e-3, "eps": 1e-4}
        result = run(model, own, **(values | split | {"max_steps": 2}))
        assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
        outcomes.append(tiny_run.weights(model, own))
        # An evaluation's loss is plain: that of the trained model without these settings.
        config = tiny_run.quiet(task=task)
        again = evaluate(model, ROWS, config, tokenizer=TOKENIZER, head=own)
        assert result.metrics is not None
        assert result.metrics["loss"] == pytest.approx(again["loss"], rel=1e-6)
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_refusals() -> None:
    for weights, message in (
        ({"no": 1.0}, "class_weights: expected a weight for each label, 'no', 'yes'; 'yes' is missing"),
        ({"no": 1.0, "yes": 2.0, "maybe": 1.0}, "'no', 'yes'; 'maybe' is none of them"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tiny_run.model(), None, class_weights=weights)
    for values, message in (
        ({"class_weights": "balance"}, r"class_weights: expected balanced \(in Python: .*\), got 'balance'"),
        ({"class_weights": {"no": 0.0}}, r"class_weights: 'no': expected a number in \(0, inf\), got 0.0"),
        ({"class_weights": "balanced", "task": "causal-lm"}, "class_weights: expected None with task='causal-lm'"),
        ({"label_smoothing": 1.5}, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_run.quiet(**values)

    class Other(Task[Any]):
        def loss(self, hidden: torch.Tensor, batch: Any) -> Any:
            raise AssertionError

    model, config = tiny_run.model(), tiny_run.quiet(label_smoothing=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing: expected 0.0 for Other, which has a loss of its own, got"):
        train(model, ROWS, config, tokenizer=TOKENIZER, task=Other(model))
