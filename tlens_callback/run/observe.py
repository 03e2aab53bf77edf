"""`observe`: makes one observation. All instruments share one forward pass."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tlens_callback.interfaces import Instrument
from tlens_callback.meaning import described
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.shadow import LAST_LOGITS, Reduce, Shadow, Taken, Taps
from tlens_callback.shadow.fidelity import Ran
from tlens_callback.shadow.stacks import as_tuple

_MOST_JOINED = 2**18
"""Tensors of at most this many elements are copied to the CPU together."""


def observe(
    shadow: Shadow,
    batch: ProbeBatch,
    instruments: Sequence[Instrument],
    *,
    on_error: Callable[[Instrument, Exception], None] | None = None,
    check: Callable[[Ran | None], None] | None = None,
) -> list[Reading]:
    """Runs the probes through the shadow once and returns what the instruments read.

    The shadow is used as it is: call `shadow.sync()` first to copy the live model's weights into
    it. Reductions run on the shadow's device, inside the forward pass; all their results are copied
    to the CPU together.

    Args:
        on_error: called with an instrument that raised and its error; the others go on. None: the
            error is raised, except that an `optional` instrument with nothing to measure is left
            out.
        check: called after the forward pass, before anything is said of an instrument, with what
            the pass left; with None if that cannot be told.

    Raises:
        ValueError: if two readings have the same key.
    """
    failed: set[int] = set()
    early: list[tuple[int, Exception]] = []
    """Errors before the check: if the shadow is not the model, they are due to that."""
    unchecked = check is not None

    def fail(i: int, error: Exception) -> None:
        failed.add(i)
        if unchecked:
            early.append((i, error))
        elif i == len(instruments):
            return
        elif on_error is not None:
            on_error(instruments[i], error)
        elif not (isinstance(error, ValueError) and getattr(instruments[i], "optional", False)):
            raise error

    taps: list[Taps] = []
    for i, instrument in enumerate(instruments):
        try:
            taps.append(instrument.taps(shadow, batch))
        except Exception as error:
            taps.append({})
            fail(i, error)
    left = _Left(shadow)
    try:
        taken = shadow.run(batch, [*taps, left.taps] if check else taps, on_error=fail)
    except Exception:
        if check is not None:
            check(None)  # which says it better, if the shadow does not run
        raise
    if check is not None:
        check(left.ran)
        unchecked = False
        for i, error in early:
            fail(i, error)
    taken = _move_to_cpu(taken[: len(instruments)])
    readings: list[Reading] = []
    seen: set[str] = set()
    for i, (instrument, got) in enumerate(zip(instruments, taken, strict=True)):
        if i in failed:
            continue
        try:
            description = described(instrument)
            fresh = [r.described(description) for r in instrument.read(got, shadow, batch)]
            keys = [reading.key for reading in fresh]
            if other := [key for key in keys if not key.startswith(f"{instrument.name}/")]:
                raise ValueError(
                    f"The reading {other[0]!r} is not named after its instrument: its key must "
                    f"begin with '{instrument.name}/'."
                )
            if twice := [key for n, key in enumerate(keys) if key in seen or key in keys[:n]]:
                raise ValueError(
                    f"Two readings have the key {twice[0]!r}; give the instruments or their "
                    f"measures different names."
                )
        except Exception as error:
            fail(i, error)
            continue
        seen.update(keys)
        readings += fresh
    return readings


class _Left:
    """What a forward pass leaves, to compare the shadow with the model."""

    def __init__(self, shadow: Shadow) -> None:
        last = f"blocks.{shadow.n_layers - 1}.hook_resid_post"
        self._found: dict[str, Tensor] = {}
        self.taps: dict[str, Reduce] = {
            name: partial(self._keep, name) for name in (last, LAST_LOGITS)
        }

    def _keep(self, name: str, value: Tensor) -> tuple[Tensor, ...]:
        self._found[name] = value
        return ()

    @property
    def ran(self) -> Ran | None:
        """None if the last layer's residual stream has no hook point."""
        return Ran(*(self._found[name] for name in self.taps)) if len(self._found) == 2 else None


def _move_to_cpu(taken: Sequence[dict[str, Taken]]) -> list[dict[str, Taken]]:
    """Moves all tensors to the CPU, and converts floating point to float32."""
    flat = [t for got in taken for value in got.values() for t in as_tuple(value)]
    moved = iter([t.float() if t.is_floating_point() else t for t in _to_cpu(flat)])
    return [
        {
            name: tuple(next(moved) for _ in value) if isinstance(value, tuple) else next(moved)
            for name, value in got.items()
        }
        for got in taken
    ]


def _to_cpu(tensors: list[Tensor]) -> list[Tensor]:
    """Copies tensors from a GPU to the CPU through pinned memory, and waits for the device once.

    The small tensors of one dtype are joined and copied together. A large tensor is copied alone:
    to join it with others would take its size a second time on the device.
    """
    moved: list[Tensor] = [t.cpu() if t.device.type != "cuda" else t for t in tensors]
    far = [i for i, t in enumerate(moved) if t.device.type == "cuda"]
    small = [i for i in far if moved[i].numel() <= _MOST_JOINED]
    for dtype in {moved[i].dtype for i in small}:
        which = [i for i in small if moved[i].dtype == dtype]
        line = _pinned(torch.cat([moved[i].flatten() for i in which]))
        sizes = [moved[i].numel() for i in which]
        for i, part in zip(which, line.split(sizes), strict=True):
            moved[i] = part.view(moved[i].shape)
    for i in set(far).difference(small):
        moved[i] = _pinned(moved[i])
    if far:
        torch.cuda.current_stream(tensors[far[0]].device).synchronize()
    return moved


def _pinned(tensor: Tensor) -> Tensor:
    """Starts a copy to pinned memory; its values are valid once the stream has been waited for."""
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
