"""Makes the parquet file of one step's long table."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from tlens_callback.store.tables import NAMES, TEXT

_NOT_AXES = {"step", *NAMES, "value", "text"}


def arrow(column: pd.Series) -> pa.Array:
    """Returns a column of `long_frame` as a column for `parquet`."""
    if not isinstance(column.array, pd.Categorical):
        return pa.array(column.array)
    codes = column.array.codes
    names = pa.array(list(column.array.categories), pa.large_string())
    return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), names)


def parquet(columns: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """Makes a parquet file of these columns and the axes among `names`; a column that is not given
    is empty."""
    schema = _schema(tuple(dict.fromkeys(name for name in names if name not in _NOT_AXES)))
    length = len(columns["value"])
    arrays = [
        columns[field.name].cast(field.type)
        if field.name in columns
        else pa.nulls(length, field.type)
        for field in schema
    ]
    out = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), out)
    return out.getvalue().to_pybytes()


@lru_cache
def _schema(axes: tuple[str, ...]) -> pa.Schema:
    """Returns the column types, with pandas's own metadata, so that it reads axes as whole
    numbers."""
    types = {
        "step": "int64",
        **dict.fromkeys(NAMES, TEXT),
        **dict.fromkeys(axes, "Int32"),
        "value": "float32",
        "text": TEXT,
    }
    empty = pd.DataFrame({name: pd.array([], dtype=type_) for name, type_ in types.items()})
    schema = pa.Schema.from_pandas(empty, preserve_index=False)
    # The texts of an empty pandas 2 column are objects of no type; all texts would become null.
    for i, field in enumerate(schema):
        if pa.types.is_null(field.type):
            schema = schema.set(i, field.with_type(pa.large_string()))
    return schema
