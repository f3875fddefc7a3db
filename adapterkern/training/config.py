"""``TrainConfig``: everything that decides what a training run computes, as one flat, JSON-serializable record."""

import dataclasses
import math
import os
from typing import Any

from adapterkern import checks

LABELED = ("classification", "multi-label", "regression")  # each text has a label, and a head learns it
TASKS = (*LABELED, "causal-lm")
POOLINGS = ("mean", "last")
PADDING_SIDES = ("right", "left")
PADDINGS = ("longest", "max_length")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")

# These change where a run writes, what it shows, how fast it is and the memory it takes, but none of its numbers
# (prefix_cache, packing and compile only their rounding): a resumed run may change them. With any other field changed
# it would be a different run.
FREE_ON_RESUME = frozenset(
    {
        "output_dir",
        "overwrite",
        "resume",
        "checkpoint_every",
        "keep_checkpoints",
        "log_every",
        "progress",
        "plot",
        "eval_every",
        "eval_batch_size",
        "prefix_cache",
        "prefix_cache_bytes",
        "max_skipped_steps",
        "shard",
        "packing",
        "compile",
        "log_with",
        "checkpoint_activations",
        "offload_activations",
    }
)
# How long a run goes on: a resumed one may be given other values, and is then the longer or shorter run from there on.
LENGTHS = frozenset({"epochs", "max_steps", "patience"})


# As transformers' and TRL's trainers have them
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "gradient_accumulation_steps": "accumulation",
    "max_grad_norm": "max_norm",
    "clip_norm": "max_norm",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "lr_warmup": "warmup",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "logging_steps": "log_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "eval_steps": "eval_every",
    "bf16": 'precision="bf16"',
    "fp16": 'precision="fp16"',
    "max_seq_length": "max_length",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    "betas": "beta1 and beta2",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "adam_epsilon": "eps",
    "dataset_text_field": "text_column",
    "disable_tqdm": "progress=False",
    "gradient_checkpointing": "checkpoint_activations",
    "activation_checkpointing": "checkpoint_activations",
    "activation_offloading": "offload_activations",
    "enable_activation_offloading": "offload_activations",
    "use_liger_kernel": "LlamaAdapter(..., liger=True) and no argument",
    "fsdp": "shard",
    "torch_compile": "compile",
    "metric_for_best_model": "best",
    "load_best_model_at_end": "best",
    "greater_is_better": "best and no argument: its name says which way",
    "early_stopping_patience": "patience",
    "early_stopping": "patience",
    "label_smoothing_factor": "label_smoothing",
    "class_weight": "class_weights",
    "report_to": "log_with",
    "logging_dir": "output_dir",
    "padding_free": "packing",
    "eval_packing": "packing, of evaluations too",
    "packing_strategy": "packing",
    "train_sampling_strategy": "group_by_length",
    "length_grouping": "group_by_length",
}


@checks.other_names(**OTHER_NAMES)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Every field has a default; a ``TypeError`` or ``ValueError`` names one of a wrong type or value.

    Args: What is learned
        task: ``"classification"`` (one label per text), ``"multi-label"`` (a list of labels per text, possibly empty),
            ``"regression"`` (a number per text) or ``"causal-lm"`` (next token; prompt tokens carry no loss).
        train_adapters: False trains the head alone, on the bare backbone.
        train_stack: of a stack (``set_adapter`` of a list) train all adapters, not the last one alone.
        pooling: a head reads the ``"mean"`` of the real tokens' states, or the ``"last"`` token's.
        text_column: the text of rows with a label, and of causal-lm rows without a prompt; for causal-lm it may hold
            lists of chat messages.
        label_column: the label: a string or an integer, a list of them, or a number, as ``task`` says.
        prompt_column, completion_column: the columns of causal-lm rows with a prompt, texts or lists of chat messages.
        max_length: tokens per row; longer rows are cut at the end.
        skip_bad_rows: skip bad rows, with a warning, instead of refusing the file.

    Args: Batches
        batch_size: rows per forward.
        accumulation: forwards per optimizer step. All rows of a step (target tokens, for causal-lm) have equal weight,
            whichever forward they are in.
        eval_batch_size: default ``batch_size``.
        padding: to the ``"longest"`` row of a batch, or always to ``"max_length"``.
        padding_side: ``"right"`` or ``"left"``.
        packing: put the texts of a batch into as few rows as possible, each as long as the longest of them, where they
            do not attend to each other (causal-lm). The results are the same but for rounding: a step still learns
            from ``batch_size · accumulation`` of the data's rows.
        group_by_length: let the rows of a step be of alike length: an epoch's order is sorted within each 50 steps, and
            the steps are shuffled. It changes which rows a step learns from.
        seed: of the head's weights and of the order of rows, which is a function of (seed, epoch) alone. The generators
            of Python, NumPy and torch are seeded with it too.

    Args: Steps
        epochs: passes over the data, unless ``max_steps`` gives the number of steps.
        lr, weight_decay, beta1, beta2, eps: AdamW's. Vectors (biases, norms) do not decay. No ``lr`` is 6e-3, less
            in a backbone wider than 576: see ``optimization.default_lr``; a resumed run keeps its own.
        head_lr: the learning rate of a head beside adapters; none is ``lr`` if that is given, else 1e-2, less in a
            wider backbone. A head alone has ``lr``, and by default that of a head.
        max_norm: largest global norm of the gradient; ``math.inf`` does not clip.
        schedule: after the warmup ``"linear"`` or ``"cosine"`` decay to 0 at the last step, or ``"constant"``.
        warmup: steps of linear warmup; a value below 1 is their share of all steps.
        precision: ``"fp32"`` (no autocast), ``"bf16"`` autocast, or ``"fp16"`` autocast with a gradient scaler.
        adapter_drop: in each step the first n sites of an adapter do nothing, n drawn evenly from 0 to this number
            (Rücklé et al. 2021): later ``model.skipping(n)`` costs little. Fewer than an adapter has.
        max_skipped_steps: raise after more than this many consecutive steps that the fp16 scaler skips.
        label_smoothing: of the training loss, as in ``torch.nn.functional.cross_entropy``: this share of a target is
            spread over all classes or tokens. The loss of an evaluation is plain.
        class_weights: of the training loss of a classification: ``"balanced"`` weighs a row of a class by rows /
            (classes · rows of the class), as scikit-learn does; or a mapping from each label to a number > 0, which has
            no option. A step's loss is divided by the sum of its rows' weights.

    Args: The best evaluation
        best: save and return, at the end, what was trained at the best evaluation by this metric. Lower is better of a
            name that ends with loss, perplexity, cross_entropy, divergence, drift, rmse, mse or mae, higher of any
            other; of two equal ones the earlier is the best.
        patience: end the run once so many evaluations in a row were no better than the best; needs ``best``.

    Args: Several processes
        shard: shard the frozen backbone over them (FSDP2) instead of replicating it. Either way a step has
            ``batch_size · accumulation`` rows over all processes together.

    Args: Files and display
        output_dir: the folder for everything that is written; None writes nothing.
        overwrite: replace an earlier run there.
        resume: continue from the newest checkpoint in ``output_dir``.
        checkpoint_every: steps between checkpoints; None writes one at the end of each epoch.
        keep_checkpoints: how many checkpoints to keep; that of the best evaluation is kept beside them.
        eval_every: steps between evaluations; None evaluates at the end of each epoch.
        log_every: steps between log lines. Only a log line waits for an asynchronous device.
        progress: show a progress bar.
        plot: draw ``training.png`` at the end.
        log_with: also log to these trackers of accelerate: ``"tensorboard"``, ``"wandb"``, ...; several are separated
            by commas. Needs ``output_dir``.

    Args: Speed
        compile: run the frozen layers through torch.compile in training steps, not in evaluations. The results are the
            same but for rounding. It takes about a minute at the start: for runs of 1,000 steps and more.

    Args: Memory
        checkpoint_activations: keep each layer's input alone for the backward, and run the layer again in it. The
            results keep their bits. A step takes one more forward of the layers from the first adapter on.
        offload_activations: on a GPU, keep in the host's memory what the layers keep for the backward. The results keep
            their bits.

    Args: The frozen prefix
        prefix_cache: compute the activations below the first adapter once and reuse them; None decides by cost and
            benefit, and a resumed run keeps the decision.
        prefix_cache_bytes: size of the cache in memory; the rest goes to a memory-mapped temporary file.
    """

    task: str = checks.option(
        "classification",
        "learn one label per text (classification), a list of labels (multi-label), a number (regression), or the "
        "next token (causal-lm)",
        TASKS,
    )
    train_adapters: bool = checks.option(True, "--no-train-adapters trains the head alone")
    train_stack: bool = checks.option(False, "train the adapters below the new one too, which are frozen otherwise")
    pooling: str = checks.option(
        "mean", "what the head reads: the mean of the tokens' states, or the last token's", POOLINGS
    )
    text_column: str = checks.option("text", "column of the texts")
    label_column: str = checks.option("label", "column of the labels")
    prompt_column: str = checks.option("prompt", "causal-lm: column of the prompt, whose tokens carry no loss")
    completion_column: str = checks.option("completion", "causal-lm: column of the text to learn after the prompt")
    max_length: int = checks.option(256, "tokens per row; longer rows are cut at the end")
    skip_bad_rows: bool = checks.option(False, "skip bad rows with a warning instead of refusing the file")

    batch_size: int = checks.option(16, "rows per forward")
    accumulation: int = checks.option(1, "forwards per optimizer step")
    eval_batch_size: int | None = checks.option(None, "rows per forward of an evaluation; default: batch_size")
    padding: str = checks.option("longest", "pad to the longest row of a batch, or always to max_length", PADDINGS)
    padding_side: str = checks.option("right", "side of the padding", PADDING_SIDES)
    packing: bool = checks.option(
        False, "causal-lm: several texts in a row of a batch, apart from each other: less padding, the same results"
    )
    group_by_length: bool = checks.option(False, "steps of texts of alike length: less padding, another order")
    seed: int = checks.option(0, "seeds the new weights and the order of rows")

    epochs: int = checks.option(3, "passes over the data")
    max_steps: int | None = checks.option(None, "optimizer steps, instead of epochs")
    lr: float | None = checks.option(
        None,
        "AdamW's learning rate after the warmup; default: 6e-3 of adapters, or 3.46 / the width where that is less",
    )
    head_lr: float | None = checks.option(
        None,
        "learning rate of a head beside adapters; default: lr if given, else 1e-2, or 5.76 / the width if less",
    )
    weight_decay: float = checks.option(0.01, "decoupled decay of matrices; biases and norms do not decay")
    beta1: float = checks.option(0.9, "decay rate of AdamW's first moment")
    beta2: float = checks.option(0.999, "decay rate of AdamW's second moment")
    eps: float = checks.option(1e-8, "added to AdamW's denominator")
    max_norm: float = checks.option(1.0, "largest global gradient norm; inf does not clip")
    schedule: str = checks.option(
        "linear", "learning rate after the warmup: linear or cosine decay to 0, or constant", SCHEDULES
    )
    warmup: float = checks.option(0.06, "steps of linear warmup; below 1, their share of all steps")
    precision: str = checks.option("fp32", "bf16 and fp16 run under autocast, fp16 with a gradient scaler", PRECISIONS)
    adapter_drop: int = checks.option(
        0, "in each step an adapter's first n sites are skipped, n drawn evenly from 0 to this (AdapterDrop)"
    )
    max_skipped_steps: int = checks.option(
        20, "raise after more than this many consecutive steps that the fp16 scaler skips"
    )
    label_smoothing: float = checks.option(0.0, "share of each target that is spread over all; of the training loss")
    class_weights: str | dict[str, float] | None = checks.option(
        None, "balanced: rows of rare labels weigh more; of the training loss of a classification"
    )

    best: str | None = checks.option(
        None,
        "save the state of the best evaluation by this metric, such as accuracy or loss; lower is better of what ends "
        "with loss, perplexity, cross_entropy, divergence, drift, rmse, mse or mae, higher of all else",
    )
    patience: int | None = checks.option(None, "end the run after so many evaluations in a row without a better best")

    output_dir: str | os.PathLike[str] | None = checks.option(None, "the folder for everything that is written")
    overwrite: bool = checks.option(False, "replace an earlier run in output_dir")
    resume: bool = checks.option(False, "continue from the newest checkpoint in output_dir")
    checkpoint_every: int | None = checks.option(None, "steps between checkpoints; default: each epoch's end")
    keep_checkpoints: int = checks.option(2, "how many checkpoints to keep")
    eval_every: int | None = checks.option(None, "steps between evaluations; default: each epoch's end")
    log_every: int = checks.option(10, "steps between log lines")
    progress: bool = checks.option(True, "show a progress bar; without it lines go to the log")
    plot: bool = checks.option(True, "draw training.png")
    log_with: str | None = checks.option(None, "also log to trackers: tensorboard, wandb, ...; separated by commas")

    shard: bool = checks.option(
        False, "with several processes (torchrun): shard the backbone (FSDP2) instead of replicating it"
    )

    compile: bool = checks.option(
        False, "compile the frozen layers for the steps (torch.compile): a minute at the start; for 1,000 steps or more"
    )

    checkpoint_activations: bool = checks.option(
        False, "keep each layer's input alone for the backward and run the layer again in it: less memory, more time"
    )
    offload_activations: bool = checks.option(
        False, "on a GPU: keep what the layers keep for the backward in the host's memory"
    )

    prefix_cache: bool | None = checks.option(
        None, "compute the layers below the first adapter once per text; default: where it pays"
    )
    prefix_cache_bytes: int = checks.option(
        2 << 30, "size of the prefix cache in memory; the rest goes to a memory-mapped temporary file"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if choices := field.metadata["choices"]:
                checks.choice(field.name, getattr(self, field.name), choices)
            elif field.type is bool or (field.type == bool | None and getattr(self, field.name) is not None):
                checks.flag(field.name, getattr(self, field.name))
        for name in ("text_column", "label_column", "prompt_column", "completion_column"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a column's name, got {getattr(self, name)!r}")
        for name, other in (("label_column", "text_column"), ("completion_column", "prompt_column")):
            if name == "label_column" and not self.labeled:
                continue
            if getattr(self, name) == getattr(self, other):
                raise ValueError(
                    f"{name}: expected a column that {other} does not name, got {getattr(self, name)!r} for both"
                )
        for name in ("batch_size", "accumulation", "epochs", "max_length", "keep_checkpoints", "log_every"):
            checks.integer(name, getattr(self, name), 1)
        for name in ("max_steps", "eval_batch_size", "checkpoint_every", "eval_every", "patience"):
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), 1)
        for name in ("seed", "adapter_drop", "max_skipped_steps", "prefix_cache_bytes"):
            checks.integer(name, getattr(self, name), 0)
        for name in ("lr", "head_lr", "weight_decay", "eps", "warmup"):
            if getattr(self, name) is not None or name not in ("lr", "head_lr"):
                checks.number(name, getattr(self, name), "[0, inf)")
        checks.number("max_norm", self.max_norm, "[0, inf]")
        for name in ("beta1", "beta2"):
            checks.number(name, getattr(self, name), "[0, 1)")
        for name in ("best", "log_with"):
            if (value := getattr(self, name)) is not None and (not isinstance(value, str) or not value):
                raise TypeError(f"{name}: expected a name or None, got {value!r:.80}")
        if self.patience is not None and self.best is None:
            raise ValueError(
                f"patience: expected a metric to compare evaluations by, such as best='loss', got {self.patience} alone"
            )
        self._check_loss()
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: expected a share below 1 or an integer number of steps, got {self.warmup!r}")
        if not (self.labeled or self.train_adapters):
            raise ValueError(
                "train_adapters: expected adapters to train with task='causal-lm': without them there is only a head "
                "to train, and causal-lm has none; got train_adapters=False"
            )
        if self.packing and self.task != "causal-lm":
            raise ValueError(f"packing: expected False with task={self.task!r}, whose head reads whole rows, got True")
        if self.output_dir is not None and not isinstance(self.output_dir, str | os.PathLike):
            raise TypeError(f"output_dir: expected the name of a folder, got {self.output_dir!r:.80}")
        if self.output_dir is not None and not os.fspath(self.output_dir):
            raise ValueError("output_dir: expected the name of a folder, got ''")
        if self.compile and self.shard:
            raise ValueError("compile: expected False with shard=True, whose parameters come and go; got True")
        if self.resume and self.output_dir is None:
            raise ValueError("output_dir: expected a folder to resume from, got None")
        if self.resume and self.overwrite:
            raise ValueError(
                "overwrite: expected resume=True, which continues the earlier run, or overwrite=True, which replaces "
                "it; got both"
            )

    def _check_loss(self) -> None:
        checks.number("label_smoothing", self.label_smoothing, "[0, 1]")
        if self.label_smoothing and self.task not in ("classification", "causal-lm"):
            raise ValueError(f"label_smoothing: expected 0 with task={self.task!r}, got {self.label_smoothing}")
        weights = self.class_weights
        if weights is None:
            return
        if self.task != "classification":
            raise ValueError(f"class_weights: expected None with task={self.task!r}, got {weights!r:.80}")
        if isinstance(weights, dict):
            for label, weight in weights.items():
                if not isinstance(label, str):
                    raise TypeError(f"class_weights: expected labels, which are strings, got {label!r:.80}")
                checks.number(f"class_weights: {label!r:.80}", weight, "(0, inf)")
        elif weights != "balanced":
            labels = " (in Python: or a mapping from labels to numbers)"
            raise ValueError(f"class_weights: expected balanced{labels}, got {weights!r:.80}")

    @property
    def labeled(self) -> bool:
        """Whether each text has a label, which a head learns."""
        return self.task in LABELED

    @property
    def rows_per_step(self) -> int:
        """Rows per optimizer step."""
        return self.batch_size * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ``max_norm`` becomes None, since JSON has no infinity."""
        values = dataclasses.asdict(self)
        values["output_dir"] = None if self.output_dir is None else os.fspath(self.output_dir)
        values["max_norm"] = None if math.isinf(self.max_norm) else self.max_norm
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of ``to_dict``. Raises ``ValueError`` for an unknown field or a value of a wrong type."""
        if values.get("max_norm", 0) is None:
            values = values | {"max_norm": math.inf}
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(str(error)) from None
