"""``adapterkern serve``."""

import argparse
import logging
import os
from typing import Any

from adapterkern import checks
from adapterkern.cli.backbone import backbone_options, check_saved_backbone
from adapterkern.cli.options import add_backbone_options, integer, model_flags, number
from adapterkern.cli.run import say

NAME, SUMMARY = "serve", "an OpenAI-compatible server for the adapters of one or more runs on one backbone"
HELP = """\
Serve the adapters of causal-lm runs on one backbone by OpenAI's protocol; each is a model, named after its folder.

  adapterkern serve runs/answers runs/summaries
  adapterkern serve qa=runs/answers run-of-several-tasks --port 8080
  curl localhost:8000/v1/completions -d '{"model": "answers", "prompt": "Who came?", "max_tokens": 20}'

Requests of a few milliseconds share a batch, in which each has its own adapter. The model "__base__" is the backbone
without one. Ctrl-C or SIGTERM: no further requests are accepted, and those that were are answered.
"""
KEY = "ADAPTERKERN_API_KEY"

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the --output of a training; or NAME=FOLDER")
    group = parser.add_argument_group("server", "defaults in brackets")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on [%(default)s]")
    group.add_argument("--port", type=integer, default=8000, help="[%(default)s]; 0: any that is free")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"that requests must bring; better in {KEY}, which other users do not see"
    )
    group.add_argument("--max-batch", type=integer, default=8, metavar="N", help="requests in a batch [%(default)s]")
    group.add_argument(
        "--window-ms", type=number, default=5.0, metavar="MS", help="how long a batch waits for more [%(default)g]"
    )
    group.add_argument("--queue", type=integer, default=64, metavar="N", help="requests that may wait [%(default)s]")
    group.add_argument(
        "--max-tokens", type=integer, default=1024, metavar="N", help="most that a request may ask for [%(default)s]"
    )
    add_backbone_options(parser, of_run=True)


def run(arguments: argparse.Namespace) -> int:
    checks.integer("port", arguments.port, 0, 65535)
    for name in ("max_batch", "queue", "max_tokens"):
        checks.integer(name, getattr(arguments, name), 1)
    checks.number("window_ms", arguments.window_ms, "[0, 10000]")
    api_key = arguments.api_key if arguments.api_key is not None else os.environ.get(KEY)
    if api_key == "" or not (api_key or "").isascii():
        raise ValueError(f"api_key: expected ASCII characters, from --api-key or {KEY}, got none or others")
    try:
        from adapterkern.inference.server.run import bind, is_local, serve
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}; pip install 'adapterkern[train,serve]'") from error
    from adapterkern.inference.server.models import find_models, load_models
    from adapterkern.model.liger import check_installed

    if arguments.liger:
        check_installed()
    found = find_models(arguments.runs)
    check_saved_backbone(arguments, next(iter(found.values())))
    with bind(arguments.host, arguments.port) as bound:
        if api_key is None and not is_local(arguments.host):
            logger.warning("--host %s: anybody who reaches it may use the server; set %s", arguments.host, KEY)
        flags: Any = model_flags(arguments) | backbone_options(arguments)
        models = load_models(found, model=arguments.model, num_layers=arguments.num_layers, **flags)
        host, port = bound.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        serve(
            models,
            bound,
            max_batch=arguments.max_batch,
            window=arguments.window_ms / 1000,
            queue=arguments.queue,
            max_tokens=arguments.max_tokens,
            api_key=api_key,
            started=lambda: say(f"serving {', '.join(models.adapters)} at {address}"),
        )
    return 0
