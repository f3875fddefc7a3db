"""Lists of labels and numbers: what a column may hold, their losses and scores against other programs'."""

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats  # scikit-learn has it
from sklearn import metrics
from torch import Tensor

import adapterkern as ak
from adapterkern.inference.label_report import make_label_report
from adapterkern.inference.number_report import make_number_report
from adapterkern.inference.report import check_directory, write_report
from adapterkern.training import (
    CheckpointError,
    DataError,
    HeldOut,
    MultiLabelHead,
    RegressionHead,
    load_examples,
    train,
)
from adapterkern.training.config import LABELED
from adapterkern.training.data.batches import collate, count_targets, fingerprint
from adapterkern.training.data.examples import check_data, numbered
from adapterkern.training.data.split import split
from adapterkern.training.data.targets import TARGETS
from adapterkern.training.head_kinds import HEADS
from adapterkern.training.scores import label_scores, number_scores
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
SETS = [["a"], ["b", "a"], [], ["c"], ["a"], ["b"], []]
NUMBERS = [1e9 + 0.5, 1e9, 1e9 - 7.25, 1e9 + 3, 1e9 + 1, 1e9 - 1, 1e9 + 2]
LABELS: dict[str, list[Any]] = {"multi-label": SETS, "regression": NUMBERS}


def rows(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"text": "w1 " * (n % 4 + 1) + f"w{n}", "label": label} for n, label in enumerate(labels)]


def by_hand(task: str, scores: Tensor, labels: list[Any]) -> Tensor:
    """The mean loss of fp64 scores, from torch's own functions."""
    if task == "multi-label":
        wanted = torch.tensor([[float(name in of_row) for name in "abc"] for of_row in labels], dtype=torch.float64)
        return F.binary_cross_entropy(scores.sigmoid(), wanted)
    y = torch.tensor(labels, dtype=torch.float64)
    return F.mse_loss(scores[:, 0], (y - y.mean()) / y.std(correction=0))


@pytest.mark.parametrize("task", ["multi-label", "regression"])
def test_a_step_is_the_gradient_of_the_mean_loss(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in forwards of 3, 3 and 1: each row weighs the same, whichever forward it is in."""
    data, model = rows(LABELS[task]), tiny_run.model()
    config = tiny_run.quiet(task=task, batch_size=3, accumulation=3, max_steps=1, max_norm=1e9, train_adapters=False)
    seen: list[Tensor] = []
    step = ak.ClippedAdamW.step

    def stepping(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(p.grad.clone() for group in optimizer.param_groups for p in group["params"])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(ak.ClippedAdamW, "step", stepping)
    head = HEADS[task].of_data(32, ["a", "b", "c"], [np.array([y]) for y in NUMBERS], "mean")
    before = head.linear.weight.detach().double(), head.linear.bias.detach().double()
    result = train(model, data, config, tokenizer=TOKENIZER, head=head)
    examples, _ = load_examples(data, config, TOKENIZER, head.labels)
    with torch.no_grad(), model.disable_adapter():
        texts = (torch.from_numpy(example.input_ids)[None] for example in examples)
        states = [model.decoder(input_ids=ids)[0][0].double().mean(0) for ids in texts]
    weight, bias = (p.clone().requires_grad_() for p in before)
    loss = by_hand(task, torch.stack(states) @ weight.T + bias, LABELS[task])
    loss.backward()
    assert result.history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for found, wanted in zip(sorted(seen, key=Tensor.dim), (bias.grad, weight.grad), strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)


def test_scores_are_those_of_scikit_learn_and_scipy() -> None:
    draw = np.random.default_rng(0)
    for labels in (1, 5):
        true, scores = draw.integers(0, 2, (40, labels)), draw.normal(size=(40, labels))
        true[:, 0] = scores[:, 0] = 0  # never, and never predicted
        found = label_scores(true, scores > 0)
        one = {"labels": [1]} if labels == 1 else {}
        for average in ("micro", "macro"):
            expected = metrics.f1_score(true, scores > 0, average=average, zero_division=0, **one)
            assert found[f"f1_{average}"] == pytest.approx(expected), (labels, average)
    head = MultiLabelHead(4, ["none", "a", "b", "c", "d"])
    report = make_label_report(head, true, scores, [f"row {n}" for n in range(40)])
    assert (report.absent, [one.label for one in report.labels]) == (1, ["a", "b", "c", "d"])
    columns = metrics.precision_recall_fscore_support(true[:, 1:], scores[:, 1:] > 0, zero_division=0)
    assert [(one.precision, one.recall, one.f1, one.support) for one in report.labels] == [
        pytest.approx(of_label) for of_label in zip(*columns, strict=True)
    ]
    for name, values in report.averages.items():
        expected = metrics.precision_recall_fscore_support(true[:, 1:], scores[:, 1:] > 0, average=name)[:3]
        assert values == pytest.approx(expected), name
    assert report.accuracy == pytest.approx(metrics.accuracy_score(true, scores > 0))
    both = zip(true, 1 / (1 + np.exp(-scores)), strict=True)
    assert report.wrong[0].loss == pytest.approx(max(metrics.log_loss(*of_row, labels=[0, 1]) for of_row in both))

    y, x = draw.normal(1e6, 1, 30), draw.normal(1e6, 1, 30)
    y[:9] = y[0]  # ties
    assert number_scores(y, x) == pytest.approx(
        {
            "rmse": metrics.root_mean_squared_error(y, x),
            "mae": metrics.mean_absolute_error(y, x),
            "r2": metrics.r2_score(y, x),
            "pearson": stats.pearsonr(y, x).statistic,
            "spearman": stats.spearmanr(y, x).statistic,
        }
    )
    assert number_scores(y, y[:1].repeat(30)).keys() == {"rmse", "mae", "r2"}
    assert number_scores(y[:1], x[:1]).keys() == {"rmse", "mae"}


def test_an_evaluation_counts_every_row_once() -> None:
    """In uneven batches, sorted by length; accuracy is of whole rows."""
    for task in LABELS:
        model, config = tiny_run.model(), tiny_run.quiet(task=task, max_steps=2, batch_size=3, max_norm=1.0)
        result = train(model, rows(LABELS[task]), config, tokenizer=TOKENIZER)
        head, answers = result.head, list[Any]()
        assert head is not None
        found = ak.evaluate(model, rows(LABELS[task]), config, tokenizer=TOKENIZER, head=head, answers=answers)
        answers.sort(key=lambda one: one.example.row)
        scores = torch.tensor(np.stack([one.scores for one in answers])).double()
        assert found["loss"] == pytest.approx(by_hand(task, scores, LABELS[task]).item(), rel=1e-5)
        predicted = ak.predict(model, rows(LABELS[task]), config, tokenizer=TOKENIZER, head=head)
        if task == "multi-label":
            right = [set(one.labels) == set(of_row) for one, of_row in zip(predicted, SETS, strict=True)]
            assert (found["accuracy"], found["targets"]) == (sum(right) / 7, 21)
            expected = dict(zip("abc", scores[0].sigmoid().tolist(), strict=True))
            assert predicted[0].probabilities == pytest.approx(expected)
        else:
            errors = [one.value - y for one, y in zip(predicted, NUMBERS, strict=True)]
            assert "accuracy" not in found
            assert found["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-3)
            assert found["rmse"] ** 2 / np.var(NUMBERS) == pytest.approx(found["loss"], rel=1e-4)


def test_heads_are_saved_with_their_kind(tmp_path: Path) -> None:
    RegressionHead(4, mean=0.1 + 0.2, std=1e-7, pooling="last").save_pretrained(tmp_path)
    read = RegressionHead.from_pretrained(tmp_path)
    assert (read.mean, read.std, read.pooling, read.labels) == (0.1 + 0.2, 1e-7, "last", [])
    with pytest.raises(ValueError, match="expected a classification head of format_version 1, got regression"):
        HEADS["classification"].from_pretrained(tmp_path)
    config = json.loads((tmp_path / "head_config.json").read_text())
    (tmp_path / "head_config.json").write_text(json.dumps(config | {"std": 0.0}))
    with pytest.raises(ValueError, match=r"head_config.json: std: expected a number in \(0, inf\), got 0.0"):
        RegressionHead.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="head: expected one for task 'multi-label', got one for 'regression'"):
        train(tiny_run.model(), rows(SETS), tiny_run.quiet(task="multi-label"), tokenizer=TOKENIZER, head=read)


def test_a_resumed_run_goes_on_with_a_head_like_its_own(tmp_path: Path) -> None:
    """Its parameters fit any head of its size, and its scores would have another scale, or read other states."""
    config = tiny_run.quiet(task="regression", max_steps=2, output_dir=tmp_path)
    given = {"tokenizer": TOKENIZER}
    train(tiny_run.model(), rows(NUMBERS), config, **given, head=RegressionHead(32, 0.0, 50.0))
    resumed = dataclasses.replace(config, resume=True, max_steps=3)
    for other, message in (
        (None, r"state.json: the run was begun with mean=0.0 in its head, not \d.*: resume with the same"),
        (RegressionHead(32, 0.0, 51.0), "begun with std=50.0 in its head, not 51.0"),
        (RegressionHead(32, 0.0, 50.0, pooling="last"), "begun with pooling='mean' in its head, not 'last'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            train(tiny_run.model(), rows(NUMBERS), resumed, **given, head=other)
    assert train(tiny_run.model(), rows(NUMBERS), resumed, **given, head=RegressionHead(32, 0.0, 50.0)).steps == 3


def test_numbers_are_fingerprinted_exactly() -> None:
    config = tiny_run.quiet(task="regression")

    def of(value: Any) -> str:
        return fingerprint(load_examples(rows([value, 2]), config, TOKENIZER)[0])

    assert len({of(value) for value in (0.25, 0.75, 0.1 + 0.2, 0.3)}) == 4
    assert of("0.25") == of(0.25) == of(np.float32(0.25))
    assert of(-0.0) == of(0)


CELLS = {  # what is wrong with the third line, by task
    ("multi-label", "a|b"): """[] for none; in CSV as JSON, ["a", "b"]; got 'a|b'""",
    ("multi-label", "['a']"): "in CSV as JSON",
    ("multi-label", ""): """or [] for none; in CSV as JSON, ["a", "b"]; got ''""",
    ("multi-label", '["a", 0.5]'): "got 0.5 in the list",
    ("multi-label", '["a", ["b"]]'): "got ['b'] in the list",
    ("multi-label", '["a", "a"]'): "expected each label once, got 'a' again",
    ("multi-label", "[0, 1, 0]"): "got '0' again: name the labels that a text has, and not 0 or 1 for each",
    ("regression", "a"): "expected a finite number, in fp32, got 'a'",
    ("regression", "nan"): "got 'nan'",
    ("regression", "1,5"): "got '1,5'",
    ("regression", "1_000"): "got '1_000'",
    ("regression", "1e39"): "got '1e39'",
    ("regression", ""): "expected a finite number, got an empty one",
}


@pytest.mark.parametrize(("task", "cell"), CELLS)
def test_a_cell_that_is_no_label(task: str, cell: str, tmp_path: Path) -> None:
    good = {"multi-label": ['["a", "b"]', "[]"], "regression": ["-1.5e3", " 2 "]}[task]
    with (tmp_path / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["w1", good[0]], ["w2", cell], ["w3", good[1]]])
    config = tiny_run.quiet(task=task)
    with pytest.raises(DataError) as error:
        check_data(tmp_path / "data.csv", config)
    assert "data.csv:3: column 'label': expected " in str(error.value)
    assert CELLS[task, cell] in str(error.value)
    examples, names = load_examples(tmp_path / "data.csv", tiny_run.quiet(task=task, skip_bad_rows=True), TOKENIZER)
    expected = {"multi-label": ([[1, 1], [0, 0]], ["a", "b"]), "regression": ([[-1500.0], [2.0]], [])}[task]
    assert ([example.targets.tolist() for example in examples], names) == expected


@pytest.mark.parametrize(
    ("task", "labels", "why"),
    [
        ("classification", [["a"], ["b"]], r"row 0: .* \(a list of labels is for task='multi-label'\), got list"),
        ("classification", [0.5, 1.5], "row 0: .*, got the number 0.5; numbers are for task='regression'"),
        ("multi-label", [[], []], "expected at least one label, got empty lists alone"),
        ("multi-label", ["a", "b"], r"row 0: column 'label': expected a list of labels"),
        ("multi-label", [None, ["a"]], "row 0: .*, got None"),
        ("regression", [3, 3.0, "3"], "expected at least two different numbers, got 3.0"),
        ("regression", [True, 1], "row 0: column 'label': expected a finite number, .*got True"),
        ("regression", [[1.0], 1], "row 0: column 'label': expected a finite number, got list"),
        ("regression", [10**400, 1], "row 0: column 'label': expected a finite number"),
    ],
)
def test_labels_of_another_task(task: str, labels: list[Any], why: str) -> None:
    with pytest.raises(DataError, match=why):
        check_data(rows(labels), tiny_run.quiet(task=task))


def test_text_labels_that_look_like_another_task_s_are_named() -> None:
    suspicious = TARGETS["classification"].suspicious
    assert any("which the task multi-label learns: '[]'" in line for line in suspicious({"[]": 5, "a": 5}))
    assert any("which the task regression learns" in line for line in suspicious(dict.fromkeys(map(str, range(30)), 9)))
    assert suspicious({"1": 5, "2": 5}) == []


def test_what_else_a_list_may_be() -> None:
    config = tiny_run.quiet(task="multi-label")
    for labels in (np.array([1, 10]), (10, 1), {1, 10}, torch.tensor([10, 1]), "[10, 1]", ["1", 10]):
        examples, names = load_examples(rows([labels, [2]]), config, TOKENIZER)
        assert names == ["1", "2", "10"]
        assert examples[0].targets.tolist() == [1, 0, 1]
    with pytest.raises(
        DataError, match="row 1: column 'label': label 'd' is not one of the training's labels 'a', 'b'"
    ):
        load_examples(rows([["a"], ["a", "d"]]), config, TOKENIZER, ["a", "b"])


def test_a_share_has_its_part_of_the_rare_labels_and_of_all_numbers() -> None:
    sets = [["common"], ["common", "rare"], ["common", "middle"], []]
    of = rows([sets[0 if n % 10 < 5 else 3 if n % 10 < 7 else 2 if n % 10 < 9 else 1] for n in range(100)] + [["once"]])
    config = tiny_run.quiet(task="multi-label")
    examples, names = load_examples(of, config, TOKENIZER)
    learned, held = split(numbered(examples), HeldOut(of, "20%", 0), targets=TARGETS["multi-label"])
    assert (names, TARGETS["multi-label"].rows([e.targets for e in held], names)) == (
        ["common", "middle", "once", "rare"],
        {"common": 16, "middle": 4, "rare": 2},
    )
    assert sum(not e.targets.any() for e in held) == 4
    assert len(learned) == 81

    draw = np.random.default_rng(0)
    of = rows((draw.permutation(100) ** 3).tolist())
    examples, _ = load_examples(of, tiny_run.quiet(task="regression"), TOKENIZER)
    for seed in range(3):
        _, held = split(numbered(examples), HeldOut(of, "20%", seed), targets=TARGETS["regression"])
        tenths = [int(round(e.targets[0] ** (1 / 3)) // 10) for e in held]
        assert sorted(tenths) == sorted([*range(10)] * 2)


def test_a_batch_has_the_targets_of_its_rows() -> None:
    for task, labels in LABELS.items():
        config = tiny_run.quiet(task=task)
        examples, _ = load_examples(rows(labels), config, TOKENIZER)
        batch = collate(examples, config)
        assert batch.keys() == {"input_ids", "attention_mask", "targets"}
        assert len(batch["targets"]) == count_targets(examples) == (21 if task == "multi-label" else 7)
    assert batch["targets"].tolist() == NUMBERS


def test_reports_say_which_rows(tmp_path: Path) -> None:
    head = RegressionHead(4, mean=10.0, std=2.0)
    y, z = np.array([[10.0], [14.0], [8.0]]), np.array([[0.0], [0.5], [np.nan]], dtype=np.float32)
    places = ["a:1", "a:2", "a:3"]
    report = make_number_report(head, y, z, places)
    assert [(row.place, row.label) for row in report.wrong] == [("a:2", 14.0), ("a:1", 10.0), ("a:3", 8.0)]
    assert report.wrong[0].error == -3
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["numbers"] == {"rmse": None, "mae": None}
    assert (tmp_path / "predicted.png").stat().st_size > 1000
    other = MultiLabelHead(4, ["a", "b"])
    of_labels = make_label_report(other, np.array([[1, 0]]), np.array([[-3.0, 1.0]]), places[:1])
    check_directory(tmp_path)
    write_report(of_labels, tmp_path)
    assert not (tmp_path / "predicted.png").exists()  # of the earlier report
    (row,) = [json.loads(line) for line in (tmp_path / "wrong.jsonl").open()]
    assert (row["labels"], row["predicted"]) == (["a"], ["b"])
    assert row["loss"] == pytest.approx((np.log1p(np.exp(3)) + np.log1p(np.exp(1))) / 2)
    assert "1 of 1 rows are not all right" in (tmp_path / "report.txt").read_text()


def test_every_task_with_labels_has_its_targets_and_its_head() -> None:
    assert tuple(TARGETS) == tuple(HEADS) == LABELED


def test_recipes_refuse_by_name() -> None:
    from adapterkern.recipes.ablation.presets import PRESETS
    from adapterkern.recipes.distillation import KeepBehaviour
    from adapterkern.recipes.multitask import MultiTask

    model, config = tiny_run.model(), tiny_run.quiet(task="multi-label")
    for task in (MultiTask(model, ["default"]), KeepBehaviour(model)):
        with pytest.raises(ValueError, match="task: expected classification or causal-lm"):
            task.load(rows(SETS), config, TOKENIZER)
    with pytest.raises(ValueError, match="task: expected one with an accuracy"):
        dataclasses.replace(PRESETS["where"], training=tiny_run.quiet(task="regression"))


def test_a_router_learns_them_too() -> None:
    from adapterkern.recipes.routing import RoutedTask, RoutingConfig

    for task, score in (("multi-label", "f1_micro"), ("regression", "rmse")):
        routed = RoutedTask(tiny_run.model(), RoutingConfig(experts=2, skip=False))
        config = tiny_run.quiet(task=task, max_steps=2)
        data = rows(LABELS[task])
        found = train(routed.model, data, config, tokenizer=TOKENIZER, task=routed, eval_data=data)
        assert found.metrics is not None
        assert found.metrics["expert_0"] + found.metrics["expert_1"] == 1
        assert score in found.metrics


def test_the_loss_does_not_depend_on_the_unit() -> None:
    """Kelvin or millionths of it: the same weights, to rounding."""
    found = []
    for scale, offset in ((1.0, 0.0), (1e6, 1e9)):
        model = tiny_run.model()
        labels = [scale * (y - 1e9) + offset for y in NUMBERS]
        result = train(model, rows(labels), tiny_run.quiet(task="regression", max_steps=3), tokenizer=TOKENIZER)
        found.append(tiny_run.weights(model, result.head))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
