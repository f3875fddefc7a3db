"""What commands do with a saved run: find its backbone and data again, and print its scores."""

import argparse
import os
from typing import TYPE_CHECKING, Any

from adapterkern.cli.options import model_flags

if TYPE_CHECKING:
    from adapterkern.training.saved import Sources


def run_sources(arguments: argparse.Namespace) -> "Sources":
    """Where the run's backbone and data came from; nobody need know where ``--model`` and ``--data`` say both."""
    from adapterkern.training.saved import Sources, load_sources

    try:
        return load_sources(arguments.directory)
    except FileNotFoundError:
        if arguments.model is None or arguments.data is None:
            raise
        return Sources(arguments.model)


def save_run_sources(arguments: argparse.Namespace) -> None:
    """Write ``sources.json`` into ``--output``: what :func:`run_sources` reads."""
    from adapterkern.training.saved import Sources, save_sources

    data = None if arguments.eval is None else os.path.abspath(arguments.eval)
    save_sources(
        arguments.output_dir, Sources(arguments.model, arguments.backbone_layers, arguments.dtype or "fp32", data)
    )


def load_saved_backbone(arguments: argparse.Namespace, sources: "Sources") -> tuple[Any, Any]:
    """The run's backbone and tokenizer; what the command line says of them goes before what the run had."""
    from adapterkern.model.backbone import load_backbone

    return load_backbone(
        arguments.model or sources.model,
        num_layers=sources.num_layers if arguments.backbone_layers is None else arguments.backbone_layers,
        dtype=arguments.dtype or sources.dtype,
    )


def load_saved_model(arguments: argparse.Namespace, sources: "Sources", train_adapters: bool) -> tuple[Any, Any]:
    """The run's model, with the adapter if it trained one, and its tokenizer."""
    from adapterkern.model.llama import LlamaAdapter

    llama, tokenizer = load_saved_backbone(arguments, sources)
    if train_adapters:
        return LlamaAdapter.from_pretrained(llama, arguments.directory, **model_flags(arguments)), tokenizer
    return LlamaAdapter(llama, None, **model_flags(arguments)), tokenizer


def evaluation_data(arguments: argparse.Namespace, sources: "Sources") -> str:
    """``--data``, or what the run was evaluated on."""
    data = arguments.data or sources.eval_data
    if data is None:
        raise ValueError(f"--data: expected a file, because {arguments.directory} was trained without --eval; got none")
    return data


def print_metrics(metrics: dict[str, float]) -> None:
    """A line each."""
    for name, value in metrics.items():
        print(f"{name:18} {value:.4f}")
