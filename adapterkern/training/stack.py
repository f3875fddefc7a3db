"""A run on a stack: the active adapter learns; those below are frozen, unless ``train_stack`` trains them too."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

from adapterkern.model.config import FREE_IN_ADAPTERS, AdapterConfig
from adapterkern.model.digest import adapter_digest
from adapterkern.model.llama import LlamaAdapter
from adapterkern.training.config import TrainConfig
from adapterkern.training.data.rows import warn


def below(model: LlamaAdapter) -> list[str]:
    """The adapters below the one that runs, lowest first; none where batches mix adapters, or none runs."""
    return [] if model.is_mixing else model.active_adapters()[:-1]


def check_stack(model: LlamaAdapter, config: TrainConfig, sharded: bool) -> None:
    """Raise ``ValueError`` if the frozen adapters of a stack would be ``sharded``: they are not gathered for a save.

    Warns of ``train_stack`` without a stack.
    """
    names = below(model)
    if config.train_stack and not names:
        warn("config: train_stack=True has no effect without a stack")
    if sharded and names and not config.train_stack:
        raise ValueError(
            f"train_stack: expected True on {', '.join(names)} where parameters are sharded, which are gathered for a "
            "save if they are trained, got False"
        )


@contextlib.contextmanager
def frozen_below(model: LlamaAdapter, config: TrainConfig) -> Iterator[None]:
    """Inside the block no gradient is computed for the adapters below, unless the run trains them."""
    names = () if config.train_stack else below(model)
    frozen = [p for name in names for p in model.adapter_parameters(name) if p.requires_grad]
    for p in frozen:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)


def below_settings(model: LlamaAdapter, config: TrainConfig) -> dict[str, Any]:
    """What a resumed run must have below its adapter: digests of what is frozen there; nothing without a stack."""
    names = () if config.train_stack else below(model)
    return {"below": [_digest(model, name) for name in names]} if names else {}


def _digest(model: LlamaAdapter, name: str) -> str:
    config, plain = model.adapter_config(name).to_dict(), AdapterConfig().to_dict()
    # Later versions have more fields, which are then as they are by default.
    own = {key: config[key] for key in sorted(config) if config[key] != plain[key] and key not in FREE_IN_ADAPTERS}
    return hashlib.sha256(f"{own} {adapter_digest(model.adapters[name])}".encode()).hexdigest()[:16]
