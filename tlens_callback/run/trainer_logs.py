"""`TrainerLogs`: turns what the trainer logs (loss, rewards, evaluations) into readings."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tlens_callback.meaning import Description, Meaning
from tlens_callback.reading import Reading

_SUMMARY = {"train_runtime", "total_flos"}
"""The trainer logs these names together once, in its summary of the whole run."""

_DESCRIPTION = Description(title="Training", group="Training", others=Meaning(of_run=True))


class TrainerLogs:
    """Turns each number of a trainer's log into one value of a reading.

    Keys:
        trainer/<name>: [update], as logged; the values since the previous observation, labelled by
            their steps; if a step logged several, the last one. A row that has no step belongs to
            the observation. NaN and infinity are kept; texts, rows that are no dict and the summary
            at the end of the run are left out.

    Attributes:
        baseline: as an instrument's: how many rows of the log earlier observations had.
    """

    name = "trainer"

    def __init__(self) -> None:
        self.baseline: dict[str, Tensor] = {}
        self._rows: Sequence[Mapping[str, Any]] = ()
        self._taken = 0
        self._before_last = -1, 0
        self._keys: dict[str, str] = {}

    def start(self, rows: Sequence[Mapping[str, Any]], *, step: int) -> None:
        """Starts at the row of the log that `baseline` names.

        Args:
            rows: the log, which grows as the trainer logs: `TrainerState.log_history`.
            step: the step where the run begins. If it is not 0 and there is no baseline, the rows
                logged so far are left out.
        """
        self._rows, self._before_last = rows, (-1, 0)
        unknown = len(rows) if step else 0
        self._taken = min(int(self.baseline.get("taken", unknown)), len(rows))

    def take(self, step: int) -> list[Reading]:
        """Returns the readings that belong to the observation at `step`."""
        if self._before_last[0] != step:
            self._before_last = step, self._taken
        rows, self._taken = self._rows[self._taken :], len(self._rows)
        series: dict[str, dict[int, float]] = {}
        for row in rows:
            # Other callbacks may put rows of their own into the trainer's log.
            if not isinstance(row, Mapping) or is_summary(row):
                continue
            at = _number(row.get("step"))
            label = int(at) if at is not None and math.isfinite(at) else step
            for name, value in row.items():
                if name != "step" and (number := _number(value)) is not None:
                    series.setdefault(str(name), {})[label] = number
        # A value too large for float32 becomes infinite.
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
        """Sets `baseline` for a checkpoint of `step`. A resumed run observes that step again, so
        the rows logged before it are to be read again."""
        taken = self._before_last[1] if self._before_last[0] == step else self._taken
        self.baseline["taken"] = torch.tensor(taken)

    def _key(self, name: str) -> str:
        """Returns a key for a logged name: the name itself if it can be a key, else another one
        that no other name has."""
        if name not in self._keys:
            text = name.encode("utf-8", "backslashreplace").decode()
            parts = [part or "_" for part in text.split("/")]
            key = base = f"{self.name}/{'/'.join(parts)}"
            number = 2
            while key in self._keys.values():
                key, number = f"{base}_{number}", number + 1
            self._keys[name] = key
        return self._keys[name]


def known_later(logs: TrainerLogs, step: int, of_rollouts: Sequence[Reading]) -> list[Reading]:
    """Returns what belongs to an observation and is known after it. It is given no model, since the
    writer may keep what it is given until the end of the program."""
    return [*logs.take(step), *of_rollouts]


def is_summary(row: Mapping[Any, Any]) -> bool:
    """Whether this row of the trainer's log is its summary at the end of the run."""
    return _SUMMARY <= row.keys()


def _number(value: Any) -> float | None:
    alone = isinstance(value, np.ndarray | Tensor) and value.ndim == 0
    if isinstance(value, bool) or not (alone or isinstance(value, Real)):
        return None
    try:
        return float(value)
    except Exception:
        return None  # a whole number of 309 digits, a text or a complex number as an array
