"""``adapterkern chat``."""

import argparse
import logging

from adapterkern.cli.generation import add_generation_options, generation_settings
from adapterkern.cli.saved import open_run, saved_run

NAME, SUMMARY = "chat", "talk with a saved causal-lm run"
HELP = """\
Talk with a run in a terminal, or by the lines of a file.

  adapterkern chat run
  adapterkern chat run other-run --temperature 0.7
  adapterkern chat run < questions.txt

Further runs are adapters on the same backbone, by the names of their folders; /adapter NAME changes between them while
you talk, and /off shows the bare backbone's answer beside each. /help names all commands.
"""

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", nargs="+", metavar="RUN", help="the --output of a training, or a checkpoint")
    add_generation_options(parser)


def run(arguments: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from adapterkern.inference import chat
    from adapterkern.inference.generate import learned_chats
    from adapterkern.inference.runs import find_run
    from adapterkern.training.data.chat import check_template

    settings = generation_settings(arguments)
    sources = arguments.directory
    arguments.directory = sources[0]
    first = saved_run(arguments)
    runs = [first, *(find_run(source) for source in sources[1:])]
    names = chat.run_names(sources, runs)
    opened = open_run(arguments, first)
    voices = chat.voices(opened, runs, names)
    opened.task.eval()
    templated = arguments.chat
    if templated is None:
        templated = bool(getattr(opened.tokenizer, "chat_template", None))
        if not templated:
            logger.warning(
                "the tokenizer has no chat template: each message is a prompt by itself, and the model sees none of "
                "what was said before"
            )
        elif learned_chats(first) is False:
            logger.warning(
                "%s has learned texts and no chat messages; --no-chat gives it each message as a prompt by itself",
                first.directory,
            )
    elif templated:
        check_template(opened.tokenizer, "--chat")
    torch.manual_seed(arguments.seed)
    out, notes = Console(), Console(stderr=True)
    conversation = chat.Chat(
        voices,
        opened.tokenizer,
        settings,
        templated=templated,
        show=lambda name: out.print(f"[{name}]", style="bold", markup=False, highlight=False),
        note=lambda text: notes.print(f"({text})", style="dim", markup=False, highlight=False, soft_wrap=True),
    )
    if notes.is_terminal:
        conversation.note(f"{conversation.name} answers; /help names the commands, Ctrl-D ends")
    conversation.run(chat.typed_lines())
    return 0
