"""Parquet files, and tables in memory with Arrow's stream interface (PyCapsule): pyarrow's, polars', duckdb's."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from adapterkern.training.data.formats import installed
from adapterkern.training.data.rows import BadRows, DataError, Row, listed

_ROWS = 1024  # that are Python objects at once


def read_parquet(path: Path, bad: BadRows) -> Iterator[Row]:
    """The rows of a Parquet file, of which one row group's bytes are in memory."""
    parquet = installed("pyarrow.parquet", str(path))
    return _parquet(path, parquet)


def _parquet(path: Path, parquet: Any) -> Iterator[Row]:
    from pyarrow import ArrowException

    try:
        with parquet.ParquetFile(path) as file:
            _check_names(file.schema_arrow.names, str(path))
            yield from _rows(file.iter_batches(batch_size=_ROWS), f"{path}: ")
    except (ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:  # the file system's; Arrow's for damaged data have no number
            raise
        raise DataError(f"{path}: not a whole Parquet file: {str(error).strip()}") from error


def read_stream(data: Any) -> Iterator[Row]:
    """The rows of a table in memory."""
    what = f"data: to read {type(data).__name__}"
    pyarrow = installed("pyarrow", what)
    try:
        stream = pyarrow.RecordBatchReader.from_stream(data)
    except (pyarrow.ArrowException, TypeError) as error:  # of one column
        raise TypeError(f"data: expected a table of columns, got {type(data).__name__}: {error}") from error
    _check_names(stream.schema.names, "data")
    return _rows(stream, "")


def _check_names(names: list[str], source: str) -> None:
    if len(set(names)) != len(names):
        raise DataError(f"{source}: expected each column once, got {listed(names)}")


def _rows(batches: Iterable[Any], prefix: str) -> Iterator[Row]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS):
            try:
                rows = batch.slice(start, _ROWS).to_pylist()
            except UnicodeDecodeError as error:
                where = f"{prefix or 'data: '}row {number} or one of the next {_ROWS}"
                raise DataError(f"{where}: not UTF-8: {error.reason}") from error
            for values in rows:
                yield Row(values, f"{prefix}row {number}")
                number += 1
