"""Two processes of a test, joined by gloo, and what they found."""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

Work = Callable[[int, Path], object]  # of a process's number, and the test's folder


def start(work: Work, folder: Path) -> None:
    """Have both do ``work``, and keep what it gives; see ``found``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, work, folder), nprocs=2)


def _process(rank: int, port: int, work: Work, folder: Path) -> None:
    faulthandler.dump_traceback_later(210, exit=True)  # two that wait for each other say where
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.save(work(rank, folder), _path(folder, rank))
    leave()


def leave() -> NoReturn:
    """End one of two processes at once: its group's threads outlive a device mesh.

    If one of them lets go of a tensor while Python's interpreter ends, it is ended inside C++, and the process aborts.
    """
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def found(folder: Path, rank: int = 0) -> dict:
    """What ``work`` gave in a process."""
    return torch.load(_path(folder, rank), weights_only=False)


def _path(folder: Path, rank: int) -> Path:
    return folder / f"found-{rank}.pt"
