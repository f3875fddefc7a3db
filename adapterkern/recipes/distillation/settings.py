"""The settings of soft labels. This module imports no transformers: the command line makes its options from it."""

import dataclasses

from adapterkern import checks

DIVERGENCES = ("kl", "js")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoftLabelSettings:
    """T, λ and D of the loss in soft_labels.py, and its chunks.

    Args:
        temperature: T, finite and > 0.
        weight: λ, the weight of the soft labels, from 0 to 1; cross-entropy has 1 − λ.
        divergence: D, ``"kl"`` or ``"js"``.
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
        default="kl", metadata={"help": "KL(teacher‖student) or Jensen–Shannon", "choices": DIVERGENCES}
    )
    chunk_tokens: int = dataclasses.field(
        default=256, metadata={"help": "tokens whose logits exist at a time; changes memory and speed only"}
    )

    def __post_init__(self) -> None:
        checks.number("temperature", self.temperature, "(0, inf)")
        checks.number("weight", self.weight, "[0, 1]")
        checks.choice("divergence", self.divergence, DIVERGENCES)
        checks.integer("chunk_tokens", self.chunk_tokens, 1)


DEFAULTS = SoftLabelSettings()
