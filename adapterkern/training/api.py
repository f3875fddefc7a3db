"""The entry points: ``train`` builds a run and runs it, ``evaluate`` scores what was trained."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed

from adapterkern import checks
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.activations import check_checkpointing, check_offload, checkpointed, offloaded
from adapterkern.training.arguments import check_arguments, check_backbones, warn_of_no_effect, warn_of_pooling
from adapterkern.training.compiled import check_compile, compiled_layers
from adapterkern.training.config import OTHER_NAMES as SETTINGS
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import fingerprint
from adapterkern.training.data.examples import numbered
from adapterkern.training.data.prefix import PrefixCache, choose_cache
from adapterkern.training.data.rows import source_name
from adapterkern.training.data.sets import Data
from adapterkern.training.data.split import HeldOut, check_unchanged, is_share, split
from adapterkern.training.data.summary import Summary, warn_of_learned, warn_of_overlap
from adapterkern.training.data.targets import TARGETS, OneLabel
from adapterkern.training.drift import Drift, check_drift, load_texts, summary_of, texts_name
from adapterkern.training.dry_run import Rehearsal, unchanged
from adapterkern.training.feed import Feed, run_evaluation
from adapterkern.training.heads import Head
from adapterkern.training.loop import Run
from adapterkern.training.losses import check_loss, trained_with
from adapterkern.training.optimization import check_drop, with_rates
from adapterkern.training.padding import padding_line
from adapterkern.training.parallel.accelerator import left_as_found, make_accelerator
from adapterkern.training.parallel.deepspeed import Zero
from adapterkern.training.parallel.engine import Engine
from adapterkern.training.parallel.frozen import cast_once
from adapterkern.training.prediction import answers_kept
from adapterkern.training.run.best import Best
from adapterkern.training.run.callbacks import Callback, Callbacks, check_callbacks
from adapterkern.training.run.checkpoint import TrainingState, describe_backbone, read_state
from adapterkern.training.run.folder import newest_checkpoint, run_folder
from adapterkern.training.run.lock import in_one_thread
from adapterkern.training.run.report import show_data
from adapterkern.training.run.results import TrainResult
from adapterkern.training.run.trackers import Trackers, tracker_names
from adapterkern.training.saved import Sources
from adapterkern.training.stack import below_settings, check_stack, frozen_below
from adapterkern.training.task import Task


def _in_config(ours: str) -> str:
    """What to write for a setting that is given as an argument."""
    value = f"{ours}=..." if ours.isidentifier() else ours
    return f"config=TrainConfig({value})" if "=" in value and "(" not in value else ours


# Settings, and what transformers' and TRL's trainers have
_OTHER_NAMES = {
    **{name: _in_config(name) for name in TrainConfig.__dataclass_fields__ if name != "task"},
    **{name: _in_config(ours) for name, ours in SETTINGS.items()},
    "args": "config",
    "train_dataset": "train_data",
    "eval_dataset": "eval_data",
    "processing_class": "tokenizer",
    "peft_config": "no such argument: the model has its adapters already",
    **dict.fromkeys(("compute_metrics", "data_collator"), "a task, see Task, and no such argument"),
}


@checks.other_names(**_OTHER_NAMES)
def train(
    model: LlamaAdapter,
    train_data: Any,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    drift_data: Any = None,
    head: Head | None = None,
    cache: PrefixCache | None = None,
    task: Task[Any] | None = None,
    sources: Sources | Mapping[str, Sources] | None = None,
    callbacks: Sequence[Callback] = (),
    dry_run: bool = False,
) -> TrainResult:
    """Train the active adapter, with a head for labeled texts or as a language model; of a stack the last one.

    Args:
        model: on the device to train on. The backbone stays frozen. Its mode is left as it was: a new
            ``LlamaAdapter`` is in training mode, so call ``model.eval()`` before you use one that has dropout.
        train_data, eval_data: see ``load_examples``; or whatever ``task.load`` reads. ``eval_data="10%"`` holds out
            this share of the training rows, the same ones for the same seed: see data/split.py.
        drift_data: texts of another kind, on which each evaluation measures ``drift``, how far the model with its
            adapters has gone from the backbone alone (nats per token), also where an adapter was trained before, or
            runs on others of a stack: see drift.py. Whatever ``load_examples`` reads; 64 texts are enough.
        config: see ``TrainConfig``.
        tokenizer: the backbone's transformers tokenizer; not needed for rows of ``input_ids``.
        head: a head to train further; by default a new one for the labels in the training data.
        cache: activations of earlier runs on the same backbone; this run reads it and adds to it. With several
            processes each has its own, for the texts that it trains on.
        task: another kind of training than ``config.task``, over the same ``model``; see ``Task``. It has its own
            head, and reads the data.
        sources: where backbone and evaluation data are, written to ``sources.json`` for ``adapterkern eval``; or a
            mapping with one entry per subfolder of ``output_dir``.
        callbacks: what to call while the run goes on; see ``Callback``.
        dry_run: do everything up to the first step, show examples as they are learned, take three steps and undo them,
            and return with ``dry_run``, what the run is expected to take, in the result. Writes nothing and leaves the
            model, ``cache`` and ``task``, and the random generators, as they were. In one process.

    With several processes all of them call this with the same arguments, and all return. Rank 0 writes the files.

    Returns:
        a ``TrainResult``. After Ctrl-C (SIGINT), SIGTERM or SIGHUP its ``stopped`` is True. With an ``output_dir``
        there is then a checkpoint of the last finished step, and ``resume=True`` continues from it to the numbers of
        an uninterrupted run (bit-identical on a CPU with the same number of threads).

    Raises:
        DataError: unusable rows; the message names file and line.
        NonFiniteError: a loss, gradient or drift is not finite; the message names the step.
        CheckpointError: with ``resume``, the checkpoint is damaged or belongs to another run.
        FileExistsError: ``output_dir`` holds an earlier run.
        BlockingIOError: another run is writing to ``output_dir``.
        RuntimeError: another thread trains or evaluates ``model``; or one of ``callbacks`` has raised an error.
        FileNotFoundError: with ``resume``, there is no checkpoint.
        TypeError, ValueError: an argument of a wrong type or value, or one that the backbone does not support, such as
            ``padding_side="left"``; the message names it.
        NotImplementedError: several processes, with an engine or a task that does not support them.
    """
    config = TrainConfig() if config is None else config
    check_arguments(model, config, tokenizer, head, cache)
    check_callbacks(callbacks)
    tracker_names(config)
    share = is_share(eval_data)
    if config.best is not None and eval_data is None:
        raise ValueError(f"best: expected eval_data, to find the best evaluation of, got {config.best!r:.80} without")
    check_drift(config, drift_data, evaluates=eval_data is not None)
    (task or Task).check_config(config)
    warn_of_no_effect(config, task, eval_data is not None)
    warn_of_pooling(config, head)
    if model.is_mixing and config.train_adapters:
        raise ValueError("model: expected one adapter to train, got a call inside mixing, where several run")
    accelerator = make_accelerator(config.precision, model.device)
    if config.compile:
        check_compile(model)
    if config.checkpoint_activations:
        check_checkpointing(model)
    if config.offload_activations:
        check_offload(model.device)
    if task is None:
        task = Task(model, None if head is None else head.to(model.device))
    elif task.model is not model or head is not None:
        raise ValueError("task: expected a task built on model, and head=None")
    check_loss(config, task.kind, own=type(task).loss is not Task.loss)
    if checks.flag("dry_run", dry_run) and accelerator.distributed_type is DistributedType.DEEPSPEED:
        raise NotImplementedError("dry_run: expected a run without DeepSpeed")
    with in_one_thread(model), unchanged(task, config) if dry_run else run_folder(config, task.files):
        config = _with_rates(config, model)
        train_set, eval_set, names = _load_both(task, train_data, eval_data, config, tokenizer)
        texts = load_texts(model, drift_data, config, tokenizer, len(train_set) + len(eval_set))
        summaries = _summaries(task, config, {"train": train_set, "eval": eval_set}, names if share else ())
        summaries |= summary_of(texts, config)
        processes.on_rank_zero(lambda: show_data(summaries, config.progress))
        with accelerator.autocast():
            processes.on_every_rank(lambda: check_backbones(task, config, [*train_set, *eval_set], texts))
        warn_of_overlap(train_set, eval_set)
        warn_of_learned(train_set, texts, "drift_data")
        data = Data(train_set, eval_set, *names, summaries, texts=texts, texts_name=texts_name(drift_data))
        set_seed(config.seed)
        with left_as_found(task), task.running(config), contextlib.ExitStack() as stack:
            order = data.order(task, config, 0)  # may raise: before an earlier run is removed
            stack.enter_context(trained_with(task, config, train_set))
            with accelerator.autocast():
                data = dataclasses.replace(data, padding=padding_line(task, data, config))
            backbone = describe_backbone(model)  # before the engine shards it
            zero = accelerator.distributed_type is DistributedType.DEEPSPEED
            check_stack(model, config, config.shard or zero)
            on = below_settings(model, config)
            stack.enter_context(frozen_below(model, config))
            if not (config.shard or zero):  # their weights come and go
                stack.enter_context(cast_once(task))
            if config.compile:
                stack.enter_context(compiled_layers(model, rows_vary=config.packing))
            if config.checkpoint_activations:
                stack.enter_context(checkpointed(model))
            if config.offload_activations:
                stack.enter_context(offloaded(task, model))
            engine = (Zero if zero else Engine)(task, config, accelerator, data.total_steps(config))
            state = _state(task, engine, accelerator, data, config, backbone, on)
            cache = PrefixCache(config.prefix_cache_bytes) if cache is None or dry_run else cache
            feed, sources = Feed(task, config, cache), _with_digest(sources, eval_set)
            run = functools.partial(Rehearsal[Any], tokenizer=tokenizer) if dry_run else Run
            called = stack.enter_context(
                Callbacks(() if dry_run else (*callbacks, *([Trackers(config)] if config.log_with else ())))
            )
            return run(task, data, config, engine, state, feed, order, sources, called).go()


def _with_rates(config: TrainConfig, model: LlamaAdapter) -> TrainConfig:
    begun = None
    if config.resume:
        assert config.output_dir is not None  # TrainConfig has checked it
        begun = read_state(newest_checkpoint(Path(config.output_dir)))["config"]
    return with_rates(config, model.decoder.config.hidden_size, begun)


def _load_both(
    task: Task[Any], train_data: Any, eval_data: Any, config: TrainConfig, tokenizer: Any
) -> tuple[list[Any], list[Any], tuple[str, str | None]]:
    """The examples to learn and to evaluate on, and the names of the two."""
    examples = numbered(task.load(train_data, config, tokenizer))
    if is_share(eval_data):
        part = HeldOut(train_data, eval_data, config.seed)
        return *split(examples, part, targets=_targets(task)), (part.rest, part.name)
    if eval_data is None:
        return examples, [], (source_name(train_data), None)
    eval_set = _load(task, eval_data, config, tokenizer, len(examples))
    return examples, eval_set, (source_name(train_data), _name(eval_data))


def _load(task: Task[Any], data: Any, config: TrainConfig, tokenizer: Any, start: int = 0) -> list[Any]:
    """The examples of data, or of the part of them that was held out, with numbers from ``start``."""
    if not isinstance(data, HeldOut):
        return numbered(task.load(data, config, tokenizer), start)
    examples = numbered(task.load(data.train_data, config, tokenizer), start)
    held = split(examples, data, targets=_targets(task))[1]
    check_unchanged(data, fingerprint(held))
    return held


def _targets(task: Task[Any]) -> OneLabel | None:
    return None if task.head is None else TARGETS[task.head.task]


def _name(data: Any) -> str:
    return data.name if isinstance(data, HeldOut) else source_name(data)


def _with_digest(sources: Any, eval_set: list[Any]) -> Any:
    """The sources with a digest of the part of the training rows that is held out, so that ``evaluate`` knows it."""
    if isinstance(sources, Sources) and isinstance(sources.eval_data, HeldOut):
        part = dataclasses.replace(sources.eval_data, sha256=fingerprint(eval_set))
        return dataclasses.replace(sources, eval_data=part)
    return sources


def _summaries(
    task: Task[Any], config: TrainConfig, sets: Mapping[str, list[Any]], parts: Sequence[str | None] = ()
) -> dict[str, Summary]:
    """The summaries of every part of the non-empty sets, which are these parts of a file.

    What a task names otherwise, as texts to keep, is of no such part.
    """
    return {
        f"{name} {part}".strip(): dataclasses.replace(summary, part="" if part else of_file or "")
        for (name, examples), of_file in itertools.zip_longest(sets.items(), parts)
        for part, summary in (task.summaries(examples, config) if examples else {}).items()
    }


def _state(
    task: Task[Any],
    engine: Engine,
    accelerator: Accelerator,
    data: Data[Any],
    config: TrainConfig,
    backbone: dict[str, Any],
    on: dict[str, Any],
) -> TrainingState:
    """The state that checkpoints save, before the first step."""
    model = task.model
    owners = {id(p): name for name in model.adapters for p in model.adapters[name].parameters()}
    names = dict.fromkeys(owners[id(p)] for p in engine.parameters.values() if id(p) in owners)
    for name in names:
        model.check_saved(name)
    if config.adapter_drop:
        check_drop(config, map(model.adapter_config, names))
    origin = {
        "task": task.kind,
        "settings": task.settings | on,
        "head": {} if task.head is None else task.head.settings,
        "adapters": [model.adapter_config(name).to_dict() for name in names],  # without their names
        "backbone": backbone,
        "eval_fingerprint": fingerprint(data.eval) if data.eval else "",
    } | ({"drift_fingerprint": fingerprint(data.texts)} if data.texts else {})
    return TrainingState(
        engine.parameters,
        engine.optimizer,
        engine.schedule,
        accelerator.scaler,
        config,
        fingerprint(data.train),
        origin,
        task.settings_in,
        data.steps_per_epoch(config),
        None if config.best is None else Best(config.best),
    )


@checks.other_names(**_OTHER_NAMES)
def evaluate(
    model: LlamaAdapter,
    eval_data: Any,
    config: TrainConfig,
    *,
    tokenizer: Any = None,
    drift_data: Any = None,
    head: Head | None = None,
    cache: PrefixCache | None = None,
    task: Task[Any] | None = None,
    answers: list[Any] | None = None,
) -> dict[str, float]:
    """Score the active adapter on data: the same numbers as an evaluation during ``train``.

    Args:
        eval_data: as for ``train``; ``HeldOut(train_data, "10%", seed)`` for what a run has held out.
        drift_data: as for ``train``; there is then ``drift``, too.
        config, head: those of the training, as ``load_run`` reads them.
        cache: activations to reuse; without it texts run through the whole model.
        task: the task of the training, if it had one; it has its own head.
        answers: a list that gets an ``Answer`` per text, the label that a classification head finds, and its
            probability; or its ``Scores`` of another head. In the order of the batches; with several processes those of
            this one's share.

    Returns:
        ``loss`` (nats per text, token or label), ``accuracy`` (0 to 1), ``targets`` (their number), ``seconds`` and
        ``tokens_per_second``; for causal-lm also ``perplexity``. For multi-label ``accuracy`` counts the texts with all
        labels right; also ``f1_micro`` and ``f1_macro``. For regression there is no accuracy, and ``loss`` is the mean
        squared error over the variance of the training's numbers; ``rmse`` and ``mae`` in their unit, and ``r2``,
        ``pearson`` and ``spearman`` where defined. Or the metrics of ``task``.

    Raises:
        DataError: unusable rows; the message names file and line.
        ValueError: a head is missing, or given for causal-lm.
        RuntimeError: another thread trains or evaluates ``model``.
    """
    check_arguments(model, config, tokenizer, head, cache)
    if task is None:
        if (head is None) == config.labeled:
            hint = ", got None: give the head of the training, which is result.head, or load_run(...)[1]"
            expected = f"a head for task {config.task!r}{hint}" if head is None else "no head for task 'causal-lm'"
            raise ValueError(f"head: expected {expected}")
        task = Task(model, None if head is None else head.to(model.device))
        warn_of_pooling(config, head)
    task.check_config(config)
    check_drift(config, drift_data)
    with in_one_thread(model):
        return _evaluated(task, eval_data, drift_data, config, tokenizer, cache, answers)


def _evaluated(
    task: Task[Any],
    eval_data: Any,
    drift_data: Any,
    config: TrainConfig,
    tokenizer: Any,
    cache: PrefixCache | None,
    answers: list[Any] | None,
) -> dict[str, float]:
    model = task.model
    accelerator = make_accelerator(config.precision, model.device)  # joins the processes, of which one shows the data
    examples = _load(task, eval_data, config, tokenizer)
    texts = load_texts(model, drift_data, config, tokenizer, len(examples))
    summaries = _summaries(task, config, {_name(eval_data): examples}) | summary_of(texts, config)
    processes.on_rank_zero(lambda: show_data(summaries, config.progress))
    with accelerator.autocast():
        check_backbones(task, config, examples, texts)
    with task.running(config), left_as_found(task), cast_once(task):
        feed = Feed(task, config, cache)
        with accelerator.autocast():
            use = cache is not None and choose_cache(model, config, [*examples, *texts], passes=2)[0]
        if cache is not None and use:
            both = [*examples, *texts]
            feed.add(both, cache.fill(model, both, config, accelerator.autocast) or [])
        with accelerator.autocast():
            task.prepare(examples, feed, lambda name, total: contextlib.nullcontext(bool))
        run = accelerator.prepare_model(task.train(model.training), evaluation_mode=True)
        with contextlib.nullcontext() if answers is None else answers_kept(task, feed, answers):
            metrics = run_evaluation(task, run, examples, feed, config)
        if texts:
            metrics |= Drift(task, texts, feed).measure(run)
        return metrics
