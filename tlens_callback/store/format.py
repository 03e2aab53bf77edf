"""Defines the local store on disk: its files, and how readings are packed in them.

    manifest.json                    format, creation time, package versions, process, run, trial
    arrays/step-00000100.safetensors every reading of the step, a tensor per key
    scores/step-00000100.parquet     its small readings as a long table, for pandas
    page/index.html, page.html       the page, live and in one file; reading a store needs neither

`pandas.read_parquet(run / "scores")` reads all steps. In a safetensors file the metadata entry
"readings" is JSON: key -> axes, unit, labels, limits, shape, packing. With packing "tril" a tensor
holds `values[..., rows, columns]` for `rows, columns = numpy.tril_indices(n)`; the rest is 0. A
reading with texts has the entry "texts/<key>", a JSON list of them in the order of the values.
The entry "instruments" is JSON: instrument -> its description, if it has one.

A step is complete if and only if its scores file exists; that file is written last.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from tlens_callback.meaning import Description
from tlens_callback.reading import Reading, descriptions
from tlens_callback.store.triangle import lower_triangle

FORMAT = 1
"""Version of the format. It must go up if an older reader would misread a store; not for a new
entry that older readers ignore, such as "texts/<key>"."""
MANIFEST = "manifest.json"

_INSTRUMENTS = "instruments"
_MOST_MANIFEST = 2**20


def arrays_file(path: Path, step: int) -> Path:
    """Returns the path of the file with the arrays of a step."""
    return path / "arrays" / f"step-{step:08d}.safetensors"


def scores_file(path: Path, step: int) -> Path:
    """Returns the path of the file with the table of a step."""
    return path / "scores" / f"step-{step:08d}.parquet"


def steps_in(folder: Path) -> list[int]:
    """Lists the steps that have a file in this folder (`arrays`, `scores`), in order."""
    names = [re.fullmatch(r"step-([0-9]{8,18})\.\w+", p.name) for p in folder.glob("step-*")]
    return sorted(int(name[1]) for name in names if name)


def is_store(path: Path) -> bool:
    """Whether the directory holds a store of this package."""
    return manifest(path) is not None


def manifest(path: Path) -> dict[str, Any] | None:
    """Returns the manifest of the store in this directory; None if there is none."""
    file = path / MANIFEST
    try:
        # A pipe would be waited for without end.
        if not file.is_file() or file.stat().st_size > _MOST_MANIFEST:
            return None
        about = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return about if isinstance(about, dict) and "tlens_callback" in about else None


def pack(readings: Sequence[Reading], *, exact: bool) -> bytes:
    """Packs readings into one safetensors file; `exact` keeps attention patterns in float32."""
    tensors: dict[str, np.ndarray] = {}
    about: dict[str, Any] = {}
    # Beside "readings", which is parsed whole for every question about a step.
    texts: dict[str, str] = {}
    for reading in readings:
        lower = lower_triangle(reading.values, reading.axes)
        packing = None if lower is None else "tril"
        values = reading.values if lower is None else lower
        if packing and not exact and -1 <= values.min(initial=0) and values.max(initial=0) <= 1:
            # numpy converts what is below 2**-14 in software, ten times slower than torch.
            values = torch.from_numpy(values).half().numpy()
        tensors[reading.key] = np.asarray(values, order="C")
        about[reading.key] = {
            "axes": reading.axes,
            "unit": reading.unit,
            "labels": reading.labels,
            "limits": reading.limits,
            "shape": reading.values.shape,
            "packing": packing,
        }
        if reading.texts is not None:
            texts[texts_of(reading.key)] = json.dumps(reading.texts.ravel().tolist())
    said = {name: one.as_json() for name, one in descriptions(readings).items()}
    metadata = {"readings": json.dumps(about), _INSTRUMENTS: json.dumps(said), **texts}
    return save(tensors, metadata=metadata)


def texts_of(key: str) -> str:
    """Returns the name of the metadata entry with a reading's texts."""
    return f"texts/{key}"


def unpack(key: str, values: np.ndarray, about: Mapping[str, Any], texts: str | None) -> Reading:
    """Makes a reading again from its tensor and its metadata."""
    if about["packing"] == "tril":
        full = np.zeros(about["shape"], np.float32)
        rows, columns = np.tril_indices(full.shape[-1])
        full[..., rows, columns] = values
        values = full
    limits = about["limits"]
    return Reading(
        key=key,
        values=values,
        axes=tuple(about["axes"]),
        unit=about["unit"],
        labels=about["labels"],
        limits=None if limits is None else (limits[0], limits[1]),
        texts=None if texts is None else np.array(json.loads(texts), str).reshape(about["shape"]),
    )


def described_in(metadata: Mapping[str, str]) -> dict[str, Description]:
    """Returns instrument -> description, from the metadata of a safetensors file."""
    told = json.loads(metadata.get(_INSTRUMENTS, "{}"))
    return {name: Description.from_json(one) for name, one in told.items()}
