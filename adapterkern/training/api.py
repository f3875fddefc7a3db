"""The doors of a run: ``train`` builds one and runs it, ``evaluate`` scores what it has left."""

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed

from adapterkern.model.llama import LlamaAdapter
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import fingerprint
from adapterkern.training.data.examples import numbered
from adapterkern.training.data.prefix import PrefixCache, choose_cache
from adapterkern.training.data.rows import source_name
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.loop import Data, Run
from adapterkern.training.parallel.accelerator import left_as_found, make_accelerator
from adapterkern.training.parallel.deepspeed import Zero
from adapterkern.training.parallel.engine import Engine
from adapterkern.training.run.checkpoint import TrainingState, describe_backbone
from adapterkern.training.run.folder import prepare_folder
from adapterkern.training.run.results import TrainResult
from adapterkern.training.saved import Sources
from adapterkern.training.task import Feed, Task, run_evaluation


def train(
    model: LlamaAdapter,
    train_data: Any,
    config: TrainConfig | None = None,
    *,
    tokenizer: Any = None,
    eval_data: Any = None,
    head: ClassificationHead | None = None,
    cache: PrefixCache | None = None,
    task: Task[Any] | None = None,
    sources: Sources | Mapping[str, Sources] | None = None,
) -> TrainResult:
    """Train the active adapter, with a classification head or as a language model.

    Args:
        model: on the device where it shall train. The backbone stays frozen.
        train_data, eval_data: see :func:`~adapterkern.training.load_examples`; or what ``task`` loads.
        config: see :class:`TrainConfig`.
        tokenizer: the backbone's transformers tokenizer; not needed for rows of ``input_ids``.
        head: a head to train further; default a new one for the labels that the training data has.
        cache: activations of earlier runs on the same backbone, to use and to add to.
            Over several processes each has its own, of the texts that it trains on.
        task: another kind of training than ``config.task``, over the same ``model``; see :class:`Task`. It has its own
            head, and reads the data.
        sources: where backbone and evaluation data are, written to ``sources.json`` for ``adapterkern eval``; or one
            for each of several folders in ``output_dir``.

    Returns:
        a :class:`TrainResult`. After Ctrl-C (SIGINT) or SIGTERM its ``stopped`` is True, and with an ``output_dir`` a
        checkpoint of the last finished step exists, from which ``resume=True`` goes on to the numbers of an undisturbed
        run (to the bit on a CPU with as many threads). Over several processes, which all call this with the same
        arguments, they all return; the first has written everything, and has the whole history.

    Raises:
        DataError: rows that cannot be used, by file and line.
        NonFiniteError: a loss or gradient that is not finite, by step.
        CheckpointError: with ``resume``, a checkpoint that is damaged or of another run.
        FileExistsError: ``output_dir`` holds an earlier run. FileNotFoundError: there is none to resume.
        ValueError, TypeError: an argument that does not fit, by name.
        NotImplementedError: several processes, and an engine or a task that cannot use them.
    """
    config = config or TrainConfig()
    accelerator = make_accelerator(config.precision, model.device)
    if task is None:
        task = Task(model, None if head is None else head.to(model.device))
    elif task.model is not model or head is not None:
        raise ValueError("task: expected one over the same model, and no head beside it")
    files = task.files
    processes.on_rank_zero(lambda: prepare_folder(config, files))
    train_set = numbered(task.load(train_data, config, tokenizer))
    eval_set = [] if eval_data is None else numbered(task.load(eval_data, config, tokenizer), len(train_set))
    data = Data(train_set, eval_set, source_name(train_data), None if eval_data is None else source_name(eval_data))
    set_seed(config.seed)
    with left_as_found(task), task.running(config):
        order = task.order(train_set, config, 0)  # refuses what it cannot order, before an earlier run is replaced
        backbone = describe_backbone(model)  # while this process has all of it
        zero = accelerator.distributed_type is DistributedType.DEEPSPEED
        engine = (Zero if zero else Engine)(task, config, accelerator, data.total_steps(config))
        state = _state(task, engine, accelerator, data, config, backbone)
        feed = Feed(task, config, PrefixCache(config.prefix_cache_bytes) if cache is None else cache)
        return Run(task, data, config, engine, state, feed, order).go(sources)


def _state(
    task: Task[Any],
    engine: Engine,
    accelerator: Accelerator,
    data: Data[Any],
    config: TrainConfig,
    backbone: dict[str, Any],
) -> TrainingState:
    """What a checkpoint holds, before the first step."""
    model = task.model
    owners = {id(p): name for name in model.adapters for p in model.adapters[name].parameters()}
    names = dict.fromkeys(owners[id(p)] for p in engine.parameters.values() if id(p) in owners)
    origin = {
        "task": task.kind,
        "settings": task.settings,
        "adapters": [model.adapter_config(name).to_dict() for name in names],  # whatever they are called
        "backbone": backbone,
    }
    return TrainingState(
        engine.parameters,
        engine.optimizer,
        engine.schedule,
        accelerator.scaler,
        config,
        fingerprint(data.train),
        origin,
    )


def evaluate(
    model: LlamaAdapter,
    eval_data: Any,
    config: TrainConfig,
    *,
    tokenizer: Any = None,
    head: ClassificationHead | None = None,
    cache: PrefixCache | None = None,
    task: Task[Any] | None = None,
) -> dict[str, float]:
    """Loss and accuracy of the active adapter on data: the same numbers as an evaluation within :func:`train`.

    ``config`` and ``head`` are those of the training, as :func:`load_run` reads them; ``task`` stands for both model
    and head where the training had one. Without ``cache``, texts run through the whole model.

    Returns:
        ``loss`` (nats per text or token), ``accuracy`` (0 to 1), ``targets``, ``seconds``, ``tokens_per_second``, and
        for causal-lm ``perplexity``; or what ``task`` scores.
    """
    if task is None:
        if (head is None) == (config.task == "classification"):
            expected = "a" if head is None else "no"
            raise ValueError(f"head: expected {expected} head for task {config.task!r}")
        task = Task(model, None if head is None else head.to(model.device))
    examples = numbered(task.load(eval_data, config, tokenizer))
    accelerator = make_accelerator(config.precision, model.device)
    with task.running(config), left_as_found(task):
        feed = Feed(task, config, cache)
        if cache is not None and choose_cache(model, config, examples, passes=2)[0]:
            feed.add(examples, cache.fill(model, examples, config, accelerator.autocast) or [])
        run = accelerator.prepare_model(task.train(model.training), evaluation_mode=True)
        return run_evaluation(task, run, examples, feed, config)
