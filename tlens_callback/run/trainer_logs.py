"""What the trainer itself logs (loss, rewards, evaluations), as readings beside the others."""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlens_callback.meaning import Description, Meaning
from tlens_callback.reading import Reading

SUMMARY = "total_flos"
"""Is logged by the trainer once, with what it says of the whole run."""

_DESCRIPTION = Description(title="Training", group="Training", others=Meaning(of_run=True))


class TrainerLogs:
    """The numbers of a trainer's log, each once.

    Keys:
        trainer/<name>: [update], as logged; the values since the observation before, of one step
            the last; the steps are the labels. NaN and infinity stay what they are, text is left
            out, and so is the summary at the end.

    Attributes:
        baseline: as an instrument's: how much of the log earlier observations had.
    """

    name = "trainer"

    def __init__(self) -> None:
        self.baseline: dict[str, Tensor] = {}
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._taken = 0
        self._before = -1, 0
        self._keys: dict[str, str] = {}

    def start(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Goes on from what `baseline` says.

        Args:
            rows: grows as the trainer logs: `TrainerState.log_history`.
            step: where the run begins; without a baseline, a later one than 0 begins with what is
                logged next.
        """
        self._rows, self._before = rows, (-1, 0)
        unknown = len(rows) if step else 0
        self._taken = min(int(self.baseline.get("taken", unknown)), len(rows))

    def take(self, step: int) -> list[Reading]:
        """The readings of the observation at `step`."""
        if self._before[0] != step:
            self._before = step, self._taken
        rows, self._taken = self._rows[self._taken :], len(self._rows)
        series: dict[str, dict[int, float]] = {}
        for row in rows:
            for name, value in row.items():
                number = None if SUMMARY in row or name == "step" else _number(value)
                if number is not None:
                    series.setdefault(str(name), {})[int(row.get("step", step))] = number
        # What float32 cannot hold is infinite.
        with np.errstate(over="ignore"):
            return [
                Reading(
                    key=self._key(name),
                    values=np.array(list(by_step.values())),
                    axes=("update",),
                    unit="as logged",
                    labels={"update": [str(at) for at in by_step]},
                    description=_DESCRIPTION,
                )
                for name, by_step in series.items()
            ]

    def remember(self, step: int) -> None:
        """Sets `baseline` for a checkpoint of `step`: a resumed run observes that step anew, and
        the store writes it anew, with what was logged before it."""
        taken = self._before[1] if self._before[0] == step else self._taken
        self.baseline["taken"] = torch.tensor(taken)

    def _key(self, name: str) -> str:
        """One that no other name has; the name itself, but where no key can be made of it."""
        if name not in self._keys:
            text = name.encode("utf-8", "backslashreplace").decode()
            parts = [part or "_" for part in text.split("/")]
            key = base = f"{self.name}/{'/'.join(parts)}"
            number = 2
            while key in self._keys.values():
                key, number = f"{base}_{number}", number + 1
            self._keys[name] = key
        return self._keys[name]


def _number(value: Any) -> float | None:
    alone = isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    if isinstance(value, bool) or not (alone or isinstance(value, Real)):
        return None
    try:
        return float(value)
    except (OverflowError, RuntimeError, TypeError, ValueError):
        return None  # a whole number of 309 digits, a text or a complex number as an array
