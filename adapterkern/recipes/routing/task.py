"""Dynamic routing: a task whose sequences each run the expert adapters that a router picks for them.

The experts stand at the same sites and have one shape, so one grouped call a site runs all of them, each on its own
sequences alone; a sequence without an expert is the bare backbone's. The route is decided where the residual stream
meets the first site: one pass, one KV cache, and a frozen prefix below it that the prefix cache may hold. In
``generate`` it is decided on the prompt and holds for the continuation. router.py has the router and its losses.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern.files import read_json, replacing, sha256, write_json
from adapterkern.model.adapter import AdapterConfig
from adapterkern.model.llama import LlamaAdapter
from adapterkern.recipes.routing.router import (
    Route,
    Router,
    RoutingConfig,
    balance_loss,
    choice_counts,
    run_probability,
)
from adapterkern.training import processes
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.examples import Example, count_targets
from adapterkern.training.heads import HEAD_CONFIG, ClassificationHead
from adapterkern.training.run.checkpoint import CheckpointError
from adapterkern.training.run.folder import ROUTING_CONFIG, ROUTING_WEIGHTS, settings_to_resume
from adapterkern.training.saved import save_config
from adapterkern.training.task import Inputs, Task

FORMAT_VERSION = 1
_DRAWS = 1  # sets what choices draw apart from what other things do with the same seed


@dataclasses.dataclass
class _Step:
    """What the forwards of one step share."""

    rows: int
    targets: int
    costs: bool  # whether the cost counts already
    own: list[bool]  # of each forward to come, whether it counts, or keeps others company
    drawn: dict[int, Tensor]  # for each example's choice, by its id
    routes: list[Route] = dataclasses.field(default_factory=list)  # of the forwards until now


class RoutedTask(Task):
    """Classification or causal-lm over experts that a router chooses among, for ``train(..., task=...)``.

    The training loss of a step's T targets gets T · (``balance`` · balance loss + ``cost`` · probability of running
    anything) beside the cross-entropy, both of all its sequences, however many forwards and processes share them; an
    evaluation's is the cross-entropy alone. What a sequence's choice draws follows from seed, step and place in it.

    Args:
        model: its active adapter becomes the first expert; the others are new, of the same configuration, and named
            ``expert-1``, ``expert-2``, …
        routing: see :class:`RoutingConfig`.
        head: as for :class:`Task`.

    Raises:
        ValueError: no adapter is active, or one has an expert's name.
    """

    uniform = False  # a forward runs the experts that are chosen

    def __init__(
        self, model: LlamaAdapter, routing: RoutingConfig | None = None, head: ClassificationHead | None = None
    ) -> None:
        super().__init__(model, head)
        self.routing = routing or RoutingConfig()
        first = model.active_adapter
        if first is None:
            raise ValueError("model: expected an active adapter to be the first expert, got none; see set_adapter")
        self.experts = [first, *(f"expert-{i}" for i in range(1, self.routing.experts))]
        if taken := [name for name in self.experts[1:] if name in model.adapters]:  # then none is added
            raise ValueError(f"model: expected a new name, got {taken[0]!r}, which exists")
        for name in self.experts[1:]:
            model.add_adapter(name, model.adapter_config(first))
        self.router = Router(model.config.hidden_size, self.routing).to(model.device)
        self._step: _Step | None = None
        self._drawn: Tensor | None = None  # on its way from `forward` to `hidden`
        self._route: Route | None = None  # on its way back

    @contextlib.contextmanager
    def routed(self, attention_mask: Tensor, drawn: Tensor | None = None) -> Iterator[list[Route]]:
        """Within it the model's next forward, or ``generate``, on sequences of this mask is routed.

        ``drawn`` is what :meth:`Router.draw` gives, for choices as in training. The list that comes out holds the route
        as soon as it has been decided.
        """
        routes: list[Route] = []

        def decide(hidden: Tensor) -> tuple[Tensor, Tensor]:
            beams = hidden.shape[0] // len(attention_mask)
            routes.append(self.router(hidden, attention_mask.repeat_interleave(beams, 0).to(hidden.device), drawn))
            return routes[-1].chosen, routes[-1].weight

        with self.model.mixing(self.experts, decide):
            yield routes

    def begin_step(self, examples: Sequence[Example], config: TrainConfig, epoch: int, index: int) -> None:
        own = [counts for _, counts in processes.share(examples, config.batch_size)]
        seed = np.random.SeedSequence([config.seed, epoch, index, _DRAWS]).generate_state(1, np.uint64)
        drawn = self.router.draw(len(examples), torch.Generator().manual_seed(int(seed[0])))
        self._step = _Step(
            rows=len(examples),
            targets=count_targets(examples),
            costs=epoch >= self.routing.free_epochs,
            own=own,
            drawn={id(example): row for example, row in zip(examples, drawn, strict=True)},
        )

    def collate(self, examples: Sequence[Example], config: TrainConfig) -> Inputs:
        inputs = super().collate(examples, config)
        if self.training and self._step is not None:
            inputs["drawn"] = torch.stack([self._step.drawn[id(example)] for example in examples])
        return inputs

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor:
        with self.routed(attention_mask, self._drawn) as routes:
            hidden = super().hidden(input_ids, attention_mask, prefix)
        self._route = routes[0]
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        targets: Tensor,
        positions: Tensor | None = None,
        prefix: Tensor | None = None,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`Task.forward`; in eval mode it counts more: see :meth:`metrics`.

        ``drawn`` (B, ...) is what :meth:`Router.draw` gives. In training it is drawn here where it is missing, and a
        forward that :meth:`begin_step` has not announced is a step of its own.
        """
        if self.training and self.routing.noise:
            self._drawn = self.router.draw(len(input_ids)) if drawn is None else drawn
        loss, correct = super().forward(input_ids, attention_mask, targets, positions, prefix)
        route, self._route, self._drawn = self._route, None, None
        assert route is not None  # `hidden` has just set it
        if self.training:
            return loss + self._extra(route, targets.numel()), correct
        runs = route.chosen >= 0
        each = [(route.chosen == i).any(1).sum() for i in range(len(self.experts))]
        return loss, torch.stack([correct, (~runs).all(1).sum(), runs.sum(), *each])

    def _extra(self, route: Route, targets: int) -> Tensor:
        """What this forward adds to the step's loss: its sequences' cost, and if it is the last one, the balance.

        The balance needs to know all choices. It reaches the router alone, since no layer below is trained: so it can
        wait for them with nothing kept but what the router has read.
        """
        how, rows = self.routing, len(route.chosen)
        step = self._step or _Step(rows=rows, targets=targets, costs=how.free_epochs == 0, own=[True], drawn={})
        extra = route.scores.new_zeros(())
        if step.costs:
            extra = how.cost * run_probability(route, how.experts) * (rows / step.rows)
        own = step.own.pop(0)
        if not own:  # then it has run nothing, which the balance leaves out
            route = route._replace(chosen=torch.full_like(route.chosen, -1))
        step.routes.append(route)
        if not step.own:
            self._step = None
            joined = self.router.joined(step.routes)
            totals = processes.total(choice_counts(joined, how.experts))
            extra = extra + how.balance * balance_loss(joined, how.experts, totals)
        return step.targets * extra

    @torch.no_grad()
    def route(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None = None) -> Route:
        """The routes of sequences (B, L), without noise; at the price of a forward."""
        with self.routed(attention_mask) as routes:
            super().hidden(input_ids, attention_mask, prefix)
        return routes[0]

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """The backbone's ``generate`` on prompts (B, L), each with the experts that its prompt is routed to."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        with torch.no_grad(), self.routed(mask):
            return self.model.generate(input_ids, attention_mask=mask, **kwargs)

    @contextlib.contextmanager
    def running(self, config: TrainConfig) -> Iterator[None]:
        """As :meth:`Task.running`; refuses to resume a run that was begun with another :class:`RoutingConfig`."""
        if before := settings_to_resume(config, ROUTING_CONFIG):
            path, saved = before
            if saved.get("routing") != dataclasses.asdict(self.routing):
                raise CheckpointError(
                    f"{path}: the run was begun with routing {saved.get('routing')}, not {self.routing}"
                )
        try:
            with super().running(config):
                yield
        finally:
            self._step = self._drawn = self._route = None  # of a step that was broken off

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        if not config.train_adapters:
            raise ValueError("train_adapters: expected True, since a router chooses among adapters, got False")
        parts = {f"expert.{i}": self.model.adapters[name] for i, name in enumerate(self.experts)}
        parts |= {"router": self.router} | ({} if self.head is None else {"head": self.head})
        return {f"{part}.{key}": p for part, module in parts.items() for key, p in module.named_parameters()}

    def metrics(self, sums: Sequence[float], examples: Sequence[Example], config: TrainConfig) -> dict[str, float]:
        """The task's metrics; ``skipped``, the share of sequences without an expert; ``experts_run``, the mean number
        of them; and ``expert_0``, ``expert_1``, …: the share of the sequences that ran each.
        """
        skipped, runs, *each = (count / len(examples) for count in sums[2:])
        shares = {f"expert_{i}": share for i, share in enumerate(each)}
        return super().metrics(sums, examples, config) | {"skipped": skipped, "experts_run": runs} | shares

    def save(self, directory: Path, config: TrainConfig) -> None:
        """Write experts and router (``routing.safetensors``, ``routing_config.json``), head and ``task.json``."""
        tensors = {key: t.detach().to("cpu").contiguous() for key, t in _modules(self).state_dict().items()}
        with replacing(directory / ROUTING_WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        fields = {
            "format_version": FORMAT_VERSION,
            "adapter": self.model.adapter_config(self.experts[0]).to_dict(),
            "routing": dataclasses.asdict(self.routing),
            "base": _shape(self.model.config),
            "weights_sha256": sha256(directory / ROUTING_WEIGHTS),
        }
        write_json(directory / ROUTING_CONFIG, fields)
        if self.head is not None:
            self.head.save_pretrained(directory)
        save_config(directory, config)

    @classmethod
    def from_pretrained(
        cls, llama: PreTrainedModel, directory: str | os.PathLike[str], *, fused: bool = True, liger: bool = False
    ) -> "RoutedTask":
        """The task saved in ``directory``, on ``llama``; its head too, if it has one.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, of another format version, or of a backbone of another shape; the message
                names the file.
        """
        path, weights = Path(directory) / ROUTING_CONFIG, Path(directory) / ROUTING_WEIGHTS
        saved = read_json(path)
        if saved.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"{path}: expected format_version {FORMAT_VERSION}, got {saved.get('format_version')!r}")
        try:
            adapter, routing = AdapterConfig.from_dict(saved["adapter"]), RoutingConfig(**saved["routing"])
            base, digest = saved["base"], saved["weights_sha256"]
        except KeyError as error:
            raise ValueError(f"{path}: field {error} is missing") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error
        if base != _shape(llama.config):
            raise ValueError(f"{path}: saved for a backbone of {base}, got one of {_shape(llama.config)}")
        if sha256(weights) != digest:
            raise ValueError(
                f"{weights}: SHA-256 differs from the one in {ROUTING_CONFIG}: damaged, or of another save"
            )
        head = ClassificationHead.from_pretrained(directory) if (Path(directory) / HEAD_CONFIG).exists() else None
        model = LlamaAdapter(llama, adapter, fused=fused, liger=liger)
        task = cls(model, routing, None if head is None else head.to(model.device))
        try:
            _modules(task).load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(f"{weights}: not these experts' weights: {error}") from error
        return task


def _modules(task: RoutedTask) -> nn.ModuleDict:
    experts = nn.ModuleList(task.model.adapters[name] for name in task.experts)
    return nn.ModuleDict({"expert": experts, "router": task.router})


def _shape(config: Any) -> dict[str, int]:
    return {"hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers}
