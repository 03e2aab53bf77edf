"""What a user picks out of a batch, checked and turned into rows."""

from collections.abc import Iterable

from tlens_callback.probes import ProbeBatch


def picked(values: Iterable[object] | None, what: str) -> tuple[object, ...] | None:
    """A selection as a tuple; None stays None and means the default.

    Raises:
        ValueError: a string instead of a list of them, nothing at all, or something twice.
    """
    if values is None:
        return None
    if isinstance(values, str):
        raise ValueError(f"{what}={values!r} is one string; give a list: {what}=[{values!r}].")
    chosen = tuple(values)
    if not chosen:
        raise ValueError(f"{what}={chosen} selects nothing; leave it out for the default.")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"{what}={list(chosen)} names something twice.")
    return chosen


def rows_named(batch: ProbeBatch, names: Iterable[str]) -> list[int]:
    """The rows of the probes of these names, in the order asked for.

    Raises:
        ValueError: for a name that no probe has.
    """
    row = {probe.name: i for i, probe in enumerate(batch.probes)}
    names = list(names)
    if unknown := [name for name in names if name not in row]:
        raise ValueError(f"There is no probe {unknown[0]!r}; the probes are {list(row)}.")
    return [row[name] for name in names]


def plain_rows(batch: ProbeBatch) -> list[int]:
    """The rows that are no repeated blocks."""
    return [i for i, probe in enumerate(batch.probes) if probe.block is None]


def block_rows(batch: ProbeBatch) -> dict[int, list[int]]:
    """Block length -> the rows of repeated blocks of that length; lengths ascending."""
    rows: dict[int, list[int]] = {}
    for i, probe in enumerate(batch.probes):
        if probe.block is not None:
            rows.setdefault(probe.block, []).append(i)
    return dict(sorted(rows.items()))
