"""Rows that are in Python already: mappings, columns of one length, a pandas ``DataFrame``, an Arrow table."""

import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from adapterkern.training.data.formats.arrow import read_stream
from adapterkern.training.data.rows import BadRows, DataError, Row, listed, shown

_ROWS = 1024  # of a frame that are mappings at once


def read_object(data: Any, bad: BadRows) -> Iterator[Row]:
    """The rows of an object. Raises ``TypeError`` if it has none, as a mapping of splits."""
    pandas = sys.modules.get("pandas")  # a frame's own module has imported it
    if pandas is not None and isinstance(data, pandas.DataFrame):
        return _frame(data, pandas)
    if hasattr(data, "__arrow_c_stream__"):
        return read_stream(data)
    if isinstance(data, Mapping) and _has_columns(data):
        return _columns(data)
    if isinstance(data, Mapping) or hasattr(data, "iterrows") or not isinstance(data, Iterable):
        hint = ""
        if isinstance(data, Mapping):  # a DatasetDict, or one row
            hint = f" with the keys {listed(data)}; pass one of its splits, or a mapping for each row"
        elif hasattr(data, "iterrows"):
            hint = "; pass frame.to_dict('records')"
        raise TypeError(f"data: expected a path or a list of rows, got {type(data).__name__}{hint}")
    return read_mappings(data, bad)


def read_mappings(data: Iterable[Any], bad: BadRows, prefix: str = "") -> Iterator[Row]:
    """One row per mapping; ``prefix`` goes before its number."""
    for index, values in enumerate(data):
        if isinstance(values, Mapping):
            yield Row(values, f"{prefix}row {index}")
        else:
            bad.add(f"{prefix}row {index}", f"expected a mapping of columns to values, got {type(values).__name__}")


def _has_columns(data: Mapping[Any, Any]) -> bool:
    """Whether the values are columns, and no splits: these are tables, or lists of mappings."""
    return all(map(_is_column, data.values())) and any(
        len(column) and not isinstance(next(iter(column)), Mapping) for column in data.values()
    )


def _is_column(value: Any) -> bool:
    if isinstance(value, str | bytes | Mapping) or getattr(value, "shape", None) == ():
        return False
    is_table = hasattr(value, "columns") or hasattr(value, "column_names")
    return not is_table and all(hasattr(value, name) for name in ("__len__", "__getitem__", "__iter__"))


def _columns(data: Mapping[Any, Any]) -> Iterator[Row]:
    if len({len(column) for column in data.values()}) > 1:
        lengths = ", ".join(f"{shown(name)} of {len(column)}" for name, column in data.items())
        raise DataError(f"data: expected columns of one length, got {lengths}")
    columns = [column.to_pylist() if hasattr(column, "to_pylist") else column for column in data.values()]
    return (
        Row(dict(zip(data, values, strict=True)), f"row {index}")
        for index, values in enumerate(zip(*columns, strict=True))
    )


def _frame(frame: Any, pandas: Any) -> Iterator[Row]:
    """The rows of a ``DataFrame``, numbered by position. A missing value (NaN, NA, NaT) is None."""
    if not frame.columns.is_unique:
        raise DataError(f"data: expected each column once, got {listed(frame.columns)}")

    def rows() -> Iterator[Row]:
        for start in range(0, len(frame), _ROWS):
            for index, values in enumerate(frame.iloc[start : start + _ROWS].to_dict("records"), start):
                yield Row({name: _given(value, pandas) for name, value in values.items()}, f"row {index}")

    return rows()


def _given(value: Any, pandas: Any) -> Any:
    return None if pandas.api.types.is_scalar(value) and pandas.isna(value) else value
