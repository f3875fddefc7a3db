"""The options about a backbone's weights, its attention and its activations: what can be said before it is loaded."""

import argparse
from typing import TYPE_CHECKING, Any

from adapterkern.training.config import TrainConfig

if TYPE_CHECKING:
    import torch

    from adapterkern.inference.runs import SavedRun


def backbone_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of ``load_backbone`` that were asked for, but for the number of layers."""
    return {name: getattr(arguments, name) for name in ("dtype", "load_in", "attn")}


def device() -> "torch.device":
    """Where a command loads its backbone."""
    import torch

    from adapterkern.model.backbone import default_device

    return torch.device(default_device())


def check_weights(arguments: argparse.Namespace, config: TrainConfig) -> None:
    """Raise what can be known of a training's options about memory."""
    from adapterkern.model.quantized import PACKED, check_load_in
    from adapterkern.training.activations import check_offload

    check_load_in(arguments.load_in, arguments.model, device())
    if config.shard and arguments.load_in in PACKED:
        raise ValueError(
            f"load_in: expected none with --shard, which cuts plain tensors alone, got {arguments.load_in}"
        )
    if config.offload_activations:
        check_offload(device())


def check_attention(arguments: argparse.Namespace, config: TrainConfig) -> None:
    """The same of ``--attn``, once the dtype is chosen."""
    from adapterkern.model.attention import check_attn

    check_attn(arguments.attn, device(), (arguments.dtype, config.precision))


def check_saved_backbone(arguments: argparse.Namespace, run: "SavedRun") -> None:
    """Raise what can be known of a saved run's backbone, and of the options about it."""
    from adapterkern.model.attention import check_attn
    from adapterkern.model.quantized import check_load_in

    sources = run.backbone(arguments.model)
    check_load_in(arguments.load_in or sources.load_in, sources.model, device())
    check_attn(arguments.attn, device())
