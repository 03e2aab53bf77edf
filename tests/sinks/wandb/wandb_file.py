"""Reads back what an offline run wrote: wandb itself has no reader for its files."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = 32768


def _raw_records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, part = 7, b""
    while position + 7 <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0 and length == 0:
            break
        chunk = data[position + 7 : position + 7 + length]
        if len(chunk) < length:
            break
        position += 7 + length
        # 1: whole, 2: first, 3: middle, 4: last.
        part = chunk if kind in (1, 2) else part + chunk
        if kind in (1, 4):
            yield part


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a run."""
    from wandb.proto import wandb_internal_pb2

    for raw in _raw_records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(raw)
        yield record


def history(path: Path) -> list[dict[str, Any]]:
    """The logged rows. A picture's or table's value is a dict with `_type` and `path`."""
    rows = []
    for record in records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        row: dict[str, Any] = {}
        for item in record.history.item:
            keys = list(item.nested_key) or [item.key]
            inner = row
            for key in keys[:-1]:
                inner = inner.setdefault(key, {})
            inner[keys[-1]] = json.loads(item.value_json)
        rows.append(row)
    return rows


def run_file(folder: Path) -> Path:
    """The .wandb file of the only run under a WANDB_DIR."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    return path
