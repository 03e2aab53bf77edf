"""Finds out whether the files of a step can be read, without reading their values."""

import json
import math
import stat
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tlens_callback.store.format import described_in, texts_of

_TEXT_COLUMNS = frozenset("key instrument measure probe unit text".split())


def whole_table(path: Path) -> bool:
    """Whether a parquet file has its beginning and its end.

    Raises:
        OSError: if it cannot be read.
    """
    # A pipe would be waited for without end.
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(-8, 2)
        footer, end = struct.unpack("<I4s", file.read())
        # The same four letters are at the beginning of the file, before all else.
        return end == b"PAR1" and footer + 12 <= size


def demand_readable(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], about: Any, *, known: Collection[str]
) -> None:
    """Checks what a safetensors file says about its readings against its arrays.

    Shapes are compared with those in the file, so that no text can ask for more memory than the
    file has numbers.

    Args:
        tensors: key -> dtype and shape of an array, from the header of the file.
        metadata: the texts in that header.
        about: key -> what is said about a reading.
        known: the types of numbers that can be read.

    Raises:
        ValueError: if a reading could not be made of it.
    """
    if not isinstance(about, dict):
        raise ValueError("the metadata of the readings is no mapping")
    for key, one in about.items():
        if key not in tensors or "" in key.split("/", 2) or "/" not in key:
            raise ValueError(f"there is no array {key!r}")
        array = tensors[key]
        if array["dtype"] not in known:
            raise ValueError(f"{key!r} holds {array['dtype']}, which numpy does not have")
        _demand_entry(key, one, array["shape"])
        if texts_of(key) in metadata:
            texts = json.loads(metadata[texts_of(key)])
            if not _is_texts(texts) or len(texts) != math.prod(one["shape"]):
                raise ValueError(f"{key!r} does not have one text per value")
    try:
        said = described_in(metadata)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"the descriptions are damaged: {error}") from error
    for one in said.values():
        meanings = *one.measures.values(), one.others
        texts = [one.title, one.group, one.kind, one.sentence]
        texts += [t for m in meanings for t in (m.title, m.role, m.alarm, m.explanation)]
        if not _is_texts([*texts, *(axis for m in meanings for axis in m.axes or ())]):
            raise ValueError("the descriptions are damaged: a text is none")


def demand_columns(schema: Any) -> None:
    """Checks that a parquet table has the columns of a store, with types that fit other steps.

    Raises:
        ValueError: if it does not.
    """
    import pyarrow as pa

    for name in ("step", "key", "value"):
        if name not in schema.names:
            raise ValueError(f"there is no column {name!r}")
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
        if field.name == "value":
            fits = pa.types.is_floating(kind)
        elif field.name == "step":
            fits = pa.types.is_integer(kind)
        elif field.name in _TEXT_COLUMNS:
            fits = text or pa.types.is_null(kind)
        else:
            fits = pa.types.is_integer(kind) or pa.types.is_null(kind)
        if not fits:
            raise ValueError(f"the column {field.name!r} holds {field.type}")


def _demand_entry(key: str, one: Any, stored: list[int]) -> None:
    wanted = {"axes", "unit", "labels", "limits", "shape", "packing"}
    if not isinstance(one, dict) or not wanted <= one.keys():
        raise ValueError(f"{key!r} is not described")
    axes, shape, labels, limits = one["axes"], one["shape"], one["labels"], one["limits"]
    if not _is_texts(axes) or len(set(axes)) != len(axes):
        raise ValueError(f"{key!r} has no list of axes")
    if not isinstance(one["unit"], str) or not one["unit"]:
        raise ValueError(f"{key!r} has no unit")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"{key!r} has no shape")
    packed = shape
    if one["packing"] == "tril":
        # Indices are made for the last two axes, also where there is no number.
        if len(shape) < 2 or shape[-1] != shape[-2] or (0 in shape and shape[-1] > 2**12):
            raise ValueError(f"{key!r} cannot be lower triangles")
        packed = [*shape[:-2], shape[-1] * (shape[-1] + 1) // 2]
    elif one["packing"] is not None:
        raise ValueError(f"{key!r} is packed in an unknown way")
    if len(axes) != len(shape) or packed != stored:
        raise ValueError(f"{key!r} has another shape than its array")
    if not isinstance(labels, dict) or not all(
        axis in axes and _is_texts(names) and len(names) == shape[axes.index(axis)]
        for axis, names in labels.items()
    ):
        raise ValueError(f"{key!r} has other labels than indices")
    if limits is not None:
        numbers = isinstance(limits, list) and all(type(n) in (int, float) for n in limits)
        if not numbers or len(limits) != 2 or not limits[0] < limits[1]:
            raise ValueError(f"{key!r} has no limits (low, high)")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)
