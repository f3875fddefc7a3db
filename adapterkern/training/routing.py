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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from adapterkern.files import read_json, replacing, sha256, write_json
from adapterkern.llama import LlamaAdapter
from adapterkern.modules import AdapterConfig
from adapterkern.training import outputs
from adapterkern.training.checkpoint import CheckpointError
from adapterkern.training.config import TrainConfig
from adapterkern.training.data import Example
from adapterkern.training.heads import HEAD_CONFIG, ClassificationHead
from adapterkern.training.outputs import ROUTING_CONFIG, ROUTING_WEIGHTS
from adapterkern.training.router import Route, Router, RoutingConfig, balance_loss, run_probability
from adapterkern.training.task import Feed, Task

FORMAT_VERSION = 1


class RoutedTask(Task):
    """Classification or causal-lm over experts that a router chooses among, for ``train(..., task=...)``.

    The training loss of B targets gets B · (``balance`` · balance loss + ``cost`` · probability of running anything)
    beside the cross-entropy; an evaluation's is the cross-entropy alone.

    Args:
        model: its active adapter becomes the first expert; the others are new, of the same configuration, and named
            ``expert-1``, ``expert-2``, …
        routing: see :class:`RoutingConfig`.
        head: as for :class:`Task`.

    Raises:
        ValueError: no adapter is active, or one has an expert's name.
    """

    over_processes = False  # the balance is that of a forward's sequences, and an evaluation counts its own

    def __init__(
        self, model: LlamaAdapter, routing: RoutingConfig | None = None, head: ClassificationHead | None = None
    ) -> None:
        super().__init__(model, head)
        self.routing = routing or RoutingConfig()
        first = model.active_adapter
        if first is None:
            raise ValueError("model: expected an active adapter to be the first expert, got none; see set_adapter")
        self.experts = [first, *(f"expert-{i}" for i in range(1, self.routing.experts))]
        for name in self.experts[1:]:
            model.add_adapter(name, model.adapter_config(first))
        self.router = Router(model.config.hidden_size, self.routing).to(model.device)
        self._epoch = 0  # as the loop has told `order`
        self._route: Route | None = None  # on its way from `hidden` to `forward`
        self._seen: list[Tensor] | None = None  # the choices of an evaluation

    @contextlib.contextmanager
    def routed(self, attention_mask: Tensor, noise: float = 0.0) -> Iterator[list[Route]]:
        """Within it the model's next forward, or ``generate``, on sequences of this mask is routed.

        The list that it gives holds the route as soon as it has been decided.
        """
        routes: list[Route] = []

        def decide(hidden: Tensor) -> tuple[Tensor, Tensor]:
            beams = hidden.shape[0] // len(attention_mask)
            routes.append(self.router(hidden, attention_mask.repeat_interleave(beams, 0).to(hidden.device), noise))
            return routes[-1].chosen, routes[-1].weight

        with self.model.mixing(self.experts, decide):
            yield routes

    def hidden(self, input_ids: Tensor, attention_mask: Tensor, prefix: Tensor | None) -> Tensor:
        with self.routed(attention_mask, self.routing.noise if self.training else 0.0) as routes:
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
    ) -> tuple[Tensor, Tensor]:
        loss, correct = super().forward(input_ids, attention_mask, targets, positions, prefix)
        route, self._route = self._route, None
        assert route is not None  # `hidden` has just set it
        if self._seen is not None:
            self._seen.append(route.chosen)
        if self.training:
            how = self.routing
            extra = how.balance * balance_loss(route, how.experts)
            if self._epoch >= how.free_epochs:
                extra = extra + how.cost * run_probability(route, how.experts)
            loss = loss + targets.numel() * extra
        return loss, correct

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

    def order(self, examples: Sequence[Example], config: TrainConfig, epoch: int) -> list[int]:
        self._epoch = epoch
        return super().order(examples, config, epoch)

    def running(self, config: TrainConfig) -> contextlib.AbstractContextManager[None]:
        """As :meth:`Task.running`; refuses to resume a run that was begun with another :class:`RoutingConfig`."""
        if config.resume and config.output_dir is not None:
            path = outputs.newest_checkpoint(Path(config.output_dir)) / ROUTING_CONFIG
            saved = read_json(path).get("routing")
            if saved != dataclasses.asdict(self.routing):
                raise CheckpointError(f"{path}: the run was begun with routing {saved}, not {self.routing}")
        return super().running(config)

    def trained(self, config: TrainConfig) -> dict[str, nn.Parameter]:
        if not config.train_adapters:
            raise ValueError("train_adapters: expected True, since a router chooses among adapters, got False")
        parts = {f"expert.{i}": self.model.adapters[name] for i, name in enumerate(self.experts)}
        parts |= {"router": self.router} | ({} if self.head is None else {"head": self.head})
        return {f"{part}.{key}": p for part, module in parts.items() for key, p in module.named_parameters()}

    def evaluate(
        self, run: nn.Module, examples: Sequence[Example], feed: Feed, config: TrainConfig
    ) -> dict[str, float]:
        """The task's metrics; ``skipped``, the share of sequences without an expert; ``experts_run``, the mean number
        of them; and ``expert_0``, ``expert_1``, …: the share of the sequences that ran each.
        """
        self._seen = []
        try:
            metrics = super().evaluate(run, examples, feed, config)
            chosen = torch.cat(self._seen)
        finally:
            self._seen = None
        runs = chosen >= 0
        metrics["skipped"] = 1 - runs.any(1).float().mean().item()
        metrics["experts_run"] = runs.float().sum(1).mean().item()
        return metrics | {f"expert_{i}": (chosen == i).any(1).float().mean().item() for i in range(len(self.experts))}

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
        described = {"format_version": outputs.FORMAT_VERSION, "config": config.to_dict()}
        write_json(directory / outputs.TASK_NAME, described)

    @classmethod
    def from_pretrained(
        cls, llama: PreTrainedModel, directory: str | os.PathLike[str], *, fused: bool = True
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
        model = LlamaAdapter(llama, adapter, fused=fused)
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
