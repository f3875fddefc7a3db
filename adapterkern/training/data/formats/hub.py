"""Datasets of the Hugging Face hub, and those that the package datasets has saved in a folder."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapterkern.training.data.formats import installed
from adapterkern.training.data.formats.names import SPELLING, HubName
from adapterkern.training.data.formats.objects import read_mappings
from adapterkern.training.data.rows import BadRows, DataError, Row

_PAUSE = 1.0  # seconds, after which the hub is asked once more
_LONG = 400  # characters of another package's message; it may list every configuration


def read_hub(name: HubName, bad: BadRows) -> Iterator[Row]:
    """The rows of a split, which is downloaded into the cache of the package datasets, and read from there."""
    nothing = f"data: no file or folder {name.name} here"
    datasets = installed("datasets", f"{nothing}; to look for it on the hub")
    try:
        with _offline_if_not_connected(datasets, name.name):
            rows = datasets.load_dataset(name.name, name.config, split=name.split)
    except MemoryError:
        raise
    except OSError as error:  # it is not there, or the hub cannot be asked
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"{nothing}, and no dataset on the hub: {_message(error)}") from error
    except Exception as error:  # what is wrong with a split, a configuration or a file, in many kinds
        raise DataError(f"{name}: {_message(error)}; expected {SPELLING}") from error
    return read_mappings(rows, bad, f"{name}: ")


@contextlib.contextmanager
def _offline_if_not_connected(datasets: Any, name: str) -> Iterator[None]:
    """Without a network, the package asks its cache alone: it would try again and again for half a minute."""
    offline = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = offline or not _connected(name)
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = offline


def _connected(name: str) -> bool:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    from adapterkern.model.backbone import not_connected

    for pause in (0.0, _PAUSE):
        time.sleep(pause)
        try:
            get_hf_file_metadata(hf_hub_url(name, "README.md", repo_type="dataset"))
        except Exception as error:
            if not_connected(error):
                continue
        return True  # whatever else is wrong, the package meets, too
    return False


def read_saved(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of what ``Dataset.save_to_disk`` has written."""
    datasets = installed("datasets", str(path))
    try:
        rows: Any = datasets.load_from_disk(os.fspath(path))
    except Exception as error:
        raise DataError(f"{path}: not a dataset that can be read: {_message(error)}") from error
    return read_mappings(rows, bad, f"{path}: ")


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONG else f"{text[:_LONG]} ..."
