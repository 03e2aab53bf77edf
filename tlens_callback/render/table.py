"""Writes the lists of an instrument as pandas tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.render.slices import check_one_instrument
from tlens_callback.store.tables import TEXT, is_numbered, numbering


def is_ranked(reading: Reading) -> bool:
    """Whether `neuron_table` shows this reading, along its first axis."""
    shape = reading.values.shape
    return reading.axes[1:2] == ("rank",) and len(shape) <= 3 and reading.values.size > 0


def neuron_table(readings: Sequence[Reading], axis: str = "layer") -> pd.DataFrame:
    """Makes a table with one row for each probe, layer and rank.

    It takes the readings of one instrument whose axes begin with `("layer", "rank")`, or with
    another axis and "rank"; others are left out.

    Columns: probe (missing for a reading that belongs to no probe), layer, rank; then a column for
    each measure, in the order of the readings. Unit "index" becomes a whole number. A measure with
    texts has two columns. If its unit is "index", the number is an id for the text: "<measure>" is
    the text and "<measure>_id" the number. Otherwise "<measure>" is the number and
    "<measure>_text" the text. If the labels of the layers are not numbers, layers are counted from
    0 and their labels are in "layer_name".

    A reading with a third axis, such as ("layer", "rank", "pos"), gives one value along it, and its
    place: "token" (the label) and "pos", or a column named after the axis if that has no tokens;
    with several such measures "<measure>_token" and "<measure>_pos". A measure "peak" of unit
    "index" says which value; without it, it is the one of largest magnitude.

    A value is missing where a probe lacks a measure, or a measure lacks a layer or rank.

    Raises:
        ValueError: for readings of several instruments, or two of one key.
    """
    return _rows([r for r in readings if is_ranked(r) and r.axes[0] == axis], (axis, "rank"))


def axis_table(readings: Sequence[Reading], axis: str) -> pd.DataFrame:
    """Makes a table with one row for each probe and index, from the readings of one instrument that
    have this axis alone; others are left out.

    Columns: probe; the axis ("index" for "token"); its labels, if they are not numbers, in
    "<axis>_name" ("token" for "pos" and "token"); a column for each measure, as in `neuron_table`.

    Raises:
        ValueError: for readings of several instruments, or two of one key.
    """
    return _rows([r for r in readings if r.axes == (axis,)], (axis,))


def _rows(chosen: Sequence[Reading], lead: tuple[str, ...]) -> pd.DataFrame:
    """Makes a row for each probe and index of the leading axes, with columns for each measure."""
    check_one_instrument(chosen)
    if len({r.key for r in chosen}) < len(chosen):
        raise ValueError(f"Two readings have the same key: {sorted(r.key for r in chosen)}.")
    measures = {r.measure for r in chosen}
    along = [r for r in chosen if r.values.ndim > len(lead)]
    several = len({r.measure for r in along}) > 1
    clash = measures & {"token", "pos", *(r.axes[-1] for r in along)}
    heads = [_lead_columns(axis) for axis in lead]
    taken = {"probe", *(name for pair in heads for name in pair)}
    parts = []
    for probe in dict.fromkeys(r.probe for r in chosen):
        of_probe = [r for r in chosen if r.probe == probe]
        numbers = [np.unique(np.concatenate([numbering(r, a) for r in of_probe])) for a in lead]
        grid = np.indices([len(n) for n in numbers]).reshape(len(lead), -1)
        columns: dict[str, object] = {"probe": pd.array([probe] * grid.shape[1], dtype=TEXT)}
        for axis, pair, index, known in zip(lead, heads, grid, numbers, strict=True):
            columns[pair[0]] = known[index]
            if names := _names(of_probe, axis):
                columns[pair[1]] = pd.array([names.get(i) for i in known[index]], dtype=TEXT)
        covered = np.zeros(grid.shape[1], bool)
        peaks = [r for r in of_probe if along and r.measure == "peak" and r.unit == "index"]
        peak = peaks[0].values.astype(int) if peaks else None
        for reading in of_probe:
            places = [
                np.searchsorted(known, numbering(reading, a))
                for a, known in zip(lead, numbers, strict=True)
            ]
            at = np.ravel_multi_index(np.ix_(*places), [len(n) for n in numbers]).ravel()
            if any(reading is each for each in peaks):
                continue
            covered[at] = True
            prefix = f"{reading.measure}_" if several or clash else ""
            name = f"{reading.measure}_value" if reading.measure in taken else reading.measure
            for title, column in _columns(reading, name, len(lead), peak, prefix).items():
                spread = pd.Series(column, index=at).reindex(range(grid.shape[1]))
                columns[title] = spread.array
        parts.append(pd.DataFrame(columns)[covered])
    if not parts:
        return pd.DataFrame({"probe": [], **{pair[0]: [] for pair in heads}})
    return pd.concat(parts, ignore_index=True)


def _lead_columns(axis: str) -> tuple[str, str]:
    """Names the two columns with the number and the label of an index."""
    tokens = {"pos": ("pos", "token"), "token": ("index", "token")}
    return tokens.get(axis, (axis, f"{axis}_name"))


def _names(readings: Sequence[Reading], axis: str) -> dict[int, str]:
    """Maps number -> label, where labels are not numbers themselves."""
    return {
        i: name
        for r in readings
        if not is_numbered(r, axis)
        for i, name in enumerate(r.labels.get(axis, ()))
    }


def _columns(
    reading: Reading, name: str, n_lead: int, peak: np.ndarray | None, prefix: str
) -> dict[str, object]:
    """Makes the columns of one reading, with a cell for each index of its leading axes; `peak` is
    that of `neuron_table`."""
    values, texts = reading.values, reading.texts
    extra: dict[str, object] = {}
    if values.ndim > n_lead:
        axis = reading.axes[-1]
        labels = reading.labels.get(axis)
        size = np.where(np.isnan(values), -1, np.abs(values))
        at = size.argmax(-1) if peak is None or peak.shape != size.shape[:-1] else peak
        values = np.take_along_axis(values, at[..., None], -1)[..., 0]
        if texts is not None:
            texts = np.take_along_axis(texts, at[..., None], -1)[..., 0]
        where = pd.array(at.ravel(), dtype="Int64")
        there = pd.array([labels[i] if labels else str(i) for i in at.flat], dtype=TEXT)
        if axis in TOKEN_AXES:
            extra |= {f"{prefix}token": there, f"{prefix}pos": where}
        else:
            extra[f"{prefix}{axis}"] = there if labels else where
    number: object = values.ravel()
    if reading.unit == "index":
        finite = np.isfinite(values).ravel()
        whole = np.where(finite, values.ravel(), 0).astype(np.int64)
        number = pd.arrays.IntegerArray(whole, ~finite)
    if texts is None:
        return {name: number, **extra}
    text = pd.array(texts.ravel().tolist(), dtype=TEXT)
    if reading.unit == "index":
        return {name: text, f"{name}_id": number, **extra}
    return {name: number, f"{name}_text": text, **extra}
