"""The comparison at equal parameters: sizes, starts, one loop for all, choices by validation alone, intervals."""

import dataclasses
import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from adapterkern.training.run.lock import locked
from experiments.quality import costs, pictures, plan, report, rows, training, work
from experiments.quality.__main__ import main, tables
from experiments.quality.methods import METHODS, OWN_SIZE, apply
from experiments.quality.models import LONGEST_ANSWER, best_spans
from experiments.quality.sets import Part, Set, _cut
from experiments.quality.statistics import over_seeds, over_texts, packed, unpacked
from experiments.quality.stream import suffix
from experiments.quality.training import Spec, World, begin, divergence, drift, others, run
from tests.support.tiny_llama import tiny

pytest.importorskip("peft", reason="LoRA, IA³ and prompts are PEFT's")

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "quality"
SPEC = Spec("r8", 4, 2, "adapter", 0.02, 48, 2, 2e-2, 2e-2, 1, final=True)
D = 32
ASKS: dict[str, Any] = {"questions": "span", "instructions": "text"}


class Small(World):
    """A tiny backbone, and texts whose label is whether they have token 3, or whose answer begins with it."""

    @functools.cache  # noqa: B019
    def llama(self, layers: int) -> Any:
        return tiny(num_hidden_layers=layers)

    @functools.cache  # noqa: B019
    def set(self, name: str) -> Set:
        parts = (_part(name, i, n) for i, n in enumerate((400, 400, 50)))
        return Set(name, ASKS.get(name, "label"), 0 if name == "instructions" else 2, *parts)


def _part(name: str, seed: int, count: int) -> Part:
    drawn = np.random.default_rng([seed, len(name)])
    ids = drawn.integers(4, 128, (count, 12), np.int32)
    lengths = drawn.integers(8, 13, count)
    if name != "questions":
        labels = drawn.integers(0, 2, count)
        ids[labels > 0, 1] = 3
        if name == "instructions":  # 5 or 6 twice, and the end
            ids[:, 9:] = np.stack([5 + labels, 5 + labels, np.full(count, 2)], 1)
            return Part(ids, np.full(count, 12), np.zeros((count, 0), int), np.full(count, 9))
        return Part(ids, lengths, labels, np.zeros(count, int))
    at = drawn.integers(4, 7, count)
    ids[np.arange(count), at] = 3
    context = "abcdefghijkl"  # a letter per token
    texts = tuple((context, context[i - 2 : i], tuple((j, j + 1) for j in range(10))) for i in at)
    return Part(ids, lengths, np.stack([at, at + 1], 1), np.full(count, 2), texts)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADAPTERKERN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Small()


@pytest.mark.parametrize("method", METHODS)
def test_a_method_starts_from_the_untouched_model_and_trains_all_that_it_counts(method: str, world: Small) -> None:
    llama = world.llama(4)
    torch.manual_seed(0)
    applied = apply(method, suffix(llama, 2, share=method != "full"), 2000)
    ids = torch.from_numpy(world.set("r8").train.ids[:16]).long()
    with torch.no_grad():
        whole = llama.model(ids, output_hidden_states=True)
    lengths = torch.full((16,), 12)
    stream = applied.suffix.model.embed_tokens(ids) if method == "full" else whole.hidden_states[2]
    if method != "full":
        torch.testing.assert_close(applied.hidden(stream, lengths), whole.last_hidden_state)
    for name, p in applied.parameters.items():  # where a factor is 0 the other one learns nothing yet
        with torch.no_grad():
            p.add_(0.1 * torch.randn_like(p), alpha=float(p.ndim < 2 or "down" not in name.split(".")))
    loss = (applied.hidden(stream, lengths).sin().sum() + applied.extra()) * (1 if applied.parameters else 0)
    if applied.parameters:
        loss.backward()
    lm_head = {"lm_head.weight"} if method == "full" else set()  # no part of a classification
    assert {name for name, p in applied.parameters.items() if p.grad is None or not p.grad.any()} <= lm_head
    assert all(p.grad is None for p in llama.parameters())


def test_sizes_are_those_of_the_budget() -> None:
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    llama = tiny(num_hidden_layers=4, **smollm2)
    for budget in (169_897, 1_698_969):
        sizes = {m: apply(m, suffix(llama, 0), budget).size for m in METHODS if m not in OWN_SIZE}
        assert all(abs(size / budget - 1) < 0.02 for size in sizes.values()), sizes
    rank = 576 * 4 + 192 * 2 + 576 * 2 + (576 + 1536) * 3  # of q, k, v, o, gate, up, down
    assert apply("lora", suffix(llama, 0), 5 * rank).size == 5 * rank  # ranks 2 and 3


@pytest.fixture
def a_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers are enough for a drift."""
    monkeypatch.setattr(training, "LAYERS", 3)


def test_a_run_learns_and_its_columns_are_true(world: Small) -> None:
    found = run(world, dataclasses.replace(SPEC, epochs=4, texts=0))
    assert found["status"] == "finished"
    assert (found["train_texts"], found["steps"]) == (400, 4 * 50)
    right = unpacked(found["right"], found["test_texts"])
    assert right.mean() == found["test"] > 0.7
    assert "validation" not in found
    assert "drift" not in found
    searched = run(world, dataclasses.replace(SPEC, epochs=4, texts=0, final=False))
    assert searched["validation"] > 0.7
    assert "test" not in searched


@pytest.mark.usefixtures("a_language_model")
def test_a_run_is_a_function_of_its_description(world: Small) -> None:
    def numbers(spec: Spec) -> dict[str, Any]:
        return {name: value for name, value in run(world, spec).items() if "seconds" not in name}

    spec = dataclasses.replace(SPEC, texts=0, epochs=1)
    again = numbers(spec)
    assert numbers(spec) == again
    assert again["drift"] > 1e-4
    assert again["drift_elsewhere"] > 1e-4
    assert numbers(dataclasses.replace(spec, seed=2))["drift"] != again["drift"]
    assert numbers(dataclasses.replace(spec, head_lr=1e-3))["test"] != again["test"]
    kept = numbers(dataclasses.replace(spec, keep=30.0))
    assert kept["drift"] < 0.75 * again["drift"]


def test_all_methods_get_the_same_head_from_a_seed(world: Small) -> None:
    heads = [
        begin(world, dataclasses.replace(SPEC, method=method, budget=0.1)).head.weight
        for method in ("head", "lora", "routed")
    ]
    assert torch.equal(heads[0], heads[1])
    assert torch.equal(heads[0], heads[2])


def test_nothing_drifts_untrained(world: Small) -> None:
    applied = apply("adapter", suffix(world.llama(4), 2), 2000)
    assert drift(world, SPEC, applied, "20news") == pytest.approx(0, abs=1e-6)


def test_drift_is_measured_on_two_other_sets() -> None:
    assert [others(name) for name in ("r8", "20news", "questions")] == [
        ["20news", "questions"], ["questions", "r8"], ["20news", "r8"]
    ]  # fmt: skip


def test_no_passage_is_in_two_parts() -> None:
    parts = _cut([[1, 2], [3], [4, 5, 6], [7], [8, 9]], 3, 1)
    assert parts == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_questions(world: Small) -> None:
    found = run(world, dataclasses.replace(SPEC, data="questions", method="lora", texts=0, epochs=2))
    assert found["test"] > 0.5
    assert found["test_f1"] >= found["test"]


def test_an_answer_is_right_if_it_is_what_greedy_decoding_writes(world: Small) -> None:
    spec = dataclasses.replace(SPEC, data="instructions", method="full", first=0, texts=0, epochs=2, lr=2e-3)
    model, found = begin(world, spec), world.set(spec.data)
    assert training._train(world, spec, model, np.random.default_rng(0), np.arange(400), 100)
    texts = world.texts("instructions", "test", 4, 0)
    ids = found.test.ids.copy()
    ids[:10, 10], ids[10:20, 9] = 7, 7  # whose answers it has not learned
    texts.part = dataclasses.replace(found.test, ids=ids)
    right = model.evaluate(texts)["right"]
    assert right.mean() == 0.6
    written = torch.from_numpy(ids[:, :9]).long()
    for _ in range(3):
        logits = model.applied.suffix(input_ids=written).logits[:, -1]
        written = torch.cat([written, logits.argmax(1, keepdim=True)], 1)
    assert right.tolist() == (written.numpy() == ids).all(1).tolist()
    rows = np.arange(8)
    logits = model.applied.suffix(input_ids=torch.from_numpy(ids[rows]).long()).logits
    answers = torch.from_numpy(ids[rows, 9:]).long()
    expected = F.cross_entropy(logits[:, 8:11].flatten(0, 1), answers.flatten())
    torch.testing.assert_close(model.loss(texts, rows), expected)


def test_a_model_as_it_is_has_a_row(world: Small) -> None:
    found = run(world, dataclasses.replace(SPEC, data="instructions", method="head", epochs=0))
    assert (found["parameters"], found["steps"], found["status"]) == (0, 0, "finished")
    assert "validation" not in found


def test_best_span_is_that_of_a_loop() -> None:
    scores = torch.randn(3, 2, 30, generator=torch.Generator().manual_seed(0))
    for row, found in zip(scores, best_spans(scores), strict=True):
        spans = [(i, j) for i in range(30) for j in range(i, min(i + LONGEST_ANSWER, 30))]
        assert tuple(found) == max(spans, key=lambda span: float(row[0, span[0]] + row[1, span[1]]))


def test_divergence_is_kl_of_the_untouched_model_from_the_trained_one() -> None:
    states, before, weight = torch.randn(5, D), torch.randn(5, D), torch.randn(11, D)
    p, q = ((s.double() @ weight.double().T).softmax(-1) for s in (before, states))
    expected = (p * (p / q).log()).sum()
    head = functools.partial(F.linear, weight=weight)
    torch.testing.assert_close(divergence(states, before, head, head).double(), expected, rtol=1e-4, atol=1e-5)


# Which runs follow


def _row(spec: Spec, validation: float) -> dict[str, str]:
    result = {"status": "finished", "validation": validation, "validation_loss": 1.0, "parameters": 1, "test": 0.5}
    return rows.row_of(spec, result)


def _finish(group: plan.Group, done: rows.Rows, best: float) -> None:
    """Do all that a group asks for; its validation is best at one rate."""
    while missing := group.missing(done):
        for spec in missing:
            done[spec] = _row(spec, 1 - abs(np.log(spec.lr / best)) / 100)


def test_a_search_goes_on_until_the_best_is_not_the_last() -> None:
    group, done = plan.parts()["r8"][0], rows.Rows()
    first = group.missing(done)
    assert [spec.lr for spec in first] == [2e-3, 6e-3, 2e-2, 6e-2, 0.2]
    assert {(spec.seed, spec.final) for spec in first} == {(0, False)}
    _finish(group, done, 2e-4)
    tried = {spec.lr for spec in done if not spec.final}
    assert min(tried) == 6e-5
    finals = [spec for spec in done if spec.final]
    assert {spec.lr for spec in finals} == {2e-4}
    assert [spec.seed for spec in finals] == [1, 2, 3, 4, 5]


def test_rates_within_a_standard_error_are_tried_again_and_the_best_mean_is_taken() -> None:
    """0.92 on 800 texts has a standard error of 0.0096."""
    group, done = plan.parts()["r8"][0], rows.Rows()
    tried = dict(zip((2e-3, 6e-3, 2e-2, 6e-2, 0.2), (0.9, 0.9105, 0.92, 0.91, 0.85), strict=True))
    done |= {group.tried(rate): _row(group.tried(rate), accuracy) for rate, accuracy in tried.items()}
    again = [dataclasses.replace(group.tried(rate), seed=seed) for rate in (6e-3, 2e-2) for seed in (10, 11)]
    assert group.searched(done) == (again, None)
    assert group.final(done) == []
    done |= {spec: _row(spec, 0.92 if spec.lr == 6e-3 else 0.91) for spec in again}  # 0.9168 and 0.9133
    assert group.searched(done) == ([], group.tried(6e-3))
    done[again[1]]["status"] = "not finite"
    assert group.searched(done) == ([], group.tried(2e-2))


@pytest.mark.parametrize(("neighbor", "best"), [(0.9095, 2e-3), (0.9105, 6e-3)])
def test_another_group_s_rate_stays_unless_a_neighbor_is_better_by_a_standard_error(
    neighbor: float, best: float
) -> None:
    """0.91 on 800 texts has one of 0.0101."""
    group, done = plan.parts()["high"][0], rows.Rows()
    assert group.like is not None
    _finish(group.like, done, 2e-3)
    for spec in group.missing(done):
        done[spec] = _row(spec, {6e-4: 0.85, 2e-3: 0.9, 6e-3: neighbor}[spec.lr])
    while missing := [spec for spec in group.missing(done) if not spec.final]:  # 6e-3 was the last
        done |= {spec: _row(spec, 0.85) for spec in missing}
    assert {spec.lr for spec in group.final(done)} == {best}


def test_the_head_of_another_set_learns_at_the_rate_that_its_search_finds() -> None:
    head, lora, *_ = plan.parts()["20news"]
    done = rows.Rows()
    assert lora.like is not None
    _finish(lora.like, done, 2e-3)
    assert {spec.method for spec in lora.missing(done)} == {"head"}
    _finish(head, done, 2e-2)
    assert {(spec.lr, spec.head_lr) for spec in lora.missing(done)} == {(rate, 2e-2) for rate in (6e-4, 2e-3, 6e-3)}
    assert {(spec.lr, spec.head_lr) for spec in head.final(done)} == {(2e-2, 2e-2)}
    keep, whole = plan.parts()["keep"][0], plan.parts()["whole"]
    for group in (*plan.parts()["r8"][:4], *whole):
        _finish(group, done, 6e-4)
    assert [(s.lr, s.head_lr, s.keep, s.seed) for s in keep.missing(done)] == [(6e-4, 6e-4, 0.3, i) for i in (1, 2, 3)]


def test_a_choice_does_not_see_test_scores() -> None:
    group, done = plan.parts()["r8"][0], rows.Rows()
    _finish(group, done, 6e-3)
    chosen = group.final(done)
    for spec, row in done.items():
        row["test"] = str(float(spec.lr != 6e-3))
    assert group.final(done) == chosen


def test_what_follows_another_search_waits_for_it() -> None:
    group, done = plan.parts()["high"][0], rows.Rows()
    assert group.like is not None
    assert group.missing(done) == group.like.missing(done)
    _finish(group.like, done, 2e-3)
    assert [spec.lr for spec in group.missing(done)] == [6e-4, 2e-3, 6e-3]


def test_every_part_can_be_done_from_the_start_to_the_end() -> None:
    for name, groups in plan.parts().items():
        done = rows.Rows()
        while missing := list(plan.pending(done, [name])):
            done |= {spec: _row(spec, 0.5) for spec in missing}
        assert len(report.results(done, groups)) == sum(group.seeds > 0 for group in groups), name


def test_a_run_that_diverged_is_not_chosen() -> None:
    group, done = plan.parts()["r8"][0], rows.Rows()
    _finish(group, done, 2e-2)
    spec = group.tried(2e-2)
    done[spec] = rows.row_of(spec, {"status": "not finite in epoch 1", "parameters": 1})
    _finish(group, done, 2e-2)
    assert group.final(done)[0].lr != 2e-2


def test_rows_come_back(tmp_path: Path) -> None:
    spec = dataclasses.replace(SPEC, keep=0.3)
    written = {spec: _row(spec, 0.5), SPEC: _row(SPEC, 0.25)}
    rows.write(tmp_path / "runs.csv", written)
    assert rows.read(tmp_path / "runs.csv") == written
    assert rows.read(tmp_path / "none.csv") == {}
    text = (tmp_path / "runs.csv").read_text()
    (tmp_path / "runs.csv").write_text(re.sub(r",2,(20\d\d-)", r",1,\1", text))
    with pytest.raises(ValueError, match="expected rows of protocol 2, got some of 1"):
        rows.read(tmp_path / "runs.csv")


def _cut_off(text: str) -> str:
    return text[: text.rindex(",2,20")]


def _twice(text: str) -> str:
    return text + text.splitlines()[1] + "\r\n"


def _other_texts(text: str) -> str:
    return "finished,b".join(text.rsplit("finished,a", 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut_off, r"runs.csv:3: expected a value for each column, got a row of another length"),
        (_twice, r"runs.csv:4: expected one row of each run, got a second of Spec\(data='r8'"),
        (_other_texts, r"runs.csv:3: expected r8 of digest a, as above, got b"),
    ],
)
def test_damaged_rows_are_refused_by_line(damage: Callable[[str], str], message: str, tmp_path: Path) -> None:
    """As a merge by hand or another machine's texts leave them."""
    path, other = tmp_path / "runs.csv", dataclasses.replace(SPEC, seed=2)
    rows.write(path, {spec: _row(spec, 0.5) | {"digest": "a"} for spec in (SPEC, other)})
    path.write_text(damage(path.read_text()))
    with pytest.raises(ValueError, match=message):
        rows.read(path)


# The page


def test_a_page_gets_its_tables() -> None:
    page = "a\n<!-- r8 -->\nold\nold\n<!-- end -->\nb\n<!-- costs -->\n<!-- end -->\nc\n"
    assert report.fill(page, {"r8": "| 1 |", "costs": "| 2 |"}) == page.replace("old\nold", "| 1 |").replace(
        "costs -->\n", "costs -->\n| 2 |\n"
    )
    with pytest.raises(ValueError, match="page: expected tables of r8, got a place for costs"):
        report.fill(page, {"r8": ""})


def test_a_folder_without_measured_costs_fills_a_page_too(tmp_path: Path) -> None:
    page = "<!-- costs -->\n<!-- end -->\n<!-- r8 -->\n<!-- end -->\n"
    assert report.fill(page, tables({}, tmp_path)) == page.replace(" -->\n<!-- end", " -->\nNot done yet.\n<!-- end")


def test_the_page_has_the_tables_of_the_rows() -> None:
    """And what the rows have been chosen by is in them."""
    done = rows.read(RESULTS / rows.NAME)
    shown = tables(done, RESULTS)
    for name in ("docs/compared.md", "README.md"):
        page = (ROOT / name).read_text(encoding="utf-8")
        assert report.fill(page, shown) == page, f"python -m experiments.quality report --page {name}"
    of_head = [spec for spec in done if (spec.data, spec.layers, spec.method, spec.seed) == ("r8", 8, "head", 0)]
    of_head = [spec for spec in of_head if (spec.texts, spec.epochs) == (400, 4)]
    assert max(of_head, key=lambda spec: float(done[spec]["validation"])).lr == plan.HEAD_LR
    for name in {spec.data for spec in done}:
        assert len({row["digest"] for spec, row in done.items() if spec.data == name}) == 1, name


# Intervals


def test_all_of_it_is_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    ready = False

    def run_all(path: Path, *_: object) -> None:
        called.append("run")
        if ready:
            path.write_bytes((RESULTS / rows.NAME).read_bytes())

    def measure(folder: Path, *_: object, **__: object) -> None:
        called.append("costs")
        (folder / costs.NAME).write_bytes((RESULTS / costs.NAME).read_bytes())

    page = tmp_path / "page.md"
    page.write_text("<!-- costs -->\n<!-- end -->\n<!-- r8 -->\n<!-- end -->\n")
    monkeypatch.setattr(work, "run_all", run_all)
    monkeypatch.setattr(costs, "measure", measure)
    monkeypatch.setattr(pictures, "draw", lambda *_: called.append("pictures"))
    monkeypatch.setattr("sys.argv", ["quality", "all", "r8", "--output", str(tmp_path), "--page", str(page)])
    main()
    assert called == ["run"]  # it was stopped
    ready = True
    main()
    main()
    assert called == ["run", "run", "costs", "pictures", "run", "pictures"]
    assert "| head alone | 0 | 0.006 |" in page.read_text()


def test_which_texts_are_right_comes_back_and_is_refused_cut_off() -> None:
    right = np.arange(21) % 3 == 0
    assert (unpacked(packed(right), 21) == right).all()
    with pytest.raises(ValueError, match="right: expected 4 bytes for 25 texts, got 3"):
        unpacked(packed(right), 25)


def test_intervals() -> None:
    mean, half = over_seeds([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.30265 / 3**0.5, rel=1e-4))
    assert over_seeds([1.0]).half == float("inf")
    ours, theirs = np.zeros((2, 2, 4000), bool)
    ours[:, :1000] = True  # a quarter of the texts, by both seeds
    low, high = over_texts(ours, theirs)
    wide = 1.96 * (0.25 * 0.75 / 4000) ** 0.5
    assert (low, high) == (pytest.approx(0.25 - wide, abs=1e-3), pytest.approx(0.25 + wide, abs=1e-3))


def test_a_table_has_a_line_per_group_that_is_done() -> None:
    groups, done = plan.parts()["r8"], rows.Rows()
    assert report.table(done, "r8") == "Not done yet."
    for group in groups[:2]:  # the head alone, LoRA
        _finish(group, done, 6e-3)
        for spec in group.final(done):
            odd = (spec.method == "lora") * (spec.seed % 2) / 100
            right = packed(np.arange(100) < 50 + 100 * odd)
            done[spec] |= {"test": str(0.5 + odd), "right": right, "test_texts": "100"}
    shown = report.table(done, "r8").splitlines()
    assert len(shown) == 4
    assert shown[2] == "| head alone | 1 | 0.006 | 50.0 ± 0.0 | -0.6 ± 1.3 | ± 0.7 | -1.8 to 0.0 |"
    assert shown[3] == "| LoRA, all matrices (PEFT) | 1 | 0.006 | 50.6 ± 0.7 |  |  |  |"


def test_a_seed_that_diverged_is_in_the_table() -> None:
    group, done = plan.parts()["r8"][1], rows.Rows()
    _finish(group, done, 6e-3)
    done[group.final(done)[2]]["status"] = "not finite"
    line = "| LoRA, all matrices (PEFT) |  | 0.006 | 1 of 5 seeds did not stay finite |  |  |  |"
    assert report.table(done, "r8").splitlines()[2:] == [line]


def test_what_was_tested_at_another_rate_is_in_a_table_of_its_own() -> None:
    lora, other = plan.parts()["r8"][1], plan.parts()["other-rates"][0]
    done = rows.Rows()
    _finish(lora, done, 6e-3)
    _finish(other, done, 6e-3)
    for group, right in ((lora, 50), (other, 60)):
        for spec in group.final(done):
            done[spec] |= {"test": str(right / 100), "right": packed(np.arange(100) < right), "test_texts": "100"}
    line = "| adapter after the layer | 1 | 0.006 | 60.0 ± 0.0 | +10.0 ± 6.0 | ± 0.0 | "
    assert report.table(done, "other-rates").splitlines()[2].startswith(line)


def test_validation_accuracy_by_size_and_rate() -> None:
    done = rows.Rows()
    for group, parameters in ((plan.parts()["r8"][1], 200), (plan.parts()["sizes"][1], 60)):
        for rate, accuracy in ((2e-3, 0.9), (2e-2, 0.5)):
            done[group.tried(rate)] = _row(group.tried(rate), accuracy) | {"parameters": str(parameters)}
    done[group.tried(6e-2)] = _row(group.tried(6e-2), 0.0) | {"status": "not finite"}
    final = dataclasses.replace(group.tried(6e-3), final=True)
    done[final] = _row(final, 0.7)
    assert report.sizes(done).splitlines()[0] == "|  | parameters | 0.002 | 0.02 |"
    assert report.sizes(done).splitlines()[2:] == [
        f"| LoRA, all matrices (PEFT) | {count} | 90.0 | 50.0 |" for count in (60, 200)
    ]


def test_a_difference_pairs_the_seeds_that_both_have() -> None:
    """Three seeds of another init with the first three of the adapter's five."""
    adapter, done = plan.parts()["r8"][2], rows.Rows()
    other = plan.parts()["init"][0]
    _finish(other, done, 6e-3)
    _finish(adapter, done, 6e-3)
    for group in (adapter, other):
        for spec in group.final(done):
            right = np.arange(100) < 50 + 10 * (group is other and spec.seed < 4) + 40 * (spec.seed > 3)
            done[spec] |= {"test": str(right.mean()), "right": packed(right), "test_texts": "100"}
    line = report.table(done, "init").splitlines()[2]
    difference, over_seeds, over_texts = line.split(" | ")[-3:]
    assert difference == "+10.0 ± 6.0"  # 1.984 sqrt(0.09 / 99)
    assert over_seeds == "± 0.0"
    low, high = (float(value) for value in over_texts.strip(" |").split(" to "))
    assert low < 10 < high < 17


def test_a_run_that_raises_ends_the_study_after_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = dataclasses.replace(SPEC, seed=7)
    monkeypatch.setattr(work, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(work.signal, "signal", lambda *_: None)
    monkeypatch.setattr(plan, "pending", lambda done, _: (spec for spec in (SPEC, bad) if spec not in done))

    def fake(spec: Spec) -> dict[str, Any]:
        if spec == bad:
            raise OSError("no space")
        return {"status": "finished"}

    monkeypatch.setattr(work, "_run", fake)
    with pytest.raises(RuntimeError, match=r"seed=7.* raised"):
        work.run_all(tmp_path / "runs.csv", [], 2, 1.0)
    assert list(rows.read(tmp_path / "runs.csv")) == [SPEC]


def test_a_run_on_other_texts_than_those_of_the_rows_has_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "runs.csv", dataclasses.replace(SPEC, seed=2)
    rows.write(path, {SPEC: _row(SPEC, 0.5) | {"digest": "a"}})
    monkeypatch.setattr(work, "ProcessPoolExecutor", lambda workers, *_: ThreadPoolExecutor(workers))
    monkeypatch.setattr(work.signal, "signal", lambda *_: None)
    monkeypatch.setattr(plan, "pending", lambda done, _: (spec for spec in (SPEC, other) if spec not in done))
    monkeypatch.setattr(work, "_run", lambda _: {"status": "finished", "digest": "b"})
    with pytest.raises(RuntimeError, match=r"seed=2.* raised") as raised:
        work.run_all(path, [], 1, 1.0)
    assert str(raised.value.__cause__) == "r8: expected digest a, as in the rows, got b"
    assert list(rows.read(path)) == [SPEC]


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(RuntimeError, match="another process is doing runs for it"):
        work.run_all(tmp_path / "runs.csv", [], 1, 1.0)
