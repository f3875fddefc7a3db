"""The training loop.

One step learns from ``batch_size · accumulation`` rows. Each forward returns the *sum* of its losses, which is divided
by the number of targets in the whole step, known on the host. So rows and tokens have equal weight however they are
distributed over forwards, and accumulation changes only the memory used.

Nothing in a step waits for the device, except the fp16 scaler's decision. Losses and gradient norms stay on the device
until a log line needs them. Then each is checked, so a number that is not finite is reported with its own step. Such a
step has changed no parameter: ClippedAdamW changes nothing if the norm is not finite. On a CPU each is checked at once.
"""

import functools
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

import torch

from adapterkern.files import write_json
from adapterkern.training import processes
from adapterkern.training.attention import fast_attention
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import count_tokens
from adapterkern.training.data.examples import E, Example
from adapterkern.training.data.prefix import choose_cache
from adapterkern.training.data.rows import warn
from adapterkern.training.data.sets import Data
from adapterkern.training.drift import Drift
from adapterkern.training.feed import Feed, eval_batches, run_evaluation
from adapterkern.training.optimization import sites_to_skip
from adapterkern.training.parallel.engine import Engine
from adapterkern.training.run import checkpoint
from adapterkern.training.run.best import check_metric
from adapterkern.training.run.callbacks import Callbacks, RunInfo
from adapterkern.training.run.folder import newest_checkpoint, remove_earlier_run, write_run_card
from adapterkern.training.run.interrupt import StopRequest
from adapterkern.training.run.meter import Meter, Step
from adapterkern.training.run.report import DATA_NAME, PLOT_NAME, Reporter
from adapterkern.training.run.results import NonFiniteError, TrainResult, counted
from adapterkern.training.saved import Sources, save_sources
from adapterkern.training.task import Task

# With half of them SmolLM2-135M, adapted to 400 texts of 8 labels, was 1.3 points worse: docs/compared.md
FEW_STEPS = 200


class Run(Generic[E]):
    """One training run: the order of steps, evaluations and files.

    ``api.train`` builds its parts: the task, the data, the engine for the steps, the state for checkpoints, and the
    feed for batches.
    """

    def __init__(
        self,
        task: Task[E],
        data: Data[E],
        config: TrainConfig,
        engine: Engine,
        state: checkpoint.TrainingState,
        feed: Feed,
        order: list[int],  # of the first epoch
        sources: Sources | Mapping[str, Sources] | None,
        callbacks: Callbacks,
    ) -> None:
        self.task, self.data, self.config = task, data, config
        self.engine, self.state, self.feed = engine, state, feed
        self.sources, self.callbacks = sources, callbacks
        self.drift = Drift(task, data.texts, feed) if data.texts else None
        self.model = task.model
        self.output_dir = None if config.output_dir is None else Path(config.output_dir)
        self.steps_per_epoch, self.total_steps = data.steps_per_epoch(config), data.total_steps(config)
        self.order = 0, order  # an epoch and its order of rows
        self.pending: list[Step] = []
        self.meter = Meter()
        self.prefix_layers = 0
        self.metrics: dict[str, float] | None = None
        self.metrics_step, self.saved = 0, ""  # which step's state is saved, if that is not the last one's
        self.checkpoint: Path | None = None
        self.ended: str | None = None  # why, of a run that ends before its last step

    def go(self) -> TrainResult:
        """Run to the last step or until a signal; resume first if ``config.resume``."""
        config, state = self.config, self.state
        if config.resume:
            assert self.output_dir is not None  # TrainConfig has checked it
            self.checkpoint = newest_checkpoint(self.output_dir)
            checkpoint.load_checkpoint(self.checkpoint, state)
            self._lose_patience()
        try:
            self.engine.start()
            with StopRequest() as stop, self._reporter() as reporter:
                if state.step:
                    reporter.say(f"resumed from {self.checkpoint}")
                elif len(self.data.train) < config.rows_per_step:
                    rows = f"{len(self.data.train)} training rows are fewer than a step's {config.rows_per_step}"
                    reporter.say(f"{rows}: every step learns from all of them")
                if type(self.task) is Task and config.task == "classification" and not state.step:
                    self._say_few(reporter)
                if self.data.padding:
                    reporter.say(self.data.padding)
                processes.on_every_rank(lambda: self._fill_cache(reporter, stop))
                processes.on_every_rank(lambda: self._prepare(reporter, stop))
                self._prepare_drift(reporter, stop)
                self._check_best()
                if not self._stopped(stop):  # after all of ours that may fail
                    processes.on_rank_zero(lambda: remove_earlier_run(config, self.task.files))
                self.callbacks.start(self._info())
                self.engine.run.train()
                while self._goes_on() and not self._stopped(stop):
                    self._timed_step(reporter)
                    self._after_step(reporter)
                if stopped := self._goes_on():
                    self._stop(reporter, stop.signal_name)
                else:
                    self._finish(reporter)
        finally:
            self.engine.end()
        result = self._result(stopped, reporter.history)
        self.callbacks.end(result)
        return result

    def _say_few(self, reporter: Reporter) -> None:
        if self.config.max_steps is None and self.total_steps < FEW_STEPS:
            epochs = math.ceil(FEW_STEPS / self.steps_per_epoch)
            steps = f"{self.total_steps} step{'s are' if self.total_steps > 1 else ' is'} few to learn new labels"
            reporter.say(f"{steps}: {FEW_STEPS} are {epochs} epochs here")

    def _goes_on(self) -> bool:
        return self.state.step < self.total_steps and self.ended is None

    def _result(self, stopped: bool, history: list[dict[str, Any]]) -> TrainResult:
        state, meter, head = self.state, self.meter, self.task.head
        return TrainResult(
            steps=state.step,
            stopped=stopped,
            ended=self.ended,
            best_step=state.best.step or None if state.best and not stopped else None,
            metrics=self.metrics,
            history=history,
            head=head,
            labels=[] if head is None else head.labels,
            trainable_parameters=sum(p.numel() for p in state.parameters.values()),
            skipped_steps=state.skipped_steps,
            seconds=meter.seconds,
            prefix_seconds=meter.prefix_seconds,
            eval_seconds=meter.eval_seconds,
            tokens_per_second=meter.tokens / meter.seconds if meter.seconds else 0.0,
            prefix_layers=self.prefix_layers,
            checkpoint=self.checkpoint,
        )

    def _reporter(self) -> Reporter:
        made: list[Reporter] = []  # a Reporter cannot be broadcast: rank 0 keeps this one, the others make a silent one
        steps = self.total_steps if self._goes_on() else self.state.step, self.state.step
        processes.on_rank_zero(lambda: made.append(Reporter(self.output_dir, *steps, self.config.progress)))
        return made[0] if made else Reporter(None, *steps, show=False)

    def _stopped(self, stop: StopRequest) -> bool:
        """Whether any rank has been asked to stop; several ranks on GPUs check only at steps that sync anyway."""
        if processes.world_size() > 1 and self.model.device.type != "cpu" and not any(self._due()):
            return False
        return processes.any_rank(bool(stop), self.model.device)

    # Before the first step

    def _fill_cache(self, reporter: Reporter, stop: StopRequest) -> None:
        examples: list[Example] = [*self.task.reread(self._own()), *self.data.eval, *self.data.texts]
        self.state.prefix_cached = self._pays_to_cache(examples, reporter)
        if not self.state.prefix_cached:
            return
        layers, depth = self.model.prefix_length, len(self.model.layers)
        for name in ("compile", "checkpoint_activations", "offload_activations"):
            if getattr(self.config, name) and layers == depth:
                warn("%s: has no effect: all layers' outputs come from the prefix cache", name)
        started, cast = time.perf_counter(), self.engine.accelerator.autocast
        assert self.feed.cache is not None
        with reporter.side_task("prefix", len(examples), stop) as on_batch:
            slots = self.feed.cache.fill(self.model, examples, self.config, cast, on_batch)
        if slots is not None:
            self.feed.add(examples, slots)
            self.prefix_layers = layers
        self.meter.prefix_seconds = time.perf_counter() - started

    def _pays_to_cache(self, examples: list[Example], reporter: Reporter) -> bool:
        passes = math.ceil(self.total_steps / self.steps_per_epoch) if examples else 0
        before = self.state.prefix_cached if self.state.step else None
        with self.engine.accelerator.autocast():
            use, why = choose_cache(self.model, self.config, examples, passes, before)
        layers, depth = self.model.prefix_length, len(self.model.layers)
        reporter.say(f"prefix cache: {f'the first {layers} of {depth} layers, {why}' if use else f'off, since {why}'}")
        return use

    def _prepare(self, reporter: Reporter, stop: StopRequest) -> None:
        with self.engine.accelerator.autocast():
            bar = functools.partial(reporter.side_task, stop=stop)
            if said := self.task.prepare([*self._own(), *self.data.eval], self.feed, bar):
                reporter.say(said)

    def _prepare_drift(self, reporter: Reporter, stop: StopRequest) -> None:
        if self.drift is not None:
            self.drift.prepare(self.engine.run, functools.partial(reporter.side_task, stop=stop))

    def _own(self) -> list[E]:
        """The training examples that this rank will use."""
        if processes.world_size() == 1:
            return self.data.train
        steps = range(self.state.step, self.total_steps)
        batches = (batch for step in steps for batch, _ in self._share(self._examples(step)))
        return list({example.row: example for batch in batches for example in batch}.values())

    def _check_best(self) -> None:
        """Raise ``ValueError`` if the evaluations will not give the metric of ``config.best``."""
        if self.config.best in (None, "loss"):  # which all have
            return
        for examples in self._samples():
            found = run_evaluation(self.task, self.engine.run, examples, self.feed, self.config)
            found |= {} if self.drift is None else dict.fromkeys(self.drift.names, 0.0)
            if self.config.best in found:
                break
        check_metric(self.config.best, found)

    def _samples(self) -> list[list[E]]:
        """Examples to evaluate that may show all metrics: a batch from all over, and if need be all."""
        return [self.data.eval[:: len(eval_batches(self.data.eval, self.config))], self.data.eval]

    def _info(self) -> RunInfo:
        trained = sum(p.numel() for p in self.state.parameters.values())
        return RunInfo(self.config, self.state.step, self.total_steps, self.steps_per_epoch, trained)

    # A step

    def _share(self, examples: list[E]) -> list[tuple[list[E], bool]]:
        return processes.share(examples, self.config.batch_size)

    def _timed_step(self, reporter: Reporter) -> None:
        started, step, cast = time.perf_counter(), self.state.step, self.engine.accelerator.autocast
        examples = self.task.step_examples(self._examples(step), self.config, *divmod(step, self.steps_per_epoch), cast)
        with self.model.skipping(sites_to_skip(self.config, step)):
            self._step(examples)
        reporter.step(self.state.step)
        if self.model.device.type == "cpu" or any(self._due()):
            self._drain()
        self.meter.step(count_tokens(examples), time.perf_counter() - started)

    def _examples(self, step: int) -> list[E]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, self.data.order(self.task, self.config, epoch)
        rows = self.config.rows_per_step
        return [self.data.train[i] for i in self.order[1][index * rows : (index + 1) * rows]]

    def _step(self, examples: list[E]) -> None:
        state, targets = self.state, self.task.total_weight(examples)
        self.task.begin_step(examples, self.config, *divmod(state.step, self.steps_per_epoch))
        losses = []
        batches = self._share(examples)
        for number, (batch, counts) in enumerate(batches, start=1):
            inputs, last = self.feed(batch), number == len(batches)
            with fast_attention(self.model, inputs["input_ids"].shape, self.config.precision):
                loss, _ = self.engine.forward(inputs, last)
                loss = loss if counts else 0 * loss
                self.engine.backward(loss / targets, last)
            losses.append(loss.detach())
        loss = processes.total(torch.stack(losses).sum()) / targets
        grad_norm = self.engine.step(loss)
        state.step += 1
        if grad_norm is None:
            state.skipped_steps += 1
            state.skipped_in_a_row += 1
        else:
            state.schedule.step()
            state.skipped_in_a_row = 0
        self.pending.append(Step(state.step, loss, grad_norm))

    def _drain(self) -> None:
        """Read the numbers of finished steps from the device in one transfer; raise if one is not finite."""
        columns = [step.loss if step.grad_norm is None else step.grad_norm for step in self.pending]
        values = torch.stack([torch.stack([s.loss, n]) for s, n in zip(self.pending, columns, strict=True)]).tolist()
        steps, self.pending = self.pending, []
        for step, (loss, norm) in zip(steps, values, strict=True):
            for quantity, value in (("the loss", loss), ("the gradient's norm", norm)):
                if not math.isfinite(value):
                    problem = f"{quantity} is {value}; the step was not applied"
                    raise NonFiniteError(step.number, problem, self.checkpoint)
            self.state.window.append((loss, None if step.grad_norm is None else norm))
        if self.state.skipped_in_a_row > self.config.max_skipped_steps:
            problem = f"{self.state.skipped_in_a_row} consecutive steps had gradients beyond fp16 at any scale"
            raise NonFiniteError(self.state.step, problem, self.checkpoint)

    # Between steps

    def _after_step(self, reporter: Reporter) -> None:
        log, evaluation, save = self._due()
        if log:
            self._log(reporter)
        if evaluation:
            save |= self._evaluate(reporter)
        if save:
            self._save_checkpoint()

    def _due(self) -> tuple[bool, bool, bool]:
        """Whether a log line, an evaluation and a checkpoint follow this step. `_finish` does the last step's."""
        config, step = self.config, self.state.step
        if step == self.total_steps:
            return True, False, False
        return (
            step % config.log_every == 0,
            step % (config.eval_every or self.steps_per_epoch) == 0,
            step % (config.checkpoint_every or self.steps_per_epoch) == 0,
        )

    def _log(self, reporter: Reporter) -> None:
        window, self.state.window = self.state.window, []
        norms = [norm for _, norm in window if norm is not None]
        record = reporter.train(
            {
                "step": self.state.step,
                "epoch": self.state.step / self.steps_per_epoch,
                "loss": sum(loss for loss, _ in window) / len(window),
                "lr": self.state.schedule.get_last_lr()[0],
                "grad_norm": sum(norms) / len(norms) if norms else 0.0,
                "tokens_per_second": self.meter.window(),
                "skipped_steps": self.state.skipped_steps,
            }
        )
        self._ask("on_step", record)

    def _ask(self, method: str, record: dict[str, Any]) -> None:
        if (name := self.callbacks.ask(method, record, self.checkpoint)) and self._goes_on():
            self.ended = f"{name} has asked for it"

    def _evaluate(self, reporter: Reporter) -> bool:
        """Evaluate, if there is something to evaluate on; whether it was the best evaluation so far."""
        if not self.data.eval:
            return False
        metrics = run_evaluation(self.task, self.engine.run, self.data.eval, self.feed, self.config)
        started = time.perf_counter()
        metrics |= {} if self.drift is None else self.drift.measure(self.engine.run)
        self.meter.eval_seconds += metrics["seconds"] + time.perf_counter() - started
        for name in ("loss", *([] if self.drift is None else self.drift.names)):
            if not math.isfinite(metrics[name]):
                problem = f"the evaluation's {name} is {metrics[name]}"
                raise NonFiniteError(self.state.step, problem, self.checkpoint)
        step, best = self.state.step, self.state.best
        self.metrics, self.metrics_step = metrics, step
        improved = best is not None and best.update(step, metrics, lambda: self.engine.gathered().parameters)
        flag = {"best": True} if best is not None and best.step == step else {}
        record = reporter.evaluation({"step": step, "epoch": step / self.steps_per_epoch, **metrics, **flag})
        self._ask("on_evaluation", record)
        self._lose_patience()
        return improved

    def _lose_patience(self) -> None:
        best, patience = self.state.best, self.config.patience
        if best is not None and patience is not None and best.since >= patience and self._goes_on():
            few = counted(best.since, "evaluation")
            self.ended = f"{few} without a better {best.metric} than that of step {best.step}"

    def _save_checkpoint(self) -> None:
        if self.output_dir is not None:
            processes.on_rank_zero(self._save_sources)
            gathered = self.engine.gathered()
            with self.engine.with_parameters(gathered.parameters):
                self.checkpoint = checkpoint.save_checkpoint(self.output_dir, self.state, gathered, self._save_model)

    def _save_sources(self) -> None:
        if self.sources is not None and self.output_dir is not None:
            save_sources(self.output_dir, self.sources)

    def _save_model(self, directory: Path) -> None:
        self.task.save(directory, self.config)
        data, kind = self.data, self.task.kind
        described = {
            "task": self.config.task if kind == Task.__name__ else kind,
            "data": os.path.basename(data.train_name),
            "examples": len(data.train),
            "steps": self.state.step,
            "eval_data": None if data.eval_name is None else os.path.basename(data.eval_name),
            "eval_examples": len(data.eval),
            "drift_data": os.path.basename(data.texts_name or "") if data.texts else None,
            "drift_examples": len(data.texts),
            "metrics": self.metrics,
            "metrics_step": self.metrics_step,
            "saved": self.saved,
            "labels": () if self.task.head is None else self.task.head.labels,
        }
        write_run_card(directory, self.model, self.config, described)

    def _stop(self, reporter: Reporter, signal_name: str | None) -> None:
        if self.pending:
            self._drain()
        if self.state.step:
            self._save_checkpoint()
        cause = signal_name or "a signal to another process"
        where = f"{cause}: stopped after step {self.state.step} of {self.total_steps}"
        if self.output_dir is None:
            reporter.say(f"{where}; no output_dir, so nothing was saved")
        elif self.checkpoint is None:
            reporter.say(f"{where}; nothing was saved, because no step was finished")
        else:
            reporter.say(f"{where}; saved {self.checkpoint}; with resume, a run goes on from there")

    def _finish(self, reporter: Reporter) -> None:
        if skipped := self.state.skipped_steps:
            problem = f"{skipped} of {self.state.step} steps had gradients beyond fp16 and changed nothing"
            if skipped == self.state.step:
                raise NonFiniteError(self.state.step, problem, self.checkpoint)
            reporter.say(problem)
        if self.ended:
            reporter.say(f"ended early, after step {self.state.step} of {self.total_steps}: {self.ended}")
        if self.metrics_step != self.state.step:  # it has not just been done
            self._evaluate(reporter)
        self._save_checkpoint()
        best = self.state.best
        if best is not None and best.step:
            self.engine.put(best.parameters)
            self.metrics, self.metrics_step, self.saved = best.metrics, best.step, str(best)
            reporter.say(f"saved: {self.saved}")
        with self.engine.with_parameters(self.engine.gathered().parameters):
            processes.on_rank_zero(lambda: self._write_output(reporter))

    def _write_output(self, reporter: Reporter) -> None:
        if self.output_dir is not None:
            self._save_model(self.output_dir)
            write_json(self.output_dir / DATA_NAME, {name: s.to_dict() for name, s in self.data.summaries.items()})
            if self.config.plot:
                from adapterkern.training.run.plot import plot_history  # matplotlib takes a second to import

                plot_history(reporter.history, self.output_dir / PLOT_NAME, self.config.task)
