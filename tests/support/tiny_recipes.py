"""Models of several adapters for the recipes: adapters of tasks that differ in every field, and routed experts."""

from typing import Any

import torch
from torch import nn

import adapterkern as ak
from adapterkern.recipes.routing import RoutedTask, RoutingConfig
from tests.support import tiny_run

# Layers, dimensions, positions and depths differ; one site is shared by two shapes.
ADAPTERS = {
    "a": {"adapter_dim": 8, "layers": (2, 3)},
    "b": {"adapter_dim": 4, "layers": (1, 3), "depth": 2},
    "c": {"adapter_dim": 8, "layers": (3,), "position": "attention"},
}
IDS = torch.randint(3, 128, (12, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) < torch.tensor([9, 4, 7, 9, 2, 5] * 2)[:, None]).long()


def many_adapters(names: Any = ADAPTERS) -> ak.LlamaAdapter:
    made = tiny_run.model()
    for name in names:
        torch.manual_seed(7)
        made.add_adapter(name, ak.AdapterConfig(**ADAPTERS[name]))
    return made


def routed(seed: int = 0, sharp: bool = True, layers: tuple[int, ...] = (2, 3), **routing: Any) -> RoutedTask:
    """Three experts that do something and, if ``sharp``, a router whose choices differ between sequences, or tokens."""
    task = RoutedTask(tiny_run.model(seed, layers=layers), RoutingConfig(**({"experts": 3} | routing)))
    for name in task.experts:
        for p in task.model.adapter_parameters(name):
            nn.init.normal_(p, std=0.2)
    if sharp:
        nn.init.normal_(task.router.linear.weight, std=1.0)
        with torch.no_grad():  # subtract what all have in common
            task.router.linear.bias -= task.route(IDS, MASK).scores.flatten(0, -2).mean(0)  # type: ignore[misc]  # in place, so still a Parameter
    return task.eval()
