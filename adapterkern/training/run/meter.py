"""What a run measures of its steps."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass
class Step:
    """A finished step, whose numbers may still be on the device."""

    number: int
    loss: Tensor  # mean over its targets
    grad_norm: Tensor | None  # None if the fp16 scaler skipped the step


@dataclasses.dataclass
class Meter:
    """Tokens and seconds, in total and since the last log line."""

    tokens: int = 0
    seconds: float = 0.0
    window_tokens: int = 0
    window_seconds: float = 0.0
    prefix_seconds: float = 0.0
    eval_seconds: float = 0.0

    def step(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds
        self.window_tokens += tokens
        self.window_seconds += seconds

    def window(self) -> float:
        """Tokens per second since the last call."""
        rate = self.window_tokens / self.window_seconds
        self.window_tokens, self.window_seconds = 0, 0.0
        return rate
