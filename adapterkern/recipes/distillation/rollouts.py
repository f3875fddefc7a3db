"""Rollouts: a student completes the prompts of its rows, and learns the teacher's soft labels of its own tokens.

A student that learns from given texts alone never sees where its own choices lead. On-policy (Agarwal et al. 2023, GKD)
a share of the steps keeps of each row its prompt x, draws y_1 … y_n from the student, and has the loss

    Σ_t λ · T² · D(teacher(· | x, y_<t), student(· | x, y_<t))

over these tokens, the one that ends the text included, and no cross-entropy: y is not what the student should say. No
gradient passes through the drawing of y.

**One backbone, one KV cache.** Only the student generates, so there is one KV cache, its own, and it is gone before the
gradients come. The layers below its first adapter compute the same for the student as for the model with its adapters
off, so their residual stream is recorded while the student generates, and the learning student and the teacher both
begin above it: these layers run once per token, for all three.

**Repeatable.** Which steps are on-policy, and what is drawn, depend on the parameters and on (seed, epoch, step, row)
alone: each row has its own generator, whatever batch and process it is generated in. Token t is argmax(z + τ·g) with
independent Gumbel numbers g, which is a draw from softmax(z / τ).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from adapterkern.model.decoder import eval_mode
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.pretrained import configured
from adapterkern.recipes.distillation.settings import RolloutSettings
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, collate, padded_length, to_device
from adapterkern.training.data.ends import end_tokens, turn_end
from adapterkern.training.data.examples import Example, Rows
from adapterkern.training.data.given import is_given
from adapterkern.training.data.prefix import Context
from adapterkern.training.data.rows import BadRows, DataError, read_rows, source_name, warn
from adapterkern.training.data.shapes import choose_shape

_STEPS = 2  # separates the choice of steps from other random numbers of the same seed and epoch
_PROMPT = "expected rows with a prompt to complete (prompt and completion, or messages) with on_policy"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rollout(Example):
    """A prompt with the student's completion, whose tokens are ``targets``; the last one is not in ``input_ids``."""

    stream: Tensor | None = dataclasses.field(default=None, kw_only=True)  # (n, d): after the frozen prefix


class Rollouts:
    """Generates a run's rollouts.

    Args:
        model: the student.
    """

    def __init__(self, model: LlamaAdapter, settings: RolloutSettings) -> None:
        self.model = model
        self.settings = settings
        self.ends: list[int] = []
        self._same: bool | None = None  # whether the prefix gives a token in training what it gave it before

    def read_ends(self, tokenizer: Any, examples: Sequence[Example]) -> None:
        """Take the tokens that end a text from the tokenizer of ``examples``; None, the model's alone."""
        chat = tokenizer is not None and any(example.chat for example in examples)
        known = end_tokens(self.model.generation_config, tokenizer or GenerationConfig())
        self.ends = list(dict.fromkeys((*known, *([end] if chat and (end := turn_end(tokenizer)) else []))))

    def chosen(self, config: TrainConfig, epoch: int, index: int) -> bool:
        """Whether a step is on-policy."""
        draw = np.random.Generator(np.random.PCG64([config.seed, epoch, index, _STEPS])).random()
        return bool(draw < self.settings.on_policy)

    def of_step(
        self, examples: Sequence[Example], config: TrainConfig, epoch: int, index: int, autocast: Context
    ) -> list[Any]:
        """The rollouts of a step's rows, on every rank; each rank has the streams of its own rows only."""
        own = list(range(len(examples)))[processes.rank() :: processes.world_size()]
        made: dict[int, Rollout] = {}

        def generate() -> None:
            with torch.no_grad(), eval_mode(self.model), autocast():
                records = self._can_record(config)
                for start in range(0, len(own), config.batch_size):
                    numbers = own[start : start + config.batch_size]
                    seeds = [[config.seed, epoch, index, number] for number in numbers]
                    batch = self._generated([examples[n] for n in numbers], seeds, config, records)
                    made.update(zip(numbers, batch, strict=True))

        processes.on_every_rank(generate)
        ids = processes.merged({number: (one.input_ids, one.targets) for number, one in made.items()})
        return [made.get(number) or _rollout(e, *ids[number]) for number, e in enumerate(examples)]

    def _generated(
        self, examples: Sequence[Example], seeds: Sequence[list[int]], config: TrainConfig, records: bool
    ) -> list[Rollout]:
        prompts = [example.input_ids[: prompt_length(example)] for example in examples]
        rooms = [min(self.settings.new_tokens, config.max_length - len(prompt)) for prompt in prompts]
        none = np.empty(0, dtype=np.int64)
        left = dataclasses.replace(config, padding="longest", padding_side="left", packing=False)
        asked: Any = to_device(collate([Example(p, none, none) for p in prompts], left), self.model.device)
        del asked["targets"], asked["positions"]
        drawn = [_Drawn(seeds, self.settings.temperature, self.model.device)] if self.settings.temperature else []
        how = GenerationConfig(
            max_new_tokens=max(rooms), do_sample=False, eos_token_id=self.ends or None, pad_token_id=0
        )
        streams: list[Tensor] = []
        with configured(self.model, how):
            if records:
                with self.model.prefix_recorded() as streams:
                    found = self.model.generate(**asked, logits_processor=LogitsProcessorList(drawn))
            else:
                found = self.model.generate(**asked, logits_processor=LogitsProcessorList(drawn))
        length = asked["input_ids"].shape[1]
        stream = torch.cat(streams, 1) if streams else None
        made = []
        for row, (example, prompt, room, ids) in enumerate(
            zip(examples, prompts, rooms, found[:, length:].cpu().numpy(), strict=True)
        ):
            stops = np.flatnonzero(np.isin(ids, self.ends))
            new = ids[: min(room, stops[0] + 1 if len(stops) else len(ids))]
            read, start = np.concatenate([prompt, new[:-1]]), length - len(prompt)
            one = _rollout(example, read, new)
            if stream is not None:
                one = dataclasses.replace(one, stream=stream[row, start : start + len(read)])
            made.append(one)
        return made

    def _can_record(self, config: TrainConfig) -> bool:
        """Whether the prefix's streams in the generation are those that the training would compute."""
        if config.prefix_cache is False or self.model.prefix_length == 0:
            return False
        if self._same is None:
            self._same = not self.model.reuse_obstacle(config.max_length)
        return self._same


class _Drawn(LogitsProcessor):
    """Adds Gumbel noise to the scores (B, V), so that the likeliest token is one drawn at the temperature."""

    def __init__(self, seeds: Sequence[list[int]], temperature: float, device: torch.device) -> None:
        self.temperature = temperature
        states = [int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 1 for seed in seeds]
        self.generators = [torch.Generator(device).manual_seed(state) for state in states]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        # In fp64: an fp32 exponential number is 0 once in 2^24, and its token would be drawn however unlikely it is.
        noise = scores.new_empty(scores.shape, dtype=torch.float64)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - (self.temperature * noise.log_()).to(scores.dtype)


def _rollout(example: Example, read: np.ndarray, new: np.ndarray) -> Rollout:
    """The rollout of a row from the tokens before the last one, and the new ones."""
    positions = np.arange(len(read) - len(new), len(read))
    return Rollout(read, new, positions, place=example.place, chat=example.chat)


def prompt_length(example: Example) -> int:
    """The number of tokens before the last run of learned ones: of a conversation, before its last answer."""
    gaps = np.flatnonzero(np.diff(example.positions) != 1)
    return int(example.positions[gaps[-1] + 1 if len(gaps) else 0]) + 1


def with_streams(batch: Batch, rollouts: Sequence[Rollout], config: TrainConfig) -> Batch:
    """A batch of rollouts: without ``targets``, and with their streams as its ``prefix`` if all have one."""
    del batch["targets"]
    streams = [one.stream for one in rollouts if one.stream is not None]
    if len(streams) < len(rollouts):  # a padding batch, which has another rank's
        return batch
    length = padded_length(rollouts, config)
    prefix = streams[0].new_zeros(len(rollouts), length, streams[0].shape[-1])
    for row, stream in enumerate(streams):
        start = 0 if config.padding_side == "right" else length - len(stream)
        prefix[row, start : start + len(stream)] = stream
    return batch | {"prefix": prefix}


# The rows


def check_prompts(examples: Sequence[Example], settings: RolloutSettings, config: TrainConfig) -> None:
    """Raise ``DataError`` for examples without a prompt; warn of those that leave no room for all new tokens."""
    prompts = [prompt_length(example) for example in examples]
    if bare := [example for example, n in zip(examples, prompts, strict=True) if n == 1]:
        raise DataError(f"{bare[0].place}: {_PROMPT}, got one that is learned from its second token on")
    if cut := sum(n + settings.new_tokens > config.max_length for n in prompts):
        warn(
            "%d of %d prompts leave room for fewer than %d new tokens in texts of max_length=%d",
            *(cut, len(examples), settings.new_tokens, config.max_length),
        )


def check_shape(data: Rows, config: TrainConfig) -> None:
    """Raise ``DataError`` for rows of texts alone, as far as it can be known without a tokenizer."""
    bad = BadRows(source_name(data))
    rows = [row for row in read_rows(data, bad) if not is_given(row)]
    if not rows:
        return
    shape = choose_shape(rows, config, bad.source, named=False)
    if not shape.chat and list(shape.columns) == [config.text_column]:
        raise DataError(f"{bad.source}: {_PROMPT}, got rows of texts")
