"""A process that serves until SIGINT or SIGTERM."""

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from functools import partial

import uvicorn

from adapterkern.inference.server.app import make_app
from adapterkern.inference.server.batching import Batcher
from adapterkern.inference.server.generation import generate
from adapterkern.inference.server.models import Models

logger = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """The address, taken before a backbone is loaded; connections are refused until ``serve``.

    Raises:
        OSError: it is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise OSError(f"host, port: expected a free address of this machine, got {host}:{port} ({error})") from error
    return bound


def is_local(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    models: Models,
    bound: socket.socket,
    *,
    max_batch: int = 8,
    window: float = 0.005,
    queue: int = 64,
    max_tokens: int = 1024,
    api_key: str | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Answer requests until SIGINT or SIGTERM; those that were accepted by then are answered before it returns.

    Args:
        bound: see ``bind``.
        max_batch, window, queue: see ``Batcher``.
        max_tokens, api_key: see ``make_app``.
        started: called when connections are accepted.
    """
    batcher = Batcher(
        partial(generate, models.model, models.tokenizer), max_batch=max_batch, window=window, queue=queue
    )
    app = make_app(models, batcher, max_tokens=max_tokens, api_key=api_key)
    config = uvicorn.Config(app, log_config=None, log_level="warning", access_log=False, lifespan="off")
    # uvicorn raises the signal again at its end, which would be this process's.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    batcher.start()
    server = _Server(config, started)
    try:
        server.run(sockets=[bound])
    finally:
        if not server.force_exit:  # a second Ctrl-C does not wait
            batcher.close()
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_start()
