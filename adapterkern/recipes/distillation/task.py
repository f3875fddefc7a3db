"""Soft labels of a teacher: ``Distillation`` on what is learnt, ``KeepBehaviour`` on other texts beside it.

The teacher is the model itself with its adapters off, or another causal language model with the same vocabulary. The
first costs no memory, and nothing at all below the first adapter: the frozen prefix is computed once for both. The
loss, its temperature and its mixing weight λ are those of soft_labels.py.

``Distillation`` gives soft labels to the targets of causal-lm rows. It suits a student that is smaller than its
teacher: :func:`first_layers` makes one that shares the teacher's parameters.

``KeepBehaviour`` learns a task, and on texts that have nothing to do with it holds the model to its teacher, so that
what it could do before stays. A kept text weighs as much as one target, however long it is:

    loss = ( Σ_targets (1 − λ) · CE  +  Σ_kept texts λ · T² · (mean over its tokens of D) ) / (targets + kept texts)
"""

import copy
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapterkern.files import write_json
from adapterkern.model.decoder import decoder_layers, decoder_slice, eval_mode
from adapterkern.model.files.card import base_name
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.distillation.soft_labels import (
    CHUNK_TOKENS,
    IGNORE,
    SoftLabelLoss,
    Teacher,
    check_settings,
    soft_label_loss,
)
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example, Rows, check_vocabulary, count_targets, load_examples
from adapterkern.training.heads import ClassificationHead
from adapterkern.training.run.checkpoint import CheckpointError
from adapterkern.training.run.folder import DISTILLATION_CONFIG, settings_to_resume
from adapterkern.training.task import Feed, Inputs, Task, eval_batches, summed


class _Taught(Task):
    """A task with a teacher: what both kinds share.

    Args:
        model: the student, with its adapters.
        teacher: None is ``model`` with its adapters off; or a transformers causal language model with the same
            vocabulary, on the same device, whose logits are its output embedding of its last hidden states. It is put
            into eval mode, and becomes no part of this module: it is neither trained nor saved.
        head: a classification head, for a task that has one.
        temperature, weight, divergence, chunk_tokens: see :func:`.soft_labels.soft_label_loss`.

    Raises:
        ValueError: a setting out of its range, or a teacher that does not fit.
    """

    uniform = False  # a forward runs the teacher where it has something to teach, the LM head once a chunk of tokens
    teacher: Any

    def __init__(
        self,
        model: LlamaAdapter,
        teacher: Any = None,
        *,
        head: ClassificationHead | None = None,
        temperature: float = 1.0,
        weight: float = 0.5,
        divergence: str = "kl",
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        super().__init__(model, head)
        check_settings(temperature, weight, divergence, chunk_tokens)
        if teacher is not None:
            check_teacher(model, teacher)
            teacher.eval()
        self.__dict__["teacher"] = teacher  # not through setattr: a submodule would follow train() and be prepared
        self.temperature, self.weight = temperature, weight
        self.divergence, self.chunk_tokens = divergence, chunk_tokens

    @property
    def settings(self) -> dict[str, Any]:
        """What a run's numbers depend on beyond its ``TrainConfig``; kept in ``distillation.json``."""
        described = None
        if self.teacher is not None:
            name = base_name(self.teacher) or type(self.teacher).__name__
            described = f"{name}, {self.teacher.config.num_hidden_layers} layers"
        return {
            "teacher": described,
            "temperature": self.temperature,
            "weight": self.weight,
            "divergence": self.divergence,
        }

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        if before := settings_to_resume(config, DISTILLATION_CONFIG):
            path, saved = before
            for name, now in self.settings.items():
                if saved.get(name) != now:
                    raise CheckpointError(f"{path}: the run was begun with {name}={saved.get(name)!r}, not {now!r}")
        return super().load(rows, config, tokenizer)

    def save(self, directory: Path, config: TrainConfig) -> None:
        super().save(directory, config)
        write_json(directory / DISTILLATION_CONFIG, self.settings)

    def soft_label_loss(self, hidden: Tensor, taught: Tensor | None, **kwargs: Any) -> SoftLabelLoss:
        """Of tokens' states (N, d) and the teacher's of the same tokens (N, its width), with this task's settings."""
        head = self.model.base.get_output_embeddings()
        teacher = None
        if taught is not None:
            teacher = Teacher(taught, head if self.teacher is None else self.teacher.get_output_embeddings())
        settings: dict[str, Any] = {
            "temperature": self.temperature,
            "weight": self.weight,
            "divergence": self.divergence,
            "chunk_tokens": self.chunk_tokens,
            "count": not self.training,
        }
        return soft_label_loss(hidden, head, teacher, **(settings | kwargs))

    def taught(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor:
        """The teacher's last hidden states (B, L, its width). ``prefix`` as :meth:`shared_prefix` gives it."""
        with torch.no_grad():
            if self.teacher is not None:
                decoder = self.teacher.base_model
                return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            assert prefix is not None
            start = self.model.prefix_length
            with self.model.disable_adapter(), eval_mode(self.model.base):
                return self.model.run_suffix(prefix, attention_mask, start)

    def shared_prefix(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor | None:
        """The residual stream after the frozen prefix, if the teacher is the model itself and goes on from there."""
        if prefix is not None or self.teacher is not None:
            return prefix
        return self.model.run_prefix(input_ids, attention_mask)


class Distillation(_Taught):
    """Soft labels for the targets of causal-lm rows: (1 − λ) · CE + λ · T² · D at each of them.

    With ``weight=0`` the teacher runs in evaluations only: they always tell how far the student is from it.
    """

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        if config.task != "causal-lm":
            raise ValueError(f"task: expected causal-lm for Distillation, whose labels are tokens, got {config.task!r}")
        return super().load(rows, config, tokenizer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss, and the other sums of :class:`.soft_labels.SoftLabelLoss`, stacked."""
        taught = None
        if self.weight > 0 or not self.training:
            prefix = self.shared_prefix(input_ids, attention_mask, prefix)
            taught = self.taught(input_ids, attention_mask, prefix).flatten(0, 1)[positions]
        hidden = self.hidden(input_ids, attention_mask, prefix).flatten(0, 1)[positions]
        loss, *others = self.soft_label_loss(hidden, taught, targets=targets)
        return loss, torch.stack(others)

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """``loss`` as in training, and of the hard labels and against the teacher what :func:`_token_metrics` says."""
        targets = count_targets(examples)
        return {"loss": sums[0] / targets} | _token_metrics(sums[1:], targets)


class WithKept(NamedTuple):
    """Data for :class:`KeepBehaviour`: rows of the task, and causal-lm rows (text alone will do) to keep."""

    rows: Rows
    kept: Rows


class KeepBehaviour(_Taught):
    """A task, and beside it the teacher's soft labels on other texts.

    ``train`` and ``evaluate`` are given :class:`WithKept`: training and evaluation data alike may have texts to keep,
    and batches hold both kinds as the order of rows has it. The layers above the prefix run once for both; the teacher
    runs the kept ones only.
    """

    _company = False  # whether forwards with nothing to keep run the teacher too

    def begin_step(self, examples: Sequence[Example], config: TrainConfig, epoch: int, index: int) -> None:
        """Where the model is split over processes, they gather it together: the teacher runs in all of a step's
        forwards, or in none."""
        self._company = any(map(_is_kept, examples)) and processes.is_sharded(self)

    def load(self, rows: Rows, config: TrainConfig, tokenizer: Any) -> list[Example]:
        if not isinstance(rows, WithKept):
            return super().load(rows, config, tokenizer)
        examples = super().load(rows.rows, config, tokenizer)
        as_text = dataclasses.replace(config, task="causal-lm", train_adapters=True)
        kept, _ = load_examples(rows.kept, as_text, tokenizer)
        check_vocabulary(kept, self.model.decoder.embed_tokens.num_embeddings)
        # A kept text counts as one target. Its tokens' targets are not needed: they follow in its input_ids.
        return [*examples, *(e._replace(targets=np.array([IGNORE])) for e in kept)]

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Inputs:
        rows = [row for row, example in enumerate(examples) if _is_kept(example)]
        if not rows:
            inputs = super().collate(examples, config)
            return inputs | self._nothing_kept(inputs) if self.training and self._company else inputs
        none = np.empty(0, dtype=np.int64)
        # Of a kept text, a classification's targets have IGNORE, one for each row; those of a causal-lm have nothing.
        bare = {} if config.task == "classification" else {"targets": none, "positions": none}
        inputs = super().collate([e._replace(**bare) if _is_kept(e) else e for e in examples], config)
        assert inputs["input_ids"] is not None
        length = inputs["input_ids"].shape[1]
        positions, targets, weights = [], [], []
        for number, row in enumerate(rows):
            ids, at = examples[row].input_ids, examples[row].positions
            start = 0 if config.padding_side == "right" else length - len(ids)
            positions.append(at + (number * length + start))
            targets.append(ids[at + 1])
            weights.append(np.full(len(at), 1 / len(at), dtype=np.float32))
        return inputs | {
            "kept": torch.tensor(rows),
            "kept_positions": torch.from_numpy(np.concatenate(positions)),
            "kept_targets": torch.from_numpy(np.concatenate(targets)),
            "kept_weights": torch.from_numpy(np.concatenate(weights)),
        }

    def _nothing_kept(self, inputs: Inputs) -> Inputs:
        """The first row's last token, of no weight."""
        assert inputs["input_ids"] is not None
        first, last = torch.tensor([0]), torch.tensor([inputs["input_ids"].shape[1] - 1])
        return {"kept": first, "kept_positions": last, "kept_targets": first, "kept_weights": torch.tensor([0.0])}

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
        kept: Tensor | None = None,
        kept_positions: Tensor | None = None,
        kept_targets: Tensor | None = None,
        kept_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and how many targets it has right.

        In eval mode a batch has one kind of rows. Those of the task give their plain cross-entropy; kept ones give the
        sums over their tokens as :class:`Distillation` does.
        """
        if kept is not None:
            prefix = self.shared_prefix(input_ids, attention_mask, prefix)
        hidden = self.hidden(input_ids, attention_mask, prefix)
        if kept is None:
            return self._task_loss(hidden, attention_mask, targets, positions)
        taught = self.taught(input_ids[kept], attention_mask[kept], None if prefix is None else prefix[kept])
        states, taught = (h.flatten(0, 1)[kept_positions] for h in (hidden[kept], taught))
        if not self.training:
            loss, *others = self.soft_label_loss(states, taught, targets=kept_targets)
            return loss, torch.stack(others)
        soft = self.soft_label_loss(states, taught, token_weights=kept_weights)
        loss, correct = self._task_loss(hidden, attention_mask, targets, positions)
        return loss + soft.loss, correct

    def _task_loss(
        self, hidden: Tensor, attention_mask: Tensor, targets: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.head is None:
            result = self.soft_label_loss(hidden.flatten(0, 1)[positions], None, targets=targets, weight=0)
            loss, correct = result.loss, result.correct
        else:
            scores = self.head(hidden, attention_mask)
            loss = F.cross_entropy(scores, targets, reduction="sum", ignore_index=IGNORE)
            correct = (scores.argmax(-1) == targets).sum()
        return ((1 - self.weight) * loss if self.training else loss), correct

    def evaluate(
        self, run: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig
    ) -> dict[str, float]:
        """The task's own metrics of its rows, and of kept texts what :func:`_token_metrics` says, as ``kept_...``."""
        metrics = super().evaluate(run, [e for e in examples if not _is_kept(e)], feed, config)
        kept = [e for e in examples if _is_kept(e)]
        if kept:
            _, *sums = summed(run, eval_batches(kept, config), feed)
            tokens = sum(len(e.positions) for e in kept)
            metrics |= {f"kept_{name}": value for name, value in _token_metrics(sums, tokens).items()}
        return metrics


def check_teacher(model: LlamaAdapter, teacher: Any) -> None:
    """Raise ``ValueError`` if ``teacher`` cannot teach ``model``."""
    if teacher is model.base:
        raise ValueError("teacher: expected None for the model itself with its adapters off, got its backbone")
    head = getattr(teacher, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError(f"teacher: expected a transformers causal language model, got {type(teacher).__name__}")
    sizes = [m.weight.shape[0] for m in (model.base.get_output_embeddings(), head)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"teacher: expected the student's vocabulary of {sizes[0]} tokens, got one of {sizes[1]}")
    if teacher.device != model.device:
        raise ValueError(f"teacher: expected it on the student's device {model.device}, got {teacher.device}")
    # Some models scale or cap their logits, or project the hidden states first: asked of the model, not of a list.
    ids = torch.arange(4, device=teacher.device)[None]
    with torch.no_grad(), eval_mode(teacher):
        logits = teacher(input_ids=ids, use_cache=False).logits
        hidden = teacher.base_model(input_ids=ids, use_cache=False).last_hidden_state
        if hidden.shape[-1] != head.weight.shape[1] or not torch.allclose(head(hidden), logits, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"teacher: expected logits that are the output embedding of the last hidden state, got "
                f"{type(teacher).__name__}, which does more to them"
            )


def first_layers(llama: Any, num_layers: int) -> Any:
    """A model of the first ``num_layers`` layers of ``llama``, its final norm and its head, sharing every parameter.

    Its layers are objects of their own, so that adapters on them leave ``llama`` as it was: a student in no memory.
    """
    layers = decoder_layers(llama)
    if not 1 <= num_layers <= len(layers):
        raise ValueError(f"num_layers: expected 1 to {len(layers)}, got {num_layers}")
    part = copy.copy(llama)
    part._modules = dict(llama._modules)
    part.model = decoder_slice(llama.model, 0, num_layers)
    part.model.layers = nn.ModuleList([copy.copy(layer) for layer in layers[:num_layers]])
    part.config = part.model.config
    return part


def _is_kept(example: Example) -> bool:
    return example.targets[0] == IGNORE


def _token_metrics(sums: Sequence[float], targets: int) -> dict[str, float]:
    """Means over tokens: cross-entropy, perplexity and accuracy of the student; the teacher's perplexity; the
    divergence D, without T², in nats; and how often both have the same token on top."""
    cross_entropy, divergence, teacher_cross_entropy, correct, agreement = (value / targets for value in sums)
    return {
        "cross_entropy": cross_entropy,
        "perplexity": math.exp(min(cross_entropy, 700.0)),
        "teacher_perplexity": math.exp(min(teacher_cross_entropy, 700.0)),
        "divergence": divergence,
        "agreement": agreement,
        "accuracy": correct,
        "targets": targets,
    }
