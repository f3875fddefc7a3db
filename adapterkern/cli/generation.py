"""Options of the commands that generate text."""

import argparse
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from adapterkern.cli.options import add_backbone_options, add_options, add_skip_option, from_options
from adapterkern.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from adapterkern.inference.runs import SavedRun

logger = logging.getLogger(__name__)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    """How text is generated, how prompts are given to the model, and on which backbone."""
    group = parser.add_argument_group("generation", "defaults in brackets, or the model's own generation_config.json")
    add_options(group, GenerationSettings, without={"other"})
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the tokens that are drawn [%(default)s]")
    group.add_argument(
        "--generation",
        action="append",
        default=[],
        metavar="KEY=VALUE|FILE",
        help="any other field of transformers' GenerationConfig, or a .json file of them; may be repeated",
    )
    group.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a prompt is a user's message, for the tokenizer's chat template; default: as the run was trained",
    )
    add_backbone_options(parser, of_run=True)
    add_skip_option(parser)


def generation_settings(arguments: argparse.Namespace) -> GenerationSettings:
    """What the options ask for. Raises ``ValueError`` for what does not fit, or is given twice."""
    from adapterkern.inference.settings import read_generation

    other: dict[str, Any] = {}
    for text in arguments.generation:
        fields = read_generation(text)
        if twice := sorted(other.keys() & fields.keys()):
            raise ValueError(f"generation: expected {twice[0]} once, got it twice")
        other |= fields
    settings = dataclasses.replace(from_options(arguments, GenerationSettings), other=other)
    if "seed" in arguments.parser.typed and not settings.draws:
        raise ValueError("--seed: has no effect on the likeliest token: expected a temperature above 0, got none")
    return settings


def as_chat(arguments: argparse.Namespace, saved: "SavedRun", tokenizer: Any) -> bool:
    """Whether a prompt is a user's message: as asked, else as the run was trained.

    Raises:
        ValueError: it is to be one, and the tokenizer has no chat template.
    """
    from adapterkern.inference.generate import learned_chats
    from adapterkern.training.data.chat import check_template

    chat: bool | None = arguments.chat
    if chat is None:
        chat = learned_chats(saved, getattr(arguments, "adapter", None))
    if chat:
        check_template(tokenizer, "--chat" if arguments.chat else f"{saved.directory}, which learned chat messages")
    if chat is None and getattr(tokenizer, "chat_template", None):
        logger.warning(
            "%s does not say whether it learned chat messages: prompts are given to the model as they are; --chat "
            "makes messages of them, --no-chat confirms this",
            saved.directory,
        )
    return bool(chat)
