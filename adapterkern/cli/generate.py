"""``adapterkern generate``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from adapterkern.cli.generation import add_generation_options, as_chat, generation_settings
from adapterkern.cli.options import FORMATS, add_options, as_asked, integer
from adapterkern.cli.run import check_file, named, say
from adapterkern.cli.saved import open_run, saved_run, write_rows
from adapterkern.training.config import TrainConfig

NAME, SUMMARY = "generate", "complete prompts, by a saved causal-lm run"
HELP = """\
Complete a prompt, those of a file, or stdin, and print the completions alone.

  adapterkern generate run "The capital of France is"
  adapterkern generate run --data questions.jsonl --output answers.jsonl
  adapterkern generate run --temperature 0.7 --top-p 0.9 --generation min_new_tokens=8 < prompt.txt

A prompt is given as in training: a text as it is, chat messages through the tokenizer's chat template. The likeliest
token is taken unless --temperature is above 0. One prompt streams to a terminal; several run in batches, and each
completion begins on a new line.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, help="the --output of a training, or one of its checkpoints")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="default: --data, or the whole of stdin")
    rows = "rows with the run's prompt column, messages, conversations or instruction"
    parser.add_argument("--data", metavar="FILE", help=f"{rows}: {FORMATS}")
    parser.add_argument("--lines", action="store_true", help="each line of stdin is a prompt")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the rows and completions: .csv, .tsv or .jsonl, or with .gz"
    )
    parser.add_argument("--output-column", default="completion", metavar="NAME", help="their column [%(default)s]")
    parser.add_argument("--adapter", metavar="NAME", help="one of several; none is the bare backbone")
    parser.add_argument("--batch-size", type=integer, default=8, metavar="N", help="prompts in a batch [%(default)s]")
    group = parser.add_argument_group("data", "default: the run's own")
    add_options(group, TrainConfig, only=("prompt_column", "text_column", "skip_bad_rows"))
    add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch

    from adapterkern import checks
    from adapterkern.inference.generate import check_generates, check_prompts, completions
    from adapterkern.inference.table import format_of_output

    checks.integer("batch_size", arguments.batch_size, 1)
    settings = generation_settings(arguments)
    if arguments.output is not None:
        format_of_output(arguments.output, arguments.data)
    elif "output_column" in arguments.parser.typed:
        raise ValueError("--output-column: has no effect without --output: expected both, got one")
    saved = saved_run(arguments)
    check_generates(saved, arguments.adapter)
    config = as_asked(arguments, saved.config)
    data = _data(arguments, config)
    column = None if arguments.output is None else arguments.output_column
    with named("--data"):
        count = check_prompts(data, config, column)
    opened = open_run(arguments, saved)
    opened.task.eval()
    chat = as_chat(arguments, saved, opened.tokenizer)
    streamer = None
    if count == 1 and arguments.output is None and sys.stdout.isatty() and settings.streams:
        from transformers import TextStreamer

        streamer = TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True)
    torch.manual_seed(arguments.seed)
    found = completions(
        opened.task,
        opened.tokenizer,
        data,
        config,
        settings,
        adapter=arguments.adapter,
        chat=chat,
        batch_size=arguments.batch_size,
        column=column,
        streamer=streamer,
    )
    if arguments.output is not None:
        write_rows(arguments.output, found, count, "generate")
        return 0
    for _, completion in found:
        if streamer is None:
            say("" if completion is None else completion.text)
    return 0


def _data(arguments: argparse.Namespace, config: TrainConfig) -> Any:
    """The prompts that the arguments name, for ``completions``.

    Raises:
        ValueError: there are none, or two kinds of them.
    """
    given = [
        n for n in ("PROMPT", "--data", "--lines") if getattr(arguments, n.strip("-").lower()) not in (None, False)
    ]
    if len(given) > 1:
        raise ValueError(f"{given[1]}: expected one of PROMPT, --data and stdin, got {given[0]} and {given[1]}")
    of_rows = {"prompt_column", "text_column"} | (set() if arguments.lines else {"skip_bad_rows"})
    if arguments.data is None and (ignored := sorted(of_rows & arguments.parser.typed)):
        option = f"--{ignored[0].replace('_', '-')}"
        raise ValueError(f"{option}: has no effect without --data: expected both, got one")
    if arguments.data is not None:
        check_file("--data", arguments.data)
        return arguments.data
    prompts = [arguments.prompt]
    if arguments.prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise ValueError("PROMPT: expected a prompt, --data FILE, or a text on stdin, got none")
        text = sys.stdin.read()
        text = text.removesuffix("\n")
        prompts = text.split("\n") if arguments.lines and text else [text]  # splitlines knows other ends, too
    return [{config.prompt_column: prompt} for prompt in prompts]
