"""The readers of ``rows.iter_rows``, one module for each kind of source; each yields one row at a time.

names.py      what a string names: the format of a file, or a dataset on the hub
text.py       JSONL, JSON, CSV, TSV; also compressed
folder.py     .txt files, and what ``Dataset.save_to_disk`` has written
arrow.py      Parquet, and tables with Arrow's stream interface
objects.py    mappings, columns, pandas' frames
hub.py        a dataset on the Hugging Face hub
"""

import importlib
from typing import Any


def installed(package: str, what: str) -> Any:
    """The package. Raises ``ImportError`` that begins with ``what`` and says what to install."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        name = package.partition(".")[0]
        if error.name != name:
            raise
        raise ImportError(f"{what}: expected {name}, which is not installed: pip install {name}") from error
