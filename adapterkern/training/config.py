"""``TrainConfig``: everything that decides what a training run computes, in one flat record that JSON can hold."""

import dataclasses
import math
import os
import sys
from typing import Any

TASKS = ("classification", "causal-lm")
POOLINGS = ("mean", "last")
PADDING_SIDES = ("right", "left")
PADDINGS = ("longest", "max_length")
SCHEDULES = ("linear", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")

# These change where a run writes, what it shows and how fast it is, but none of its numbers (prefix_cache only their
# rounding): a resumed run may set them anew. A change of any other field would make it another run.
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
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train. Every argument has a default; ``ValueError`` names one that is out of its range.

    What is learnt
        task: ``"classification"`` (a label a text) or ``"causal-lm"`` (next token; of a prompt nothing is learnt).
        train_adapters: False trains the head alone, on the bare backbone.
        pooling: a classification head reads the ``"mean"`` of the real tokens' states, or the ``"last"`` one's.
        text_column, label_column: the columns of classification rows, and of plain-text causal-lm rows (text alone).
        prompt_column, completion_column: of causal-lm rows with a prompt.
        max_length: tokens a row; longer rows lose their end.
        skip_bad_rows: leave bad rows out, with a warning, instead of refusing the file.

    Batches
        batch_size: rows in one forward. accumulation: forwards in one step; all their rows (or target tokens, for
            causal-lm) weigh the same, however they fall on the forwards.
        eval_batch_size: default ``batch_size``.
        padding: to the ``"longest"`` row of a batch, or always to ``"max_length"``. padding_side: ``"right"`` or
            ``"left"``.
        seed: of the head's weights and of the order of rows, which depends on (seed, epoch) and nothing else. Python's,
            NumPy's and torch's generators are seeded with it.

    Steps
        epochs: passes over the data, unless ``max_steps`` says how many steps to make.
        lr, weight_decay, beta1, beta2, eps: of AdamW. Vectors (biases, norms) do not decay.
        max_norm: largest global norm of the gradient; ``math.inf`` does not clip.
        schedule: after the warmup ``"linear"`` or ``"cosine"`` to 0 at the last step, or ``"constant"``.
        warmup: steps of linear warmup, or, below 1, their share of all steps.
        precision: ``"fp32"`` (no autocast), ``"bf16"`` autocast, or ``"fp16"`` autocast with a gradient scaler.
        max_skipped_steps: so many steps in a row that the fp16 scaler skips are an error.

    Several processes
        shard: split the frozen backbone over them (FSDP2) instead of repeating it; ``batch_size · accumulation`` are a
            step's rows in either case, all processes together.

    Files and display
        output_dir: where everything is written; None writes nothing. overwrite: remove an earlier run there.
        resume: go on from the newest checkpoint in ``output_dir``.
        checkpoint_every: steps between checkpoints; None writes one at each epoch's end.
        keep_checkpoints: how many of them stay.
        eval_every: steps between evaluations; None evaluates at each epoch's end.
        log_every: steps between log lines. A device that works asynchronously is waited for only then.
        progress: show a progress bar. plot: draw ``training.png`` at the end.

    The frozen prefix
        prefix_cache: keep the activations below the first adapter; None decides by what it saves and costs, and in a
            resumed run as the run before it.
        prefix_cache_bytes: how much of them to hold in memory; the rest goes to a memory-mapped temporary file.
    """

    task: str = "classification"
    train_adapters: bool = True
    pooling: str = "mean"
    text_column: str = "text"
    label_column: str = "label"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    max_length: int = 256
    skip_bad_rows: bool = False

    batch_size: int = 16
    accumulation: int = 1
    eval_batch_size: int | None = None
    padding: str = "longest"
    padding_side: str = "right"
    seed: int = 0

    epochs: int = 3
    max_steps: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    max_norm: float = 1.0
    schedule: str = "linear"
    warmup: float = 0.06
    precision: str = "fp32"
    max_skipped_steps: int = 20

    output_dir: str | os.PathLike[str] | None = None
    overwrite: bool = False
    resume: bool = False
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    eval_every: int | None = None
    log_every: int = 10
    progress: bool = True
    plot: bool = True

    shard: bool = False

    prefix_cache: bool | None = None
    prefix_cache_bytes: int = 2 << 30

    def __post_init__(self) -> None:
        for name, choices in (
            ("task", TASKS),
            ("pooling", POOLINGS),
            ("padding", PADDINGS),
            ("padding_side", PADDING_SIDES),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("batch_size", "accumulation", "epochs", "max_length", "keep_checkpoints", "log_every"):
            _whole(name, getattr(self, name), 1)
        for name in ("max_steps", "eval_batch_size", "checkpoint_every", "eval_every"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1)
        for name in ("seed", "max_skipped_steps", "prefix_cache_bytes"):
            _whole(name, getattr(self, name), 0)
        for name in ("lr", "weight_decay", "eps", "max_norm", "warmup"):
            value = getattr(self, name)
            kind, largest = ("number", math.inf) if name == "max_norm" else ("finite number", sys.float_info.max)
            if not _is_number(value) or not 0 <= value <= largest:
                raise ValueError(f"{name}: expected a {kind} from 0 on, got {value!r}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup: expected a share below 1 or a whole number of steps, got {self.warmup!r}")
        if self.task == "causal-lm" and not self.train_adapters:
            raise ValueError("train_adapters: expected True for causal-lm, which has no head to train, got False")
        if self.resume and self.output_dir is None:
            raise ValueError("output_dir: expected a folder to resume from, got None")
        if self.resume and self.overwrite:
            raise ValueError("overwrite: expected False together with resume=True, got True")

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimizer step learns from."""
        return self.batch_size * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; an infinite ``max_norm`` becomes None, since JSON has no infinity."""
        values = dataclasses.asdict(self)
        values["output_dir"] = None if self.output_dir is None else os.fspath(self.output_dir)
        values["max_norm"] = None if math.isinf(self.max_norm) else self.max_norm
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The inverse of :meth:`to_dict`. Raises ``ValueError`` for an unknown field or a value of a wrong kind."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in fields:
                raise ValueError(f"{name}: not a field of TrainConfig")
            if not _fits(fields[name].type, value) and not (name == "max_norm" and value is None):
                raise ValueError(f"{name}: expected {_kind(fields[name].type)}, got {value!r}")
        if "max_norm" in values and values["max_norm"] is None:
            values = values | {"max_norm": math.inf}
        return cls(**values)


def _kind(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation))


def _fits(annotation: Any, value: Any) -> bool:
    """Whether a value read from JSON has the kind that the field is declared with."""
    kinds = tuple(getattr(annotation, "__args__", (annotation,)))
    if isinstance(value, bool):
        return bool in kinds
    if isinstance(value, int):
        return int in kinds or float in kinds
    return type(value) in kinds


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(name: str, value: Any, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{name}: expected a whole number from {smallest} on, got {value!r}")
