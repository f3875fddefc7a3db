"""The settings of soft labels. This module imports no transformers: the command line makes its options from it."""

import dataclasses
from typing import Any

from adapterkern import checks

DIVERGENCES = ("kl", "reverse-kl", "js", "jsd")


@checks.other_names()
@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftLabelSettings:
    """T, λ and D of the loss in soft_labels.py, and its chunks.

    Args:
        temperature: T, finite and > 0.
        weight: λ, the weight of the soft labels, from 0 to 1; cross-entropy has 1 − λ.
        divergence: D, ``"kl"``, ``"reverse-kl"``, ``"js"`` or ``"jsd"``, see divergences.py.
        beta: β of ``"jsd"``, from 0 (KL) to 1 (reverse KL); None is ½, and all that the others have.
        top_k: of the teacher's distribution only this many probabilities are read per token, and the rest as one sum;
            >= 1 and less than the vocabulary. None: all of them.
        chunk_tokens: tokens whose logits exist at a time, >= 1; it changes memory and speed, not the loss.

    Raises:
        ValueError: a setting is out of its range.
        TypeError: one is of the wrong type.
    """

    temperature: float = dataclasses.field(
        default=1.0, metadata={"help": "divides the logits of teacher and student before the softmax"}
    )
    weight: float = dataclasses.field(
        default=0.5, metadata={"help": "weight of the soft labels, 0 to 1; cross-entropy has the rest"}
    )
    divergence: str = dataclasses.field(
        default="kl",
        metadata={
            "help": "KL(teacher‖student), its reverse, Jensen–Shannon, or that of --beta",
            "choices": DIVERGENCES,
        },
    )
    beta: float | None = checks.option(None, "of jsd, from 0 (kl) to 1 (reverse-kl); default 0.5")
    top_k: int | None = checks.option(None, "the teacher's K likeliest tokens, and the rest as one; default all")
    chunk_tokens: int = dataclasses.field(
        default=256, metadata={"help": "tokens whose logits exist at a time; changes memory and speed only"}
    )

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, "(0, inf)")
        checks.number("weight", self.weight, "[0, 1]")
        checks.choice("divergence", self.divergence, DIVERGENCES)
        if self.beta is not None:
            checks.number("beta", self.beta, "[0, 1]")
            if self.divergence != "jsd":
                raise ValueError(f"beta: expected None with divergence={self.divergence!r}, got {self.beta}")
        if self.top_k is not None:
            checks.integer("top_k", self.top_k, 1)
        checks.integer("chunk_tokens", self.chunk_tokens, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How often, and how, a student generates what it learns from; see rollouts.py.

    Args:
        on_policy: the share of the steps that learn from the student's own completions, from 0 to 1.
        max_new_tokens: of a completion, >= 1; it also ends where a text would be longer than ``max_length``. None is
            64, and all that there is without ``on_policy``.
        rollout_temperature: at which tokens are drawn, finite; 0 takes the likeliest. None is 1, and as before.

    Raises:
        ValueError: a setting is out of its range, or has no effect.
        TypeError: one is of the wrong type.
    """

    on_policy: float = checks.option(0.0, "share of the steps that learn from the model's own completions, 0 to 1")
    max_new_tokens: int | None = checks.option(None, "most new tokens of a completion; default 64")
    rollout_temperature: float | None = checks.option(
        None, "temperature at which completions are drawn, 0: the likeliest tokens; default 1"
    )

    def __post_init__(self) -> None:
        checks.number("on_policy", self.on_policy, "[0, 1]")
        if self.max_new_tokens is not None:
            checks.integer("max_new_tokens", self.max_new_tokens, 1)
        if self.rollout_temperature is not None:
            checks.number("rollout_temperature", self.rollout_temperature, "[0, inf)")
        for name in ("max_new_tokens", "rollout_temperature"):
            if not self.on_policy and getattr(self, name) is not None:
                raise ValueError(f"{name}: expected None where on_policy is 0, got {getattr(self, name)}")

    @property
    def new_tokens(self) -> int:
        """The most new tokens."""
        return 64 if self.max_new_tokens is None else self.max_new_tokens

    @property
    def temperature(self) -> float:
        """At which tokens are drawn."""
        return 1.0 if self.rollout_temperature is None else self.rollout_temperature

    def check(self, soft_labels: SoftLabelSettings, config: Any) -> None:
        """Raise ``ValueError`` for what a training with rollouts cannot have, and for what has no effect beside them.

        Args:
            config: the training's ``TrainConfig``.
        """
        if not self.on_policy:
            return
        if soft_labels.weight == 0:
            raise ValueError("weight: expected more than 0 beside on_policy: completions have soft labels alone; got 0")
        if config.packing:
            raise ValueError("packing: expected False beside on_policy: each row is completed by itself; got True")
        if config.shard:
            raise ValueError("shard: expected False beside on_policy: ranks generate texts of other lengths; got True")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextSettings:
    """What the teacher reads and the student does not; see context.py.

    Args:
        teacher_context: a text before each row's, as it stands, special tokens included. None: none.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty.
    """

    teacher_context: str | None = checks.option(
        None, "a text that the teacher alone reads, before each row's, such as instructions"
    )

    def __post_init__(self) -> None:
        if self.teacher_context is not None and not isinstance(self.teacher_context, str):
            raise TypeError(f"teacher_context: expected a text, got {self.teacher_context!r:.80}")
        if self.teacher_context is not None and not self.teacher_context.strip():
            raise ValueError(f"teacher_context: expected a text, got {self.teacher_context!r}")

    def check(self, config: Any) -> None:
        """Raise ``ValueError`` for what a training with a context cannot have: its ``TrainConfig``."""
        if self.teacher_context is not None and config.packing:
            raise ValueError("packing: expected False beside teacher_context: each row begins with it; got True")
