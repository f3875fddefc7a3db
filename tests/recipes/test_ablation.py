"""Ablations: what a study varies, that no finished run is computed again, and what is reported about the runs."""

import argparse
import csv
import dataclasses
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern import cli
from adapterkern.cli import ablate
from adapterkern.model.config import AdapterConfig
from adapterkern.recipes.ablation import report, runs, stability
from adapterkern.recipes.ablation.presets import PRESETS
from adapterkern.recipes.ablation.runs import Findings, run_study
from adapterkern.recipes.ablation.study import Study, parse_axis, parse_setting
from tests.support import tiny_run

TOKENIZER = tiny_run.tokenizer()
ROWS, EVAL_ROWS = tiny_run.rows(24), tiny_run.rows(16, seed=1)


def make(**values: Any) -> Study:
    base: dict[str, Any] = {
        "adapter": AdapterConfig(adapter_dim=4, layers=(2, 3)),
        "training": tiny_run.quiet(epochs=1),
        "vary": {"depth": (1, 2), "layers": ((-2, -1), (0,))},
        "seeds": (0, 1),
    }
    return Study(**(base | values))


def run(study: Study, output: Path, seed: int = 0, **values: Any) -> Findings:
    llama = tiny_run.model(seed).unload()
    data = {"train_data": ROWS, "eval_data": EVAL_ROWS, "say": lambda line: None} | values
    return run_study(study, llama, output=output, tokenizer=TOKENIZER, **data)


def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configurations that ``train`` is called with from now on."""
    calls: list[Any] = []
    train = runs.train
    monkeypatch.setattr(runs, "train", lambda *a, **k: (calls.append(a[2]), train(*a, **k))[1])
    return calls


# What a study asks for


def labels(study: Study) -> list[str]:
    return [variant.label for variant in study.variants(32, 4)]


def test_one_field_at_a_time_around_the_first_values() -> None:
    assert labels(make()) == ["base", "layers 0", "depth 2", "head alone"]
    base, layers, depth, alone = make().variants(32, 4)
    assert (base.adapter.layers, base.adapter.depth) == ((2, 3), 1)
    assert (layers.adapter.layers, layers.adapter.depth) == ((0,), 1)
    assert (depth.adapter.layers, depth.adapter.depth) == ((2, 3), 2)
    assert [v.training.train_adapters for v in (base, layers, depth, alone)] == [True, True, True, False]


def test_a_product_has_all_combinations() -> None:
    study = make(product=True, head_alone=False, vary={"depth": (1, 2), "init": ("identity", "svd"), "lr": (1e-3, 0.1)})
    found = study.variants(32, 4)
    assert len({(v.adapter.depth, v.adapter.init, v.training.lr) for v in found}) == len(found) == 8
    assert found[0].label == "base"
    assert found[-1].label == "depth 2, init svd, lr 0.1"


def test_layers_and_every_are_one_axis() -> None:
    study = make(vary={"every": (1, 2), "layers": ((1, 2, 3),)}, head_alone=False)
    assert labels(study) == ["base", "every 1", "every 2"]
    assert [v.adapter.layers for v in study.variants(32, 4)] == [(1, 2, 3), (0, 1, 2, 3), (1, 3)]
    assert report.base_point(study, 4) == "layers 1-3"


def test_kinds_have_the_fields_of_their_own() -> None:
    """What the base point sets of one kind is not set of the other; what is varied and means nothing is refused."""
    vary = {"kind": ("bottleneck", "prompt"), "adapter_dim": (8, 16)}
    study = make(vary=vary, head_alone=False).based_on({"depth": 2})
    found = [(v.label, v.adapter.kind, v.adapter.adapter_dim, v.adapter.depth) for v in study.variants(32, 4)]
    assert found[0] == ("base", "bottleneck", 8, 2)
    assert found[1:] == [("kind prompt", "prompt", 64, 1), ("adapter_dim 16", "bottleneck", 16, 2)]
    with pytest.raises(ValueError, match="adapter_dim: expected 64 with kind='prompt', which it does not apply to"):
        make(vary=vary, product=True).variants(32, 4)


def test_kinds_by_name_at_one_budget() -> None:
    """Each is a few fields over the base point, and as large as fits: all within one row of the weights of another."""
    expected: dict[str, dict[str, Any]] = {
        "bottleneck": {},
        "attention": {"position": "attention"},
        "parallel": {"position": "parallel-mlp"},
        "parallel-attention": {"position": "parallel-attention"},
        "scaled-parallel": {"position": "parallel-mlp", "scale": 4.0, "layer_norm": False, "activation": "relu"},
        "no-norm": {"layer_norm": False},
        "learned-scale": {"learned_scale": True},
        "prompt": {"kind": "prompt"},
    }
    study = make(adapter=AdapterConfig(layers=(2, 3)), vary={"kind": tuple(expected)}, head_alone=False)
    found = study.based_on({"max_params": 1500, "init": "svd"}).variants(32, 4)
    assert [v.label for v in found] == ["base", *(f"kind {name}" for name in list(expected)[1:])]
    for v, (name, fields) in zip(found, expected.items(), strict=True):
        size = {"prompt_length": 23} if name == "prompt" else {"adapter_dim": 11 if "layer_norm" in fields else 10}
        init = {} if name == "prompt" else {"init": "svd"}
        assert v.adapter == AdapterConfig(layers=(2, 3), **(fields | size | init)), name
        assert 1500 - 2 * 65 < v.adapter.num_params(32, 4) <= 1500
    of_prompts = make(adapter=AdapterConfig(kind="prompt"), vary={"kind": ("prompt", "no-norm")})
    assert [(v.adapter.kind, v.adapter.layer_norm) for v in of_prompts.variants(32, 4)[:2]] == [
        ("prompt", True),
        ("bottleneck", False),
    ]


def test_kinds_that_do_not_fit_together_are_named() -> None:
    kinds = {"kind": ("bottleneck", "scaled-parallel")}
    both = "vary: expected kind=scaled-parallel or position, not both: this kind is position=parallel-mlp"
    with pytest.raises(ValueError, match=both):
        make(vary=kinds | {"position": ("layer", "attention")})
    with pytest.raises(ValueError, match=f"{both}; got position=attention"):
        make(vary=kinds, adapter=AdapterConfig(position="attention"))
    with pytest.raises(ValueError, match=r"set: expected kind=scaled-parallel or scale, not both: .*; got scale=1"):
        make(vary=kinds).based_on({"scale": 1})  # the default, but asked for
    with pytest.raises(ValueError, match=r"set: expected kind=no-norm or layer_norm, .*; got layer_norm=True"):
        make().based_on({"kind": "no-norm", "layer_norm": True})
    with pytest.raises(ValueError, match="set: expected kind=parallel or position, not both: this kind is position="):
        make(vary={"position": ("layer",)}).based_on({"kind": "parallel"})
    with pytest.raises(
        ValueError, match=r"kind: expected one of bottleneck, .*, prompt, llama-adapter-v2, got 'serial'"
    ):
        make(vary={"kind": ("serial",)})
    with pytest.raises(ValueError, match="vary: expected max_params or adapter_dim, not both: a budget decides"):
        make(vary={"adapter_dim": (64,)}, adapter=AdapterConfig()).based_on({"max_params": 1500})
    with pytest.raises(ValueError, match="x_free: expected False with position='parallel-mlp'"):
        make(vary=kinds).based_on({"x_free": True}).check()
    alike = make(vary=kinds).based_on({"activation": "relu", "layer_norm": False})  # of all kinds
    assert [v.adapter.scale for v in alike.variants(32, 4)[:2]] == [1.0, 4.0]


def test_infinite_clipping_survives() -> None:
    study = make(vary={"max_norm": (1.0, math.inf)}, head_alone=False)
    assert [v.training.max_norm for v in study.variants(32, 4)] == [1.0, math.inf]


def test_a_base_point_is_set_where_it_is_not_varied() -> None:
    study = make().based_on({"lr": 0.5, "activation": "gelu"})
    assert (study.training.lr, study.adapter.activation) == (0.5, "gelu")
    assert make(vary={"depth": (1, 2)}).based_on({"every": 2}).adapter.layers is None
    for name in ("depth", "layers", "every"):
        with pytest.raises(ValueError, match=f"set: expected a field that is not varied, got '{name}'"):
            make().based_on({name: 1})


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_fit_the_backbone(name: str) -> None:
    study = PRESETS[name]
    found = study.variants(576, 8)
    assert len({v.label for v in found}) == len(found) > 10
    stable = stability.varied(study)
    assert all(stability.describe(field, study.vary[field][0]) for field in stable if field in study.vary)


# From strings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("depth=1,2,3", ("depth", (1, 2, 3))),
        ("max-norm=1,inf", ("max_norm", (1, math.inf))),
        ("lr=2e-3", ("lr", (2e-3,))),
        ("layers=-1/-2,-1/0,2", ("layers", ((-1,), (-2, -1), (0, 2)))),
        ("activation=silu,identity", ("activation", ("silu", "identity"))),
        ("x_free=true,false", ("x_free", (True, False))),
        ("max_steps=none,5", ("max_steps", (None, 5))),
    ],
)
def test_parses_an_axis(text: str, expected: tuple[str, tuple[Any, ...]]) -> None:
    assert parse_axis(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("depth", "vary: expected FIELD=VALUE,VALUE,..., got 'depth'"),
        ("depth=", "vary: expected FIELD=VALUE,VALUE,..., got 'depth='"),
        ("dept=1", "vary: expected one of adapter_dim, .*, got 'dept'"),
        ("seed=1,2", "vary: expected one of .*, got 'seed'"),
        ("output_dir=x", "vary: expected one of .*, got 'output_dir'"),
        ("layers=-1/all", "layers: expected integers such as -2,-1, sets separated by /, got 'all'"),
    ],
)
def test_what_is_not_an_axis_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_axis(text)


def test_several_values_of_a_setting_are_refused() -> None:
    assert parse_setting("lr=0.1") == ("lr", 0.1)
    with pytest.raises(ValueError, match="set: expected one value for lr, got 'lr=1,2'"):
        parse_setting("lr=1,2")


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"depth": ("two",)}, "depth: expected an integer >= 1, got 'two'"),
        ({"lr": ("fast",)}, r"lr: expected a number in \[0, inf\), got 'fast'"),
        ({"activation": ("selu",)}, "activation: expected one of silu, .*, got 'selu'"),
        ({"layers": ((4,),)}, "layers: expected numbers from -4 to 3, got 4"),
        ({"init": ("svd",), "adapter_dim": (0,)}, "adapter_dim: expected an integer from 1 to 512, got 0"),
    ],
)
def test_a_bad_value_is_named_before_any_run(vary: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        run(make(vary=vary), tmp_path)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"depth: expected at least one value and no duplicates, got \[1, 1\]"):
        make(vary={"depth": (1, 1)})
    with pytest.raises(ValueError, match=r"vary: expected one of adapter_dim, .*, got 'dept'"):
        make(vary={"dept": (1, 2)})
    with pytest.raises(ValueError, match=r"seeds: expected at least one and no duplicates, got \[0, 0\]"):
        make(seeds=(0, 0))
    with pytest.raises(ValueError, match="seeds: expected an integer >= 0, got -1"):
        make(seeds=(0, -1))
    with pytest.raises(TypeError, match=r"seeds: expected an integer >= 0, got 1\.0"):
        make(seeds=(0, 1.0))
    for name in ("product", "head_alone"):
        with pytest.raises(TypeError, match=f"{name}: expected True or False, got 1"):
            make(**{name: 1})


def test_the_command_line_makes_the_study() -> None:
    parser = argparse.ArgumentParser()
    ablate.add_arguments(parser)
    arguments = parser.parse_args(
        ["--vary", "depth=1,2", "--vary", "lr=1e-3,1e-2", "--set", "epochs=1", "--seeds", "2"]
    )
    study = ablate.make_study(arguments)
    assert study.vary == {"depth": (1, 2), "lr": (1e-3, 1e-2)}
    assert (study.training.epochs, tuple(study.seeds), study.product, study.head_alone) == (1, (0, 1), False, True)
    assert ablate.make_study(parser.parse_args(["--preset", "stability"])) == PRESETS["stability"]
    with pytest.raises(ValueError, match="--vary: expected each field once"):
        ablate.make_study(parser.parse_args(["--vary", "depth=1,2", "--vary", "depth=3"]))


# Running


def test_one_row_per_run_and_the_seed_decides(tmp_path: Path) -> None:
    findings = run(make(), tmp_path)
    assert findings.complete
    assert len(findings.rows) == 8
    with (tmp_path / "ablation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"finished"}
    base = findings.rows["base", 0]
    assert (base["layers"], base["depth"], base["init"], base["torch"]) == ("2 3", "1", "identity", torch.__version__)
    assert int(base["trainable_parameters"]) == 2 * (4 * 65 + 96) + 66
    assert float(base["seconds"]) > 0
    assert findings.rows["head alone", 0]["depth"] == ""
    assert base["loss"] != findings.rows["base", 1]["loss"]
    again = run(make(), tmp_path / "again")
    assert all(again.rows[at]["loss"] == row["loss"] for at, row in findings.rows.items())


def test_shares_the_prefix_and_takes_short_ones_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = trained(monkeypatch)
    findings = run(make(), tmp_path)
    assert [c.seed for c in calls] == [0] * 4 + [1] * 4
    cached = {at: int(row["prefix_layers"]) for at, row in findings.rows.items()}
    assert [cached[label, 0] for label in labels(make())] == [3, 1, 3, 4]
    assert [row["prefix_layers"] for row in runs.read_results(tmp_path / "ablation.csv").values()][:4] == list("1334")
    seconds = {at: float(row["prefix_seconds"]) for at, row in findings.rows.items()}
    assert seconds["base", 1] < seconds["layers 0", 0]  # looked up, not computed


def test_nothing_finished_is_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, calls = make(vary={"depth": (1,)}, head_alone=False), trained(monkeypatch)
    run(small, tmp_path)
    assert len(calls) == 2
    run(make(), tmp_path)  # another study that has these runs too
    assert len(calls) == 8
    before = (tmp_path / "ablation.csv").read_bytes()
    assert run(make(), tmp_path).complete
    assert len(calls) == 8
    assert (tmp_path / "ablation.csv").read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"train_data": ROWS[:-1]},
        {"eval_data": EVAL_ROWS[:-1]},
        {"seed": 1},  # of the backbone's weights
        {"study": make(vary={"depth": (1,)}, head_alone=False, seeds=(0,), training=tiny_run.quiet(epochs=1, lr=0.02))},
    ],
)
def test_another_run_is_computed(change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, calls = make(vary={"depth": (1,)}, head_alone=False, seeds=(0,)), trained(monkeypatch)
    run(small, tmp_path)
    run(**({"study": small, "output": tmp_path} | change))
    assert len(calls) == 2


def test_integers_and_floats_are_one_run() -> None:
    variants = [
        make(vary={"max_norm": (n,), "warmup": (w,)}).variants(32, 4)[0] for n, w in ((1, 0), (1.0, 0.0), (1, 2))
    ]
    keys = [runs.run_key(variant, 0, "world") for variant in variants]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("where", "1702affac20e8eb9", "a037437123d60bd8"), ("stability", "24c8d14f23ebf3ac", "961788081634ee22")],
)
def test_keys_are_those_of_version_0_1_0(name: str, first: str, last: str) -> None:
    """Or an ``ablation.csv`` that it wrote would be computed again from its first row."""
    study = PRESETS[name]
    found = study.variants(576, 8)
    assert runs.run_key(found[0], study.seeds[0], "world") == first
    assert runs.run_key(found[-1], study.seeds[-1], "world") == last


def test_a_stopped_study_goes_on_within_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make(vary={"depth": (1,)}, head_alone=False, training=tiny_run.quiet(epochs=2, log_every=1))
    whole = run(study, tmp_path / "whole")
    forward, count = runs.LlamaAdapter.run_suffix, 0

    def interrupted(self: Any, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args)

    monkeypatch.setattr(runs.LlamaAdapter, "run_suffix", interrupted)
    stopped = run(study, tmp_path / "cut")
    assert (stopped.complete, stopped.rows) == (False, {})
    calls = trained(monkeypatch)
    resumed = run(study, tmp_path / "cut")
    assert [c.resume for c in calls] == [True, False]
    assert resumed.complete
    for at, row in whole.rows.items():
        assert (resumed.rows[at]["loss"], resumed.rows[at]["steps"]) == (row["loss"], row["steps"])
    curves = [sorted(p.name for p in (tmp_path / name / "curves").iterdir()) for name in ("whole", "cut")]
    assert curves[0] == curves[1]
    assert not list((tmp_path / "cut" / "runs").iterdir())


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_run_that_is_not_finite_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_every: int) -> None:
    """Even if that is before the first line of its log."""
    training = tiny_run.quiet(epochs=1, warmup=0, log_every=log_every)
    study = make(vary={"lr": (1e-2, 1e30)}, head_alone=False, training=training)
    findings = run(study, tmp_path)
    row = findings.rows["lr 1e+30", 0]
    assert row["status"].startswith("not finite at step")
    assert row["accuracy"] == ""
    lines = report.summarize(findings)
    assert [line.failed for line in lines] == [0, 2]
    assert report.cells(lines[1])[0] == "lr 1e+30 (2 not finite)"
    calls = trained(monkeypatch)
    assert run(study, tmp_path).complete
    assert not calls


def test_a_foreign_csv_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ablation.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"ablation.csv: expected the columns key,.*, got a,b"):
        run(make(), tmp_path)


def test_the_backbone_comes_back_bare(tmp_path: Path) -> None:
    llama = tiny_run.model().unload()
    study = make(vary={"depth": (1,)}, seeds=(0,), head_alone=False)
    for _ in range(2):  # a second time: it would refuse a model with adapters
        run_study(study, llama, ROWS, EVAL_ROWS, tmp_path, tokenizer=TOKENIZER, say=lambda line: None)


# Reporting


def fake(study: Study, accuracies: dict[tuple[str, int], float | None]) -> Findings:
    blank = {"seconds": "2.0", "trainable_parameters": "1000", "loss": "0.5"}
    rows = {at: blank | {"accuracy": "" if a is None else str(a)} for at, a in accuracies.items()}
    return Findings(True, study.variants(32, 4), rows, 4)


def test_gains_are_paired_by_seed() -> None:
    accuracies = {("base", 0): 0.5, ("base", 1): 0.9, ("depth 2", 0): 0.52, ("depth 2", 1): 0.92, ("layers 0", 1): 0.8}
    lines = report.summarize(fake(make(), accuracies))
    assert [line.variant.label for line in lines] == ["base", "layers 0", "depth 2"]  # head alone has no run yet
    base, layers, depth = (report.cells(line) for line in lines)
    assert base[4:] == ("70.0 ± 28.3", "")
    assert depth[4:] == ("72.0 ± 28.3", "+2.0 ± 0.0")
    assert layers[4:] == ("80.0", "-10.0")
    table = report.markdown(lines)
    assert table.splitlines()[2] == "| base | 1,000 | 2.0 | 0.500 ± 0.000 | 70.0 ± 28.3 |  |"


def test_write_report_writes_table_plot_and_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = make(vary={"depth": (1, 2), "max_norm": (1.0, math.inf)}, seeds=(0,))
    findings = run(study, tmp_path)
    report.write_report(study, findings, tmp_path, "a title")
    out = capsys.readouterr().out
    assert "max_norm inf" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert len(next(line for line in out.splitlines() if "max_norm inf" in line).split()) > 5  # in one line
    for name in ("ablation.md", "ablation.png", "study.json"):
        assert (tmp_path / name).stat().st_size > 100


def test_the_command_runs_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = tiny_run.model().unload()
    llama.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    for name, rows in (("train.csv", ROWS), ("eval.csv", EVAL_ROWS)):
        with (tmp_path / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    arguments = [
        "ablate",
        "--model",
        str(tmp_path / "model"),
        "--backbone-layers",
        "4",
        "--output",
        str(tmp_path / "out"),
    ]
    arguments += ["--train", str(tmp_path / "train.csv"), "--eval", str(tmp_path / "eval.csv"), "--seeds", "1"]
    stable = ["--preset", "stability", "--set", "epochs=1", "--set", "batch_size=8", "--vary", "max_norm=1,inf"]
    assert cli.main([*arguments, *stable]) == 0
    out = capsys.readouterr().out
    assert "no clip" in out
    assert "spikes" in out
    assert "…" not in out  # nothing is cut off in 80 columns
    assert (tmp_path / "out" / "stability.png").stat().st_size > 1000
    assert cli.main([*arguments, "--vary", "dept=1"]) == 1
    assert "vary: expected one of" in capsys.readouterr().err
    assert cli.main([*arguments, "--vary", "max_norm=2,0"]) == 1
    said = capsys.readouterr()
    assert "max_norm: expected a number above 0" in said.err
    assert "[1/" not in said.out + said.err  # before the first run


# Spikes


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], []),
        ([1.0] * 30, []),
        ([1.0, 1.0, 5.0, 1.0], [2]),
        ([1.0] * 9 + [5.0, 6.0, 5.0, 1.0, 5.0], [9, 13]),  # one excursion is one spike
        ([0.01, 0.01, 0.4], []),  # forty times the median, but within the margin
        ([10.0, 10.0, 19.0], []),  # above the margin, but not twice the median
        ([1.0] * 20 + [4.0] * 30 + [9.0], [20, 50]),  # the median follows; 9 is above twice 4
        ([1.0] * 20 + [4.0] * 30 + [7.9], [20]),
        ([1.0, 5.0], [1]),
        ([math.nan, math.nan, 9.0, 9.0, math.nan, 30.0], [5]),  # skipped steps are no zeros
    ],
)
def test_counts_spikes(values: list[float], expected: list[int]) -> None:
    assert stability.spikes(values, factor=2.0, margin=0.5) == expected


def test_the_window_is_twenty_steps() -> None:
    series = [10.0] * 20 + [1.0] * 10 + [9.0]
    # The median of the last 20 is of ten tens and ten ones, 5.5: 9 is below twice that. One step later it is not.
    assert stability.spikes(series, factor=1.9, margin=0.5) == []
    assert stability.spikes([*series[:-1], 1.0, 9.0], factor=1.9, margin=0.5) == [31]


def test_traces_hold_every_step(tmp_path: Path) -> None:
    study = make(
        vary={"init": ("identity", "xavier")}, head_alone=False, training=tiny_run.quiet(epochs=2, log_every=1)
    )
    traces = stability.read_traces(study, run(study, tmp_path), tmp_path)
    assert [trace.variant.label for trace in traces] == ["base", "init xavier"]
    assert [len(c.losses) for trace in traces for c in trace.curves] == [12] * 4
    assert all(math.isfinite(x) and x > 0 for trace in traces for c in trace.curves for x in c.norms)
    coarse = dataclasses.replace(study, training=dataclasses.replace(study.training, log_every=2))
    with pytest.raises(ValueError, match="log_every: expected 1 to see every step, got 2"):
        stability.read_traces(coarse, run(coarse, tmp_path), tmp_path)


def test_counts_steps_above_the_first() -> None:
    curve = stability.Curve(0, "finished", 0.5, [2.0, 30.0, 40.0, 2.0, 1.0, 2.1], [1.0] * 6, 0)
    assert (curve.steps_above_start, curve.loss_spikes, curve.norm_spikes) == (3, 1, 0)
    study = make(vary={"init": ("identity", "xavier")})
    cells = stability.cells(stability.Trace(study.variants(32, 4)[0], [curve, curve]), stability.varied(study))
    assert cells == ("identity", "2", "0", "3", "40", "12.850", "50.0 ± 0.0", "0 / 0")
