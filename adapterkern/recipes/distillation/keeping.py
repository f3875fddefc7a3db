"""``KeepBehaviour``: a task is learned, and on other texts the model is held to its teacher.

What the model could do before stays, on texts that have nothing to do with the task. The loss, its temperature and its
mixing weight λ are those of soft_labels.py. A kept text weighs as much as one target, whatever its length:

    loss = ( Σ_targets (1 − λ) · CE  +  Σ_kept texts λ · T² · (mean over its tokens of D) ) / (targets + kept texts)
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from adapterkern.recipes.distillation.soft_labels import IGNORE
from adapterkern.recipes.distillation.teacher import Taught, token_metrics
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch
from adapterkern.training.data.examples import Example, Rows, check_vocabulary, load_examples, unpacked
from adapterkern.training.data.summary import Summary, summarize
from adapterkern.training.drift import as_texts
from adapterkern.training.feed import Feed, sums_over


def check_task(config: TrainConfig) -> None:
    """Raise ``ValueError`` for a task whose loss does not leave the rows of kept texts out."""
    if config.task not in ("classification", "causal-lm"):  # whose cross-entropy ignores IGNORE
        raise ValueError(f"task: expected classification or causal-lm beside texts to keep, got {config.task}")


class WithKept(NamedTuple):
    """Data for ``KeepBehaviour``: rows of the task, and causal-lm rows to keep, which need a text only."""

    rows: Rows
    kept: Rows


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class KeptText(Example):
    """A text to keep. It counts as one target, IGNORE; its tokens' targets follow in its ``input_ids``."""

    def text(self) -> None:
        """Not held out: a share to evaluate on is one of the task's rows."""


class KeepBehaviour(Taught):
    """A task, and beside it the teacher's soft labels on other texts.

    ``train`` and ``evaluate`` take ``WithKept``: training and evaluation data alike may have texts to keep.
    Training batches hold both kinds of rows as the order has them. The layers above the prefix run once for both; the
    teacher runs on the kept ones only. ``head`` is the task's, for a classification.
    """

    packs = False  # rows are of the task, or kept

    # Data

    def load(self, rows: Rows | WithKept, config: TrainConfig, tokenizer: Any) -> list[Example]:
        """Examples of the task's rows, and after them the texts to keep. Raises as ``Task.load``."""
        check_task(config)
        if not isinstance(rows, WithKept):
            return super().load(rows, config, tokenizer)
        examples = super().load(rows.rows, config, tokenizer)
        kept, _ = load_examples(rows.kept, as_texts(config), tokenizer)
        check_vocabulary(kept, self.model.get_input_embeddings().num_embeddings)
        texts = (
            KeptText(e.input_ids, np.array([IGNORE]), e.positions, place=e.place, cuts=e.cuts, beyond=e.beyond)
            for e in unpacked(kept)
        )
        return [*examples, *texts]

    def summaries(self, examples: Sequence[Example], config: TrainConfig) -> dict[str, Summary]:
        """What the task's rows are, and the texts to keep."""
        kept = [example for example in examples if isinstance(example, KeptText)]
        found = super().summaries([e for e in examples if not isinstance(e, KeptText)], config)
        return found | ({"kept": summarize(kept, config.max_length)} if kept else {})

    def shown(self, example: Example) -> tuple[list[int], str]:
        if isinstance(example, KeptText):
            return (example.positions + 1).tolist(), "kept"
        return super().shown(example)

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Batch:
        """The batch that ``forward`` takes.

        With texts to keep it also has ``kept`` (R,), their rows, and of their N tokens ``kept_positions`` (N,), flat
        indices into (R·L), ``kept_targets`` (N,) and ``kept_weights`` (N,), which sum to 1 per text.
        """
        rows = [row for row, example in enumerate(examples) if isinstance(example, KeptText)]
        if not rows:
            batch = super().collate(examples, config)
            # Sharded, all ranks gather the model together: the teacher runs in all forwards of a step, or in none.
            return batch | _nothing_kept(batch) if self.training and processes.is_sharded(self) else batch
        none = np.empty(0, dtype=np.int64)
        # A kept text has IGNORE as its row's target in a classification, and no target in a causal-lm.
        bare: dict[str, Any] = {} if config.labeled else {"targets": none, "positions": none}
        batch = super().collate(
            [dataclasses.replace(e, **bare) if isinstance(e, KeptText) else e for e in examples], config
        )
        length = batch["input_ids"].shape[1]
        positions, targets, weights = [], [], []
        for number, row in enumerate(rows):
            ids, at = examples[row].input_ids, examples[row].positions
            start = 0 if config.padding_side == "right" else length - len(ids)
            positions.append(at + (number * length + start))
            targets.append(ids[at + 1])
            weights.append(np.full(len(at), 1 / len(at), dtype=np.float32))
        return batch | {
            "kept": torch.tensor(rows),
            "kept_positions": torch.from_numpy(np.concatenate(positions)),
            "kept_targets": torch.from_numpy(np.concatenate(targets)),
            "kept_weights": torch.from_numpy(np.concatenate(weights)),
        }

    # A forward

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``Task.forward``; the second has the sums of kept texts in eval mode, see ``loss``."""
        return super().forward(self.with_prefix(batch) if "kept" in batch else batch)

    def loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """The summed loss of a batch, and (1,) how many targets are right, counted in eval mode alone.

        In eval mode a batch has one kind of rows. Those of the task give their plain cross-entropy; kept ones give the
        sums (5,) over their tokens that ``Distillation`` gives.
        """
        if "kept" not in batch:
            return self._task_loss(hidden, batch)
        kept = batch["kept"]
        names = [name for name in ("input_ids", "attention_mask", "prefix") if name in batch]
        inputs: Batch = {name: batch[name][kept] for name in names}
        states, taught = (h.flatten(0, 1)[batch["kept_positions"]] for h in (hidden[kept], self.taught(inputs)))
        if not self.training:
            loss, *others = self.soft_label_loss(states, taught, targets=batch["kept_targets"])
            return loss, torch.stack(others)
        soft = self.soft_label_loss(states, taught, token_weights=batch["kept_weights"])
        loss, correct = self._task_loss(hidden, batch)
        return loss + soft.loss, correct

    def _task_loss(self, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.head is None:  # in chunks too: one tensor of all logits would be the largest of the step
            states = hidden.flatten(0, 1)[batch["positions"]]
            result = self.soft_label_loss(states, None, targets=batch["targets"], weight=0)
            loss, correct = result.loss, result.correct[None]
        else:
            loss, correct = super().loss(hidden, batch)  # whose cross-entropy leaves IGNORE out
        return (1 - self.soft_labels.weight) * loss if self.training else loss, correct

    # Scores

    def evaluate(
        self, run: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig
    ) -> dict[str, float]:
        """The task's own metrics of its rows, and those of kept texts (``token_metrics``) as ``kept_...``."""
        kept = [e for e in examples if isinstance(e, KeptText)]
        metrics = super().evaluate(run, [e for e in examples if not isinstance(e, KeptText)], feed, config)
        if kept:
            _, *sums = sums_over(run, kept, feed, config)
            tokens = sum(len(e.positions) for e in kept)
            metrics |= {f"kept_{name}": value for name, value in token_metrics(sums, tokens).items()}
        return metrics


def _nothing_kept(batch: Batch) -> Batch:
    """The entries of a batch with nothing to keep: the first row's last token, with weight 0."""
    first, last = torch.tensor([0]), torch.tensor([batch["input_ids"].shape[1] - 1])
    return {"kept": first, "kept_positions": last, "kept_targets": first, "kept_weights": torch.tensor([0.0])}
