"""Doing the runs: one thread each, as many at a time as there are cores."""

import signal
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from adapterkern.training.run.lock import locked
from experiments.quality import plan, rows
from experiments.quality.training import Spec, World, run

_world: list[World] = []  # of a worker


def run_all(path: Path, chosen: list[str], workers: int, minutes: float) -> None:
    """Do all runs of these parts that have no row, several at a time.

    Ctrl-C, SIGTERM and a run that raises let those under way end, and begin no other.

    Raises:
        RuntimeError: a run has raised, or another process is doing runs for this folder.
    """
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        with locked(path.parent):
            _run_all(path, chosen, workers, minutes, asked)
    except BlockingIOError as error:
        raise RuntimeError(f"{path.parent}: another process is doing runs for it") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run_all(path: Path, chosen: list[str], workers: int, minutes: float, asked: list[int]) -> None:
    failed: list[tuple[Spec, BaseException]] = []
    done, until = rows.read(path), time.monotonic() + 60 * minutes
    with ProcessPoolExecutor(workers, get_context("spawn"), _start) as pool:
        under_way: dict[Future[dict[str, Any]], Spec] = {}
        while True:
            if time.monotonic() < until and not asked and not failed:
                taken = set(under_way.values())
                free = (spec for spec in plan.pending(done, chosen) if spec not in taken)
                for spec, _ in zip(free, range(workers - len(under_way)), strict=False):
                    under_way[pool.submit(_run, spec)] = spec
            if not under_way:
                break
            finished, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in finished:
                spec = under_way.pop(future)
                if (error := future.exception()) is not None:
                    failed.append((spec, error))
                    continue
                row = rows.row_of(spec, future.result())
                if other := rows.other_digest(done, spec, row["digest"]):
                    message = f"{spec.data}: expected digest {other}, as in the rows, got {row['digest']}"
                    failed.append((spec, ValueError(message)))
                    continue
                done[spec] = row
                rows.write(path, done)
                place = f"{spec.data} {spec.layers}-{spec.first} n={spec.texts}"
                shown = f"{place} {spec.method} {spec.budget:g} keep={spec.keep:g} lr={spec.lr:g}"
                scores = f"validation {row['validation']} test {row['test']} drift {row['drift']}"
                print(
                    f"{shown} seed {spec.seed}: {row['status']}, {scores}, {float(row['seconds'] or 0):.0f} s",
                    flush=True,
                )
    for spec, error in failed:
        raise RuntimeError(f"{spec} raised") from error


def _start() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal
    torch.set_num_threads(1)
    _world.append(World())


def _run(spec: Spec) -> dict[str, Any]:
    return run(_world[0], spec)
