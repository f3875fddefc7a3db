"""``adapterkern eval``."""

import argparse
from pathlib import Path

from adapterkern.cli.options import AddCommand, add_backbone_options


def add(command: AddCommand) -> None:
    parser = command(
        "eval",
        run,
        "evaluate a saved run",
        "Evaluate a run's adapter (and head) on a file: by default on the one that it was trained with.\n\n"
        "  adapterkern eval run\n  adapterkern eval run --data other.csv",
    )
    parser.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    parser.add_argument("--data", metavar="FILE", help="JSONL, CSV or TSV; default: the run's own --eval")
    add_backbone_options(parser, required=False)


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.llama import LlamaAdapter
    from adapterkern.training import evaluate, load_task
    from adapterkern.training.backbone import load_backbone, load_sources

    sources = load_sources(arguments.directory)
    config, head = load_task(arguments.directory)
    data = arguments.data or sources.eval_data
    if data is None:
        raise ValueError(f"--data: expected a file, because {arguments.directory} was trained without --eval; got none")
    llama, tokenizer = load_backbone(
        arguments.model or sources.model,
        num_layers=arguments.backbone_layers or sources.num_layers,
        dtype=arguments.dtype or sources.dtype,
    )
    if config.train_adapters:
        model = LlamaAdapter.from_pretrained(llama, arguments.directory, fused=not arguments.unfused)
    else:
        model = LlamaAdapter(llama)
    for name, value in evaluate(model, data, config, tokenizer=tokenizer, head=head).items():
        print(f"{name:18} {value:.4f}")
    return 0
