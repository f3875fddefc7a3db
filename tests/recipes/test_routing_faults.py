"""A kill or an interrupt while a routed task is saved over an earlier one: one of the two is there, and whole."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterkern.recipes.routing import RoutedTask
from tests.support import tiny_run
from tests.support.tiny_recipes import routed

pytestmark = pytest.mark.slow

CONFIG = tiny_run.quiet(task="causal-lm")  # no head: its two files are another pair
_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate"}


def filled(value: float) -> RoutedTask:
    """A task all of whose numbers are ``value``."""
    task = routed(sharp=False)
    with torch.no_grad():
        for p in task.trained(CONFIG).values():
            p.fill_(value)
    return task


def save_in_child(task: RoutedTask, directory: Path, number: int, death: str) -> bool:
    """Save in a child process that dies before it touches the file system the ``number``-th time; False if it did."""
    pid = os.fork()
    if pid == 0:
        touched = 0

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal touched
            if event in _EVENTS and any(str(directory) in str(argument) for argument in arguments):
                touched += 1
                if touched == number:
                    if death == "kill":
                        os._exit(1)
                    raise KeyboardInterrupt

        status = 1
        try:
            sys.addaudithook(on_event)
            task.save(directory, CONFIG)
            status = 0
        except KeyboardInterrupt:
            pass
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 2
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1)
    return status == 0


@pytest.mark.parametrize("death", ["kill", "interrupt"])
def test_a_save_that_is_ended_at_any_touch_of_the_file_system(tmp_path: Path, death: str) -> None:
    earlier, later = filled(1.0), filled(2.0)
    found: list[float]
    found, number, ended = [], 1, False
    while not ended:
        earlier.save(tmp_path, CONFIG)  # also over what an ended save has left
        ended = save_in_child(later, tmp_path, number, death)
        task, _ = RoutedTask.from_pretrained(tiny_run.model().unload(), tmp_path)
        values = [set(p.flatten().tolist()) for p in task.trained(CONFIG).values()]
        assert all(value == values[0] and value in ({1.0}, {2.0}) for value in values), f"before touch {number}"
        found += values[0]
        number += 1
    assert found == sorted(found)  # from the earlier save to the later one, and not back
    assert found.count(1.0) > 5
    assert found.count(2.0) > 5  # task.json comes after them
