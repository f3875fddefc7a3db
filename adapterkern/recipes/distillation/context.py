"""A context that the teacher alone reads: the student learns to answer as if it had it, too.

Of a row's text x_1 … x_n the student's state at t is compared with the teacher's at the same token, before which the
teacher has read the context c as well, where a text begins (after the token that begins all texts, if there is one):

    D(teacher(· | c, x_≤t), student(· | x_≤t))

With the model itself as the teacher this is context distillation (Askell et al. 2021, arXiv:2112.00861; Snell et al.
2022, arXiv:2209.15189): instructions, or examples, move from the prompt into an adapter.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from adapterkern.recipes.distillation.settings import ContextSettings
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, collate
from adapterkern.training.data.examples import Example

_PREFIX = "teacher_"  # of what a batch has for the teacher


class TeacherContext:
    """The tokens of a context, and how a batch has them for the teacher."""

    def __init__(self, settings: ContextSettings) -> None:
        self.settings = settings
        self._ids: np.ndarray | None = None
        self._first: int | None = None  # the token that begins all texts

    def __bool__(self) -> bool:
        return self.settings.teacher_context is not None

    def read(self, tokenizer: Any) -> None:
        """Tokenize it, special tokens in it included.

        Raises:
            TypeError: there is no tokenizer.
            ValueError: it has no tokens.
        """
        if tokenizer is None:
            raise TypeError("tokenizer: expected a transformers tokenizer with teacher_context, got None")
        ids = tokenizer(self.settings.teacher_context, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError("teacher_context: expected a text with tokens, got none")
        self._ids, self._first = np.array(ids, dtype=np.int64), tokenizer.bos_token_id

    @property
    def ids(self) -> list[int]:
        """Its tokens, once they have been read; none without a context."""
        return [] if self._ids is None else self._ids.tolist()

    def before(self, example: Example) -> Example:
        """The example as the teacher reads it."""
        assert self._ids is not None
        ids, start = example.input_ids, int(example.input_ids[0] == self._first)
        ids = np.concatenate([ids[:start], self._ids, ids[start:]])
        # The state of the token that begins all texts predicts the first of this one: the context's last one does.
        return dataclasses.replace(example, input_ids=ids, positions=example.positions + len(self._ids))

    def of_batch(self, examples: Sequence[Example], config: TrainConfig) -> Batch:
        """What a batch of these examples has for the teacher, padded to its own longest row."""
        longest = dataclasses.replace(config, padding="longest")
        batch = collate([self.before(example) for example in examples], longest)
        return {_PREFIX + name: batch[name] for name in ("input_ids", "attention_mask", "positions")}


def of_teacher(batch: Batch) -> Batch:
    """A batch as the teacher reads it: with its context, if it has one."""
    own = {name.removeprefix(_PREFIX): tensor for name, tensor in batch.items() if name.startswith(_PREFIX)}
    return own or batch
