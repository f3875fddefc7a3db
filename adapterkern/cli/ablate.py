"""``adapterkern ablate``."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from adapterkern import checks
from adapterkern.cli.options import FILES, add_layers_option, add_output_option, demo_layers, integer
from adapterkern.cli.run import check_both

if TYPE_CHECKING:
    from adapterkern.recipes.ablation.study import Study

NAME, SUMMARY = "ablate", "compare positions, depths, activations, ... over seeds"
HELP = """\
Train many variants over several seeds, and say what differs by more than chance. Without --vary: where, how deep, how
wide, which activation, init and learning rate, one at a time, on the demo's backbone and texts.

  adapterkern ablate
  adapterkern ablate --vary depth=1,2,3 --vary activation=silu,gelu --product --seeds 5
  adapterkern ablate --vary layers=-1/-2,-1/-3,-2,-1 --vary every=1,2 --set lr=1e-3 --set epochs=3
  adapterkern ablate --model ./llama --train train.csv --eval test.csv --vary position=layer,attention
  adapterkern ablate --vary kind=bottleneck,parallel,scaled-parallel,prompt --set max_params=22000

The first value of each field is the base point. A field is one of kind, adapter_dim, position, every, layers, depth,
activation, init, prompt_length, max_params (of the adapters), or lr, warmup, max_norm, precision, ... (an option of
`train`). A kind is one of bottleneck, attention, parallel, parallel-attention, scaled-parallel, no-norm, learned-scale,
prompt and llama-adapter-v2; docs/adapters.md has their equations.
After Ctrl-C, or when killed, the same command continues; a run whose row is in ablation.csv is never computed again.

  adapterkern ablate --preset stability --output stability
compares inits, clipping and warmup at an aggressive learning rate, counts spikes and draws loss and gradient norm.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=("where", "stability"), default="where", help="default %(default)s")
    parser.add_argument("--vary", action="append", default=[], metavar="FIELD=V,V,...", help="instead of the preset's")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=V", help="of the base point")
    parser.add_argument("--product", action="store_true", help="all combinations, instead of one field at a time")
    parser.add_argument("--no-head-alone", action="store_true", help="leave out the runs without adapters")
    parser.add_argument("--seeds", type=integer, metavar="N", help="seeds 0 to N-1; default the preset's")
    parser.add_argument("--model", help="a .gguf file, transformers folder or hub name instead of SmolLM2-135M")
    add_layers_option(parser)
    parser.add_argument("--train", type=Path, metavar="FILE", help=f"instead of Reuters R8: {FILES}")
    parser.add_argument("--eval", type=Path, metavar="FILE", help="the same, unseen in training")
    parser.add_argument("--train-texts", type=integer, default=400, metavar="N", help="of Reuters R8; default 400")
    parser.add_argument("--eval-texts", type=integer, default=600, metavar="N", help="of Reuters R8; default 600")
    add_output_option(parser, "adapterkern-ablation")


def run(arguments: argparse.Namespace) -> int:
    from adapterkern.model.backbone import check_source, load_backbone
    from adapterkern.recipes.ablation.report import write_report
    from adapterkern.recipes.ablation.runs import run_study
    from adapterkern.recipes.ablation.stability import write_stability
    from adapterkern.recipes.demo.corpora import MODEL, obtain
    from adapterkern.training.run.lock import check_writable

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("ablate: expected one process, got several: every one would make the same runs")
    study = make_study(arguments)
    study.check()
    if arguments.model is not None:
        check_source(arguments.model)
    check_writable(arguments.output_dir)
    train_file, eval_file = _files(arguments, study)
    source = arguments.model or os.fspath(obtain(MODEL))
    llama, tokenizer = load_backbone(source, num_layers=demo_layers(arguments))
    findings = run_study(study, llama, train_file, eval_file, arguments.output_dir, tokenizer=tokenizer, say=_say)
    title = f"{Path(source).stem}, {findings.num_layers} layers; {train_file.name}, {eval_file.name}"
    write_report(study, findings, arguments.output_dir, title)
    if arguments.preset == "stability":
        write_stability(study, findings, arguments.output_dir)
    return 0 if findings.complete else 130


def make_study(arguments: argparse.Namespace) -> "Study":
    """The preset with ``--vary``, ``--set`` and the rest put over it."""
    from adapterkern.recipes.ablation.presets import PRESETS
    from adapterkern.recipes.ablation.study import parse_axis, parse_setting

    study = PRESETS[arguments.preset]
    axes = [parse_axis(text) for text in arguments.vary]
    settings = [parse_setting(text) for text in arguments.set]
    for option, given, texts in (("--vary", axes, arguments.vary), ("--set", settings, arguments.set)):
        if len({name for name, _ in given}) != len(given):
            raise ValueError(f"{option}: expected each field once, got {' '.join(texts)}")
    if arguments.seeds is not None:
        checks.integer("--seeds", arguments.seeds, 1)
    study = dataclasses.replace(
        study,
        vary=dict(axes) or study.vary,
        seeds=study.seeds if arguments.seeds is None else tuple(range(arguments.seeds)),
        product=arguments.product or study.product,
        head_alone=study.head_alone and not arguments.no_head_alone,
    )
    return study.based_on(dict(settings))


def _files(arguments: argparse.Namespace, study: "Study") -> tuple[Path, Path]:
    from adapterkern.recipes.demo.corpora import R8_TEST, R8_TRAIN, column, draw_texts

    check_both(arguments.train, arguments.eval, study.training)
    if arguments.train is not None:
        return arguments.train, arguments.eval
    train_file = draw_texts(R8_TRAIN, arguments.train_texts, 0)
    return train_file, draw_texts(R8_TEST, arguments.eval_texts, 0, exclude=frozenset(column(train_file, "text")))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
