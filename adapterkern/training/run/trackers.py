"""``TrainConfig.log_with``: a run's records, sent to accelerate's trackers.

OUTPUT/trackers/adapterkern.json    the run's id, by which a resumed run goes on in the same place
OUTPUT/trackers/adapterkern/        what trackers write that write files
"""

import shutil
import uuid
from pathlib import Path
from typing import Any

from accelerate import PartialState, tracking

from adapterkern.files import read_json, write_json
from adapterkern.training.config import TrainConfig
from adapterkern.training.run.callbacks import Callback, RunInfo

FOLDER = "trackers"
_PROJECT = "adapterkern"
_ID = "adapterkern.json"
_BUILT_IN = tuple(tracking.LOGGER_TYPE_TO_CLASS)  # the others are registered by the user, and so there


def tracker_names(config: TrainConfig) -> list[str]:
    """The trackers of ``config.log_with``.

    Raises:
        ValueError: there is no such tracker, or no ``output_dir``.
        ImportError: its package is not installed.
    """
    names = [] if config.log_with is None else list(dict.fromkeys(part.strip() for part in config.log_with.split(",")))
    installed = [str(name) for name in tracking.get_available_trackers()]
    for name in names:
        if name not in tracking.LOGGER_TYPE_TO_CLASS:
            known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
            raise ValueError(f"log_with: expected trackers among {known}, got {name!r:.80}")
        if name in _BUILT_IN and name not in installed:
            package = name.replace("_", "-")
            raise ImportError(f"log_with: expected {name}, which is not installed: pip install {package}")
    if names and config.output_dir is None:
        raise ValueError(f"log_with: expected an output_dir, where trackers write, got {config.log_with!r} without one")
    return names


class Trackers(Callback):
    """Sends a run to the trackers of its configuration."""

    def __init__(self, config: TrainConfig) -> None:
        self._names = tracker_names(config)
        self._open: list[Any] = []

    def on_start(self, run: RunInfo) -> None:
        if not self._names:
            return
        assert run.config.output_dir is not None  # `tracker_names` has checked it
        PartialState()  # by which trackers know the main process
        folder = Path(run.config.output_dir, FOLDER)
        folder.mkdir(exist_ok=True)
        if not (folder / _ID).exists():
            write_json(folder / _ID, {"id": uuid.uuid4().hex})
        run_id = read_json(folder / _ID).get("id")
        for name in self._names:
            made: Any = tracking.LOGGER_TYPE_TO_CLASS[name]
            values: dict[str, Any] = {"dir": str(folder), "id": run_id, "resume": "allow"} if name == "wandb" else {}
            tracker = made(_PROJECT, *([str(folder)] if made.requires_logging_directory else ()), **values)
            tracker.start()
            self._open.append(tracker)
            if not run.step:
                tracker.store_init_configuration(_plain(run.config))

    def on_step(self, record: dict[str, Any]) -> None:
        self._log("train", record)

    def on_evaluation(self, record: dict[str, Any]) -> None:
        self._log("eval", record)

    def _log(self, kind: str, record: dict[str, Any]) -> None:
        numbers = {
            f"{kind}/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for tracker in self._open:
            tracker.log(numbers, step=record["step"])

    def close(self) -> None:
        while self._open:
            self._open.pop().finish()


def _plain(config: TrainConfig) -> dict[str, Any]:
    """The settings as numbers and texts: some trackers take nothing else."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in config.to_dict().items()}


def remove_tracked(directory: Path) -> None:
    """Remove what the trackers of an earlier run have written to its folder."""
    if (directory / FOLDER / _ID).exists():
        shutil.rmtree(directory / FOLDER)
