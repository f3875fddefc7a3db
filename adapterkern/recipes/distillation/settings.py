"""The settings of soft labels. This module imports no transformers: the command line makes its options from it."""

import dataclasses

from adapterkern import checks

DIVERGENCES = ("kl", "reverse-kl", "js", "jsd")


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


DEFAULTS = SoftLabelSettings()
