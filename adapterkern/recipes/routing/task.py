"""Dynamic routing: a task in which each sequence, or each token, runs the expert adapters that a router picks for it.

The experts are at the same sites and have one shape, so one grouped call per site and choice runs all of them, each on
its own rows alone; a sequence without an expert gets the bare backbone's states. The route is decided where the
residual stream meets the first site: one pass, one KV cache, and a frozen prefix below it that the prefix cache may
hold. In ``generate`` a sequence's is decided on the prompt and holds for the continuation; each new token has its own.
router.py has the router and its losses.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from adapterkern import checks
from adapterkern.files import find_weights, read_json, read_tensors, read_versioned, write_pair
from adapterkern.model.config import AdapterConfig
from adapterkern.model.decoder import text_decoder
from adapterkern.model.digest import weights_digest
from adapterkern.model.files.card import base_name
from adapterkern.model.files.folder import check_weights
from adapterkern.model.llama import LlamaAdapter
from adapterkern.model.mixing import check_routable
from adapterkern.model.saving import unloaded_on_error
from adapterkern.recipes.routing.router import (
    Route,
    Router,
    RoutingConfig,
    balance_loss,
    choice_counts,
    run_probabilities,
)
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.batches import Batch, count_tokens
from adapterkern.training.data.examples import Example
from adapterkern.training.heads import HEAD_CONFIG, HEAD_WEIGHTS, Head
from adapterkern.training.saved import load_config, load_head, save_config
from adapterkern.training.task import Task

ROUTING_WEIGHTS, ROUTING_CONFIG = "routing.safetensors", "routing_config.json"
FORMAT_VERSION = 1
_ADDED = {"per": "sequence"}  # fields that runs of earlier versions do not have, and what they are there
_DRAWS = 1  # separates what choices draw from what else is drawn from the same seed


@dataclasses.dataclass
class _Step:
    """What the forwards of one training step share."""

    routed: Tensor | int  # how many sequences, or tokens
    targets: float  # or the weights of their classes
    costs: bool  # whether the cost counts already
    drawn: dict[int, Tensor]  # for each example's choices, (1 or its tokens, ...), by its row
    counts: list[bool]  # of each forward to come: False for a padding batch
    routes: list[Route] = dataclasses.field(default_factory=list)  # of the forwards so far


class RoutedTask(Task[Example]):
    """Classification or causal-lm over experts that a router chooses among, for ``train(..., task=...)``.

    In training, T · (``balance`` · balance loss + ``cost`` · probability of running anything) is added to the
    cross-entropy of a step's T targets. Both are those of all its sequences, or real tokens, however many forwards and
    processes share them. The loss of an evaluation is the cross-entropy alone. The random draws of a choice depend on
    the seed, the step, and the place of its sequence, or token, in the step.

    Args:
        model: its active adapter becomes the first expert; the others are new, of the same configuration, and named
            ``expert-1``, ``expert-2``, …
        routing: see ``RoutingConfig``.
        head: as for ``Task``.

    Raises:
        ValueError: no adapter is active, or one has an expert's name.
    """

    files: ClassVar[tuple[str, ...]] = (ROUTING_WEIGHTS, ROUTING_CONFIG, HEAD_WEIGHTS, HEAD_CONFIG)
    uniform = False  # a forward runs the experts that are chosen
    packs = False  # a row has one route

    def __init__(self, model: LlamaAdapter, routing: RoutingConfig | None = None, head: Head | None = None) -> None:
        super().__init__(model, head)
        self.routing = routing or RoutingConfig()
        first = model.active_adapter
        if first is None:
            raise ValueError("model: expected an active adapter to be the first expert, got none; see set_adapter")
        if below := model.adapters_below(first):
            raise ValueError(f"model: expected one adapter as the first expert, got one on {', '.join(below)}, a stack")
        check_routable({first: model.adapter_config(first)})
        self.experts = [first, *(f"expert-{i}" for i in range(1, self.routing.experts))]
        if taken := [name for name in self.experts[1:] if name in model.adapters]:  # then none is added
            raise ValueError(f"model: expected a new name, got {taken[0]!r}, which exists")
        for name in self.experts[1:]:
            model.add_adapter(name, model.adapter_config(first))
        self.router = Router(model.decoder.config.hidden_size, self.routing).to(model.device)
        self._step: _Step | None = None  # the training step under way

    def settings_in(self, directory: Path) -> dict[str, Any] | None:
        return read_json(directory / ROUTING_CONFIG).get("routing")

    @property
    def settings(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.routing)
        return {name: value for name, value in fields.items() if (name, value) not in _ADDED.items()}

    def _routed_in(self, examples: Sequence[Example]) -> int:
        """How many sequences, or tokens, are routed in ``examples``."""
        return count_tokens(examples) if self.router.per_token else len(examples)

    # Training

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        if not config.train_adapters:
            raise ValueError("train_adapters: expected True, since a router chooses among adapters, got False")
        modules = {f"expert.{i}": self.model.adapters[name] for i, name in enumerate(self.experts)}
        modules |= {"router": self.router} | ({} if self.head is None else {"head": self.head})
        return {f"{name}.{key}": p for name, module in modules.items() for key, p in module.named_parameters()}

    @contextlib.contextmanager
    def running(self, config: TrainConfig) -> Iterator[None]:
        try:
            with super().running(config):
                yield
        finally:
            self._step = None  # where an error ended the run within it

    def begin_step(self, examples: Sequence[Example], config: TrainConfig, epoch: int, index: int) -> None:
        """Draw for the choices of all the step's ``examples``, which are numbered."""
        seed = np.random.SeedSequence([config.seed, epoch, index, _DRAWS]).generate_state(1, np.uint64)
        each = [self._routed_in([example]) for example in examples]
        drawn = self.router.draw(sum(each), torch.Generator().manual_seed(int(seed[0]))).split(each)
        self._step = _Step(
            routed=sum(each),
            targets=self.total_weight(examples),
            costs=epoch >= self.routing.free_epochs,
            drawn={example.row: numbers for example, numbers in zip(examples, drawn, strict=True)},
            counts=[counts for _, counts in processes.share(examples, config.batch_size)],
        )

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Batch:
        """A batch, in a training step with ``drawn``, what ``Router.draw`` gave for its sequences, (B, ...), or tokens,
        (B, L, ...)."""
        batch = super().collate(examples, config)
        if self.training and self._step is not None:
            drawn = torch.cat([self._step.drawn[example.row] for example in examples])
            batch["drawn"] = _spread(drawn, batch["attention_mask"]) if self.router.per_token else drawn
        return batch

    # A forward

    @contextlib.contextmanager
    def routed(self, attention_mask: Tensor, drawn: Tensor | None = None) -> Iterator[list[Route]]:
        """Context in which the model's next forward, or ``generate``, on sequences of this mask (B, L) is routed.

        Args:
            drawn: what ``Router.draw`` gives, for choices as in training.

        Yields:
            a list that holds the route as soon as it has been decided; of tokens, one of each forward in ``generate``.
        """
        routes: list[Route] = []

        def decide(hidden: Tensor) -> tuple[Tensor, Tensor]:
            beams = hidden.shape[0] // len(attention_mask)
            mask = attention_mask.repeat_interleave(beams, 0).to(hidden.device)
            if self.router.per_token and (more := hidden.shape[1] - mask.shape[1]):  # no token that is added is padding
                mask = F.pad(mask, (0, more), value=1) if more > 0 else mask.new_ones(hidden.shape[:2])
            route = self.router(hidden, mask, drawn)
            routes.append(route if self.training else route._replace(read=None))
            return route.chosen, route.weight

        with self.model.mixing(self.experts, decide):
            yield routes

    def hidden_and_route(self, batch: Batch) -> tuple[Tensor, Route]:
        """The decoder's last hidden states (B, L, d), and the routes that the batch's sequences, or tokens, took.

        In training, choices are drawn with ``batch["drawn"]``; where that is missing, it is drawn here.
        """
        drawn = None
        if self.training and self.routing.noise:
            mask = batch["attention_mask"]
            each = mask.shape if self.router.per_token else mask.shape[:1]
            drawn = batch["drawn"] if "drawn" in batch else self.router.draw(each.numel()).unflatten(0, each)
        with self.routed(batch["attention_mask"], drawn) as routes:
            hidden = super().hidden(batch)
        return hidden, routes[0]

    def hidden(self, batch: Batch) -> Tensor:
        return self.hidden_and_route(batch)[0]

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As ``Task.forward``; in eval mode it counts more: see ``metrics``.

        In training, a forward that ``begin_step`` has not announced is a step of its own.
        """
        hidden, route = self.hidden_and_route(batch)
        loss, correct = self.loss(hidden, batch)
        if self.training:
            return loss + self._extra(route, len(batch["targets"])), correct
        runs = route.chosen >= 0
        none = ~runs.any(-1) if route.real is None else route.real & ~runs.any(-1)
        of_experts = [(route.chosen == i).any(-1).sum() for i in range(len(self.experts))]
        return loss, torch.cat([correct, torch.stack([none.sum(), runs.sum(), *of_experts])])

    def _extra(self, route: Route, targets: int) -> Tensor:
        """What this forward adds to the step's loss: the cost of its sequences, and in the last forward the balance.

        The balance depends on all choices of the step. It reaches the router alone, since no layer below is trained,
        so it can wait for them: nothing has to be kept but what the router has read.
        """
        routing = self.routing
        total, routed = run_probabilities(route, routing.experts)
        step = self._step or _Step(routed, targets, costs=routing.free_epochs == 0, drawn={}, counts=[True])
        extra = route.scores.new_zeros(())
        if step.costs:
            extra = routing.cost * total / step.routed
        if not step.counts.pop(0):  # as if it had run nothing, which the balance leaves out
            route = route._replace(chosen=torch.full_like(route.chosen, -1))
        step.routes.append(route)
        if not step.counts:
            self._step = None
            joined = self.router.joined(step.routes)
            totals = processes.total(choice_counts(joined, routing.experts))
            extra = extra + routing.balance * balance_loss(joined, routing.experts, totals)
        return step.targets * extra

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None) -> Route:
        """The routes of sequences (B, L), without noise. Costs a forward."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self.routed(attention_mask) as routes:
            super().hidden(batch if prefix is None else batch | {"prefix": prefix})
        return routes[0]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate`` on prompts (B, L), each with the experts that its prompt is routed to.

        With ``per="token"`` each token of the prompt, and each new one, has its own.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad(), self.routed(mask):
            return self.model.generate(input_ids, attention_mask=mask, **kwargs)

    # Scores

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """The task's metrics; ``skipped``, the share of sequences without an expert; ``experts_run``, the mean number
        of experts per sequence; and ``expert_0``, ``expert_1``, …: the share of the sequences that ran each.

        With ``per="token"`` all these are of the real tokens.
        """
        skipped, runs, *of_experts = (count / self._routed_in(examples) for count in sums[2:])
        shares = {f"expert_{i}": share for i, share in enumerate(of_experts)}
        return super().metrics(sums, examples, config) | {"skipped": skipped, "experts_run": runs} | shares

    # Files

    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write experts and router (``routing.safetensors``, ``routing_config.json``), head and ``task.json``."""
        tensors = {key: t.detach().to("cpu").contiguous() for key, t in _modules(self).state_dict().items()}
        fields = {
            "format_version": FORMAT_VERSION,
            "adapter": self.model.adapter_config(self.experts[0]).to_dict(),
            "routing": self.settings,
            "base": _shape(self.model.decoder.config),
            "backbone": {"digest": self.model.backbone_digest(), "name_or_path": base_name(self.model.base)},
        }

        def save_weights(path: Path) -> None:
            save_file(tensors, path, metadata={"format": "pt"})

        write_pair(directory / ROUTING_WEIGHTS, directory / ROUTING_CONFIG, save_weights, fields)
        if self.head is not None:
            self.head.save_pretrained(directory)
        save_config(directory, config, self.kind)

    @classmethod
    def from_pretrained(
        cls, llama: Any, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> tuple[Self, TrainConfig]:
        """The task of a saved run or checkpoint on ``llama``, with its head if it has one, and its configuration.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another format version, or of a backbone of another shape; the message
                names the file.
        """
        directory = Path(directory)
        path, weights = directory / ROUTING_CONFIG, directory / ROUTING_WEIGHTS
        kinds = {"adapter": dict, "routing": dict, "base": dict, "weights_sha256": str}
        saved = read_versioned(path, FORMAT_VERSION, kinds)
        try:
            adapter, routing = AdapterConfig.from_dict(saved["adapter"]), checks.fields(RoutingConfig, saved["routing"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if saved["base"] != (shape := _shape(text_decoder(llama).config)):
            raise ValueError(f"{path}: saved for a backbone of {saved['base']}, got one of {shape}")
        if isinstance(backbone := saved.get("backbone"), dict):
            check_weights(path, backbone, llama, weights_digest(llama), strict=False)
        found = find_weights(weights, path, saved["weights_sha256"])
        config = load_config(directory)
        head = load_head(directory, config)
        model = LlamaAdapter(llama, adapter, fused=fused, liger=liger)
        with unloaded_on_error(model):
            task = cls(model, routing, None if head is None else head.to(model.device))
            tensors = read_tensors(found)
            try:
                _modules(task).load_state_dict(tensors)
            except RuntimeError as error:
                raise ValueError(f"{weights}: not these experts' weights: {error}") from error
        return task, config


def _spread(rows: Tensor, mask: Tensor) -> Tensor:
    """``rows`` (T, n) of a batch's real tokens, in their order, at their places by ``mask``: (B, L, n)."""
    found = rows.new_zeros(*mask.shape, rows.shape[-1])
    found[mask > 0] = rows
    return found


def _modules(task: RoutedTask) -> nn.ModuleDict:
    """What is saved in ``routing.safetensors``, by the names that it has there."""
    experts = nn.ModuleList(task.model.adapters[name] for name in task.experts)
    return nn.ModuleDict({"expert": experts, "router": task.router})


def _shape(config: Any) -> dict[str, int]:
    return {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
