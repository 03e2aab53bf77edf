"""What an instrument compares with: what it has seen first."""

from collections.abc import Sequence

from torch import Tensor

from tlens_callback.probes import ProbeBatch


def first_seen(memory: dict[str, Tensor], key: str, now: Tensor) -> Tensor:
    """What was seen first under this key, on the device of `now`: equal to `now` where nothing was.

    The memory keeps a copy with storage of its own.
    """
    if key not in memory:
        memory[key] = now.clone()
    return memory[key].to(now.device)


def of_probes(batch: ProbeBatch, rows: Sequence[int]) -> str:
    """An ending for the keys of what is taken over several probes together: a run that is resumed
    with another choice of probes is compared with that choice's own first."""
    return f" of {'/'.join(batch.probes[row].name for row in rows)}"
