"""Keeps the values of the first observation, with which an instrument compares later ones."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from tlens_callback.instruments.parts.selection import plain_rows, rows_named
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading


def first_value(baseline: dict[str, Tensor], key: str, now: Tensor) -> Tensor:
    """Returns the first value under this key, on the device of `now`.

    If there is none, `now` becomes the first value; the baseline keeps a copy of it.
    """
    if key not in baseline:
        baseline[key] = now.clone()
    return baseline[key].to(now.device)


class FirstLayers:
    """Keeps the first values of all layers under one key, [layer, ...], and gives those of some.

    Make it before a forward pass. In the pass the layers come in pieces, in order; in that of the
    first observation each piece is copied.
    """

    def __init__(self, baseline: dict[str, Tensor], key: str, n_layers: int) -> None:
        self._baseline, self._key, self._n_layers = baseline, key, n_layers
        self._first = key not in baseline

    def of(self, now: Tensor, part: slice) -> Tensor:
        """Returns the first values of the layers of which `now` has the current ones."""
        if self._first and part.start == 0:
            self._baseline[self._key] = now.new_empty(self._n_layers, *now.shape[1:])
        kept = self._baseline[self._key][part]
        return kept.copy_(now) if self._first else kept.to(now.device)


def probes_suffix(batch: ProbeBatch, rows: Sequence[int]) -> str:
    """Returns an ending for the keys of values that are computed over several probes together.

    It keeps the first values of different choices of probes apart when a run is resumed.
    """
    return f" of {'/'.join(batch.probes[row].name for row in rows)}"


def changes(
    name: str, first: Mapping[str, Reading], last: Mapping[str, Reading], of: Mapping[str, str]
) -> Iterator[Reading]:
    """Yields the readings of change of the instrument `name`: `last` minus `first`.

    Args:
        first, last: the readings of the two observations, by key.
        of: name of a change -> name of the measure that changes.
    """
    for reading in last.values():
        if reading.instrument == name and reading.measure in of:
            source = "/".join(filter(None, (name, of[reading.measure], reading.probe)))
            if source in first and first[source].values.shape == last[source].values.shape:
                yield replace(reading, values=last[source].values - first[source].values)


def rows_to_compare(instrument: str, probes: Sequence[str] | None, batch: ProbeBatch) -> list[int]:
    """Returns the rows of the probes that a drift compares; each has at least two tokens.

    Raises:
        ValueError: for an unknown probe, or one with a single token.
    """
    if probes is None:
        plain = [i for i in plain_rows(batch) if batch.lengths[i] > 1]
        rows = plain or [i for i, n in enumerate(batch.lengths) if n > 1]
    else:
        rows = rows_named(batch, probes)
    short = [batch.probes[i].name for i in rows if batch.lengths[i] < 2]
    if short or not rows:
        raise ValueError(
            f"{instrument} leaves the first token of the probes out, and "
            f"{repr(short[0]) if short else 'each of them'} has no other. Give a longer text."
        )
    return rows
