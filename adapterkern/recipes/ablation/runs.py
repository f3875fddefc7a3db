"""Running a study: one short training per variant and seed, and one row of ``ablation.csv`` per run.

A seed fixes the head's weights, the adapters' weights and the order of the rows, so variants are compared in pairs,
seed by seed.

The key of a run is a digest of everything that determines its numbers: the adapters, the training, the tokenized data
and the backbone. A run whose row is in ``ablation.csv`` is never computed again, whichever study asks for it; an
interrupted run continues from its checkpoint. The file is replaced as a whole for each row, so it is always complete.

All runs share one cache of prefix activations. Runs are ordered by seed, so a study that is stopped early has tried
every variant. Within a seed the shortest prefixes come first, because longer ones start from their activations.

    output/ablation.csv          one row per run
    output/curves/KEY.jsonl      its metrics, like the ``metrics.jsonl`` of a training
    output/runs/KEY/             its folder while it runs
"""

import csv
import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel

from adapterkern import __version__
from adapterkern.files import check_owner, replacing
from adapterkern.model.config import ADDED, MODULES, AdapterConfig, applies
from adapterkern.model.files.owner import check_folder
from adapterkern.model.linears import inside_of
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.ablation.study import Study, Variant
from adapterkern.training.api import train
from adapterkern.training.config import FREE_ON_RESUME, TrainConfig
from adapterkern.training.data.batches import fingerprint
from adapterkern.training.data.examples import Rows, load_examples
from adapterkern.training.data.prefix import PrefixCache, choose_cache, prefix_fingerprint
from adapterkern.training.optimization import check_lr
from adapterkern.training.run import checkpoint
from adapterkern.training.run.lock import locked
from adapterkern.training.run.report import METRICS_NAME
from adapterkern.training.run.results import NonFiniteError, TrainResult

CSV_NAME, STUDY_NAME = "ablation.csv", "study.json"

# Columns that older files do not have; nor have they head_lr
_ADDED = ("kind", "prompt_length", "layer_norm", "scale", "learned_scale", "dropout", "prompt_gate", "bias_scale")
_SHOWN_ADAPTER = ("position", "layers", "depth", "adapter_dim", "activation", "init", *_ADDED)
_SHOWN_TRAINING = (
    *("train_adapters", "epochs", "max_steps", "batch_size", "accumulation", "max_length", "lr", "head_lr", "schedule"),
    *("warmup", "max_norm", "weight_decay", "precision", "seed"),
)
_MEASURED = (
    *("status", "steps", "skipped_steps", "trainable_parameters", "prefix_layers", "seconds", "prefix_seconds"),
    *("eval_seconds", "tokens_per_second", "loss", "accuracy"),
)
_NUMBERS = ("trainable_parameters", "seconds", "tokens_per_second", "loss", "accuracy")  # what a report computes with
_VERSIONS = ("date", "device", "threads", "adapterkern", "torch", "transformers")
COLUMNS = ("key", *_SHOWN_ADAPTER, *_SHOWN_TRAINING, *_MEASURED, *_VERSIONS)


class Findings(NamedTuple):
    """The rows that a study has so far."""

    complete: bool  # whether every run has its row
    variants: list[Variant]
    rows: dict[tuple[str, int], dict[str, str]]  # rows of the CSV, by the variant's label and the seed
    num_layers: int


def run_study(
    study: Study,
    llama: PreTrainedModel,
    train_data: Rows,
    eval_data: Rows,
    output: Path,
    *,
    tokenizer: Any = None,
    say: Callable[[str], None] = print,
) -> Findings:
    """Run what ``output/ablation.csv`` has no row for, and return the study's rows.

    After Ctrl-C (SIGINT) or SIGTERM ``complete`` is False, and the same call continues from there.

    Args:
        llama: the frozen backbone; it has no adapters before and after the call.
        train_data, eval_data: the same for all runs; see ``load_examples``.
        output: the folder of all files.
        tokenizer: the backbone's transformers tokenizer.
        say: called with one line per run.

    Raises:
        BlockingIOError: another study is running in ``output``.
        DataError: unusable rows; the message names file and line.
        TypeError, ValueError: a value that a configuration does not accept, an ``ablation.csv`` with other columns, or
            an ``output`` that holds a model or another program's ``study.json``. All are raised before the first run.
    """
    check_folder(output, "output")
    check_owner(output / STUDY_NAME, "adapterkern", lambda saved: "vary" in saved)
    model = LlamaAdapter(llama, study.adapter)
    try:
        with locked(output):
            return _Runner(study, model, train_data, eval_data, output, tokenizer, say).go()
    finally:
        model.unload()


class _Runner:
    def __init__(
        self,
        study: Study,
        model: LlamaAdapter,
        train_data: Rows,
        eval_data: Rows,
        output: Path,
        tokenizer: Any,
        say: Callable[[str], None],
    ) -> None:
        self.study, self.model, self.output, self.tokenizer, self.say = study, model, output, tokenizer, say
        self.train_data, self.eval_data = train_data, eval_data
        decoder = model.decoder
        self.variants = study.variants(decoder.config.hidden_size, len(model.layers), inside_of(decoder))
        for variant in self.variants:
            check_lr(variant.training)
        self.shared = shared_digest(model, train_data, eval_data, study.training, tokenizer)
        self.cache = PrefixCache(study.training.prefix_cache_bytes)
        self.path = output / CSV_NAME

    def go(self) -> Findings:
        plan = [
            (variant, seed, run_key(variant, seed, self.shared)) for variant, seed in _plan(self.study, self.variants)
        ]
        done = read_results(self.path)
        # By key: two variants may be the same run.
        missing = {key: (variant, seed) for variant, seed, key in plan if key not in done}
        self.say(f"{len(plan)} runs, {len(plan) - len(missing)} of them already in {self.path}")
        complete, started = True, time.perf_counter()
        for number, (key, (variant, seed)) in enumerate(missing.items(), start=1):
            row = self._run(variant, seed, key)
            if row is None:
                self.say("stopped; the same call continues from here")
                complete = False
                break
            append_result(self.path, row)
            if (folder := self.output / "runs" / key).exists():  # not if nothing was logged or saved
                shutil.rmtree(folder)
            left = (time.perf_counter() - started) / number * (len(missing) - number)
            outcome = row["status"] if row["accuracy"] is None else f"accuracy {row['accuracy']:.1%}"
            self.say(f"[{number}/{len(missing)}] {variant.label}, seed {seed}: {outcome}; {left / 60:.0f} min left")
        done = read_results(self.path)
        rows = {(variant.label, seed): done[key] for variant, seed, key in plan if key in done}
        return Findings(complete, self.variants, rows, len(self.model.layers))

    def _run(self, variant: Variant, seed: int, key: str) -> dict[str, Any] | None:
        """The row of a run; None if it was interrupted."""
        folder = self.output / "runs" / key
        newest = checkpoint.checkpoints(folder)
        config = dataclasses.replace(
            variant.training,
            seed=seed,
            output_dir=folder,
            overwrite=not newest,
            resume=bool(newest),
            progress=False,
            plot=False,
            eval_every=variant.training.eval_every or 1 << 30,  # by default only at the end
        )
        self._put(variant.adapter, seed)
        if config.prefix_cache is None and self._cacheable(config):
            config = dataclasses.replace(config, prefix_cache=True)  # later runs need it even if this one does not
        result, status = self._train(config)
        if result is not None and result.stopped:
            return None
        curves = self.output / "curves" / f"{key}.jsonl"
        with replacing(curves) as temporary:
            if (folder / METRICS_NAME).exists():
                shutil.copyfile(folder / METRICS_NAME, temporary)
            else:  # not finite before the first line
                temporary.touch()
        before = int(newest[-1].name.removeprefix("step-")) if newest else 0
        return _row(key, variant, config, result, status, before, self.model)

    def _train(self, config: TrainConfig) -> tuple[TrainResult | None, str]:
        try:
            result = train(
                self.model,
                self.train_data,
                config,
                tokenizer=self.tokenizer,
                eval_data=self.eval_data,
                cache=self.cache,
            )
        except NonFiniteError as error:
            return None, f"not finite at step {error.step}"
        return result, "finished"

    def _put(self, adapter: AdapterConfig, seed: int) -> None:
        """Replace the last run's adapters by new ones, with weights drawn from ``seed``."""
        for name in list(self.model.adapters):
            self.model.delete_adapter(name)
        torch.manual_seed(seed)
        self.model.add_adapter("default", adapter)
        self.model.set_adapter("default")

    def _cacheable(self, config: TrainConfig) -> bool:
        if not config.train_adapters:
            with self.model.disable_adapter():
                return choose_cache(self.model, config, [], passes=2)[0]
        return choose_cache(self.model, config, [], passes=2)[0]


def _plan(study: Study, variants: Iterable[Variant]) -> Iterator[tuple[Variant, int]]:
    """All runs, by seed, then by length of the prefix."""

    def prefix(variant: Variant) -> tuple[bool, int]:
        return not variant.training.train_adapters, min(variant.adapter.layers or (0,))

    ordered = sorted(variants, key=prefix)
    return ((variant, seed) for seed in study.seeds for variant in ordered)


def shared_digest(model: LlamaAdapter, train_data: Rows, eval_data: Rows, config: TrainConfig, tokenizer: Any) -> str:
    """A digest of what all runs of a study share: the tokenized data and the backbone's weights.

    Raises:
        DataError: unusable rows; the message names file and line.
    """
    uncut = dataclasses.replace(config, max_length=1 << 30)
    train_set, labels = load_examples(train_data, uncut, tokenizer)
    eval_set, _ = load_examples(eval_data, uncut, tokenizer, labels)
    backbone = prefix_fingerprint(model, TrainConfig(), len(model.layers)).hex()
    return " ".join((fingerprint(train_set), fingerprint(eval_set), *labels, backbone))


# fields that 0.1.0 did not have
_NEW = ("label_smoothing", "class_weights", "best", "patience", "group_by_length", "adapter_drop", "train_stack")


def run_key(variant: Variant, seed: int, shared: str) -> str:
    """16 hexadecimal digits that depend on everything that determines a run's numbers.

    The keys stay the same from version to version, so that an ``ablation.csv`` can be continued.
    """
    training = dataclasses.replace(variant.training, seed=seed).to_dict()
    defaults = TrainConfig().to_dict()
    training = {name: value for name, value in training.items() if name not in _NEW or value != defaults[name]}
    if training["head_lr"] in (None, training["lr"]):  # as in earlier versions, which had one rate
        del training["head_lr"]
    floats = {field.name for field in dataclasses.fields(TrainConfig) if field.type in (float, float | None)}
    added = {MODULES: None, **ADDED}
    adapter = variant.adapter.to_dict()
    adapter = {name: value for name, value in adapter.items() if name not in added or value != added[name]}
    described = {
        "adapter": adapter if variant.training.train_adapters else None,
        "training": {
            name: float(value) if name in floats and value is not None else value  # 0 and 0.0 are the same run
            for name, value in training.items()
            if name not in FREE_ON_RESUME
        },
        "world": shared,
    }
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


def _row(
    key: str,
    variant: Variant,
    config: TrainConfig,
    result: TrainResult | None,
    status: str,
    before: int,
    model: LlamaAdapter,
) -> dict[str, Any]:
    shown = [name for name in _SHOWN_ADAPTER if applies(name, variant.adapter.kind)]
    adapter = {name: getattr(variant.adapter, name) for name in shown} if config.train_adapters else {}
    if adapter:
        adapter["layers"] = " ".join(str(layer) for layer in variant.adapter.layers or ())
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"key": key, "status": status} | adapter
    row |= {name: getattr(config, name) for name in _SHOWN_TRAINING}
    if result is not None:
        assert result.metrics is not None  # eval_data is required
        made = result.steps - before
        row |= {
            "steps": result.steps,
            "skipped_steps": result.skipped_steps,
            "trainable_parameters": result.trainable_parameters,
            "prefix_layers": result.prefix_layers,
            # a resumed run has timed only the steps since then: extrapolated to all steps
            "seconds": f"{result.seconds * result.steps / made:.3f}" if made else None,
            "prefix_seconds": f"{result.prefix_seconds:.3f}",
            "eval_seconds": f"{result.eval_seconds:.3f}",
            "tokens_per_second": f"{result.tokens_per_second:.0f}",
            "loss": result.metrics["loss"],
            "accuracy": result.metrics["accuracy"],
        }
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else model.device.type
    return row | {
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "threads": torch.get_num_threads(),
        "adapterkern": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# The file


def read_results(path: Path) -> dict[str, dict[str, str]]:
    """The rows of an ``ablation.csv`` by key; none if there is no file.

    Raises:
        ValueError: it is no such file; the message names the file, and the row and column.
    """
    if not path.exists():
        return {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8: {error}") from error
    columns = rows[0] if rows else []
    if [name for name in COLUMNS if name in columns or name not in (*_ADDED, "head_lr")] != columns:
        raise ValueError(f"{path}: expected the columns {','.join(COLUMNS)}, got {','.join(columns):.80}")
    found: dict[str, dict[str, str]] = {}
    for number, values in enumerate(rows[1:], start=1):
        where = f"{path}: row {number}"
        if len(values) != len(columns):
            raise ValueError(f"{where}: expected {len(columns)} fields, got {len(values)}")
        row = dict.fromkeys(COLUMNS, "") | dict(zip(columns, values, strict=True))
        if row["key"] in found:
            raise ValueError(f"{where}: expected each key once, got {row['key']!r:.80} again")
        for name in _NUMBERS:
            try:
                ok = not row[name] or math.isfinite(float(row[name]))
            except ValueError:
                ok = False
            if not ok:
                raise ValueError(f"{where}: {name}: expected a number or nothing, got {row[name]!r:.80}")
        found[row["key"]] = row
    return found


def append_result(path: Path, row: Mapping[str, Any]) -> None:
    """Replace the file, atomically, by one with one more row."""
    before = list(read_results(path).values())
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows([*before, row])
