"""Chooses which attention patterns to keep when all of them would not fit in the page."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tlens_callback.page.encode import Part, Track, code, code_lower
from tlens_callback.page.heads import (
    HEAD_AXES,
    Head,
    Scores,
    heads_of,
    interleave,
    is_score,
    keep_largest,
)
from tlens_callback.reading import TOKEN_AXES, split_key
from tlens_callback.store.triangle import is_pattern

if TYPE_CHECKING:
    from tlens_callback.store.store import Store

_FEW_STEPS, _FEW_HEADS = 20, 8
"""Fewer steps or heads than these are kept only if both numbers are down to them already."""

_BULKY_SIZE = 4_000
_TRIALS, _COMPARED_STEPS = 8, 8


def is_bulky(axes: Sequence[str], shape: Sequence[int]) -> bool:
    """Whether a reading may be left out at some steps: patterns, texts of rollouts and what was
    measured at their tokens, and readings of more than 4,000 numbers.

    A matrix of heads stays at every step, however many heads there are: its curves are what a long
    run is watched for.
    """
    if tuple(axes) == HEAD_AXES:
        return False
    return is_pattern(axes) or _is_of_rollouts(axes) or math.prod(shape) > _BULKY_SIZE


def _is_of_rollouts(axes: Sequence[str]) -> bool:
    """Whether a reading has a text or a number for each token of rollouts or of their prompts.

    The texts take most of the room, and are others at every step: however few numbers they stand
    for, a long run has too many of them.
    """
    return len(axes) > 1 and axes[0] in ("rollout", "group") and axes[-1] in TOKEN_AXES


def _is_attention_of_rollouts(axes: Sequence[str]) -> bool:
    return _is_of_rollouts(axes) and "head" in axes


def evenly_spaced(steps: Sequence[int], most: int, wanted: Collection[int] = ()) -> list[int]:
    """Chooses at most `most` of the steps: the first, the last, and some evenly between.

    Each chosen step, except the first and the last, is replaced by a `wanted` step that is nearer
    to it than to the other chosen ones.
    """
    if most >= len(steps):
        return list(steps)
    chosen = [round(i * (len(steps) - 1) / max(most - 1, 1)) for i in range(most)]
    wanted = set(wanted)
    for at in (i for i, step in enumerate(steps) if step in wanted):
        # They stay in order, so that the nearest is one of two.
        after = min(bisect_left(chosen, at), most - 1)
        nearest = min(max(after - 1, 0), after, key=lambda i: abs(chosen[i] - at))
        if 0 < nearest < most - 1 and steps[chosen[nearest]] not in wanted:
            chosen[nearest] = at
    return sorted(steps[i] for i in set(chosen))


@dataclass
class KeptParts:
    """Holds what fits, a part by step and key, and a sentence for everything left out."""

    parts: dict[tuple[int, str], Part] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    size: float = 0.0


def thin(store: "Store", steps: Sequence[int], room: int) -> KeptParts:
    """Keeps as many of the bulky readings of these steps as fit in `room` bytes of the page.

    The attention of rollouts, the largest of their readings, takes what room the others leave, at
    steps that keep the texts.
    """
    others = _Bulky(store, steps, lambda axes: not _is_attention_of_rollouts(axes))
    kept = _fit(others, room)
    with_texts = {step for step, key in kept.parts if key in others.of_rollouts}
    among = with_texts if others.of_rollouts else None
    attention = _fit(_Bulky(store, steps, _is_attention_of_rollouts, among), int(room - kept.size))
    return KeptParts(
        kept.parts | attention.parts, [*kept.notes, *attention.notes], kept.size + attention.size
    )


def _fit(run: "_Bulky", room: int) -> KeptParts:
    if not run.count:
        return KeptParts()
    share, fits, fails = 1.0, 0.0, math.inf
    kept: KeptParts | None = None
    for _ in range(_TRIALS):
        plan = run.plan(share)
        if plan is None:
            break
        found, size = run.trial(*plan, room)
        if found is not None:
            kept, fits = KeptParts(found, run.notes(*plan), size), share
            goal = min(1.0, share * room / max(size, 1) * 0.95, (share + fails) / 2)
            if size > 0.8 * room or run.plan(goal) == plan:
                break
        else:
            fails = share
            # The first step takes more room than later ones, so this estimate is on the low side.
            goal = (fits + share) / 2 if kept else share * room / size * 0.95
        share = goal
    return kept or KeptParts(notes=run.notes(0, 0))


class _Bulky:
    """Knows the bulky readings of some steps of a store, and encodes a choice of them.

    Attributes:
        steps_of: key -> the steps that may be chosen.
        count: key -> at how many steps there is one.
        of_rollouts: the keys of readings of rollouts.

    Args:
        wanted: which readings it is about, by their axes.
        among: the steps that may be chosen; None: all.
    """

    def __init__(
        self,
        store: "Store",
        steps: Sequence[int],
        wanted: Callable[[Sequence[str]], bool],
        among: Collection[int] | None = None,
    ) -> None:
        self._store = store
        self.steps_of: dict[str, list[int]] = {}
        self.count: Counter[str] = Counter()
        self.of_rollouts: set[str] = set()
        self._weight: dict[str, int] = {}
        self._patterns: set[str] = set()
        self._with_heads = wanted is _is_attention_of_rollouts
        self._scores: dict[str, list[int]] = {}
        self._events: set[int] = set()
        heads: dict[Head, None] = {}
        for step in steps:
            for key, about in store.about(step).items():
                axes, shape = about["axes"], about["shape"]
                if about["unit"] == "event":
                    self._events.add(step)
                if is_score(axes, about["unit"]) and not key.endswith("_spread"):
                    self._scores.setdefault(key, []).append(step)
                if not (is_bulky(axes, shape) and wanted(axes)):
                    continue
                self.count[key] += 1
                if among is None or step in among:
                    self.steps_of.setdefault(key, []).append(step)
                self._weight[key] = math.prod(shape)
                if _is_of_rollouts(axes):
                    self.of_rollouts.add(key)
                if is_pattern(axes):
                    self._patterns.add(key)
                    heads.update(dict.fromkeys(_heads(about)))
        self._most = max(map(len, self.steps_of.values()), default=0)
        self._heads = list(heads)
        self._order: list[Head] | None = None
        self._ranked_by: list[str] = []

    def plan(self, share: float) -> tuple[int, int] | None:
        """Returns numbers of steps and of heads that keep about this share of everything.

        Steps are left out first, down to 20, then heads, down to 8, then steps, then heads. Returns
        None if nothing is left.
        """
        steps, heads = self._most, max(len(self._heads), 1)
        amount = share * steps * heads + 1e-6
        few_steps, few_heads, two = min(steps, _FEW_STEPS), min(heads, _FEW_HEADS), min(steps, 2)
        if amount >= few_steps * heads:
            return int(amount / heads), heads
        if amount >= few_steps * few_heads:
            return few_steps, int(amount / few_steps)
        if amount >= two * few_heads:
            return int(amount / few_heads), few_heads
        return (two, int(amount / two)) if amount >= two else None

    def trial(
        self, n_steps: int, n_heads: int, room: int
    ) -> tuple[dict[tuple[int, str], Part] | None, float]:
        """Returns the parts of so many steps and heads, and how many bytes they take; None and an
        estimate if that is more than `room`."""
        chosen = self._choose(n_steps)
        heads = None if n_heads >= len(self._heads) else set(self._ranked()[:n_heads])
        total = sum(self._weight[key] * len(steps) for key, steps in chosen.items())
        parts: dict[tuple[int, str], Part] = {}
        track, size, done = Track(), 0.0, 0
        keys_of: dict[int, set[str]] = {}
        for key, steps in chosen.items():
            for step in steps:
                keys_of.setdefault(step, set()).add(key)
        for step, keys in sorted(keys_of.items()):
            for key, about, lower in self._store.stored(step, keys):
                select = None
                if heads is not None and key in self._patterns and (at := _heads(about)):
                    select = [i for i, head in enumerate(at) if head in heads]
                if lower is None:
                    coded = code(self._store.reading(key, step), select)
                else:
                    coded = code_lower(key, about, lower, select)
                part = parts[step, key] = track.part(coded)
                size += part.size
                done += self._weight[key]
                if size > room:
                    return None, size * total / done
        return parts, size

    def notes(self, n_steps: int, n_heads: int) -> list[str]:
        """Returns a sentence for everything that is left out with so many steps and heads."""
        groups: dict[tuple[str, int, int], list[str]] = {}
        chosen = self._choose(n_steps)
        for key, count in self.count.items():
            what = (
                "Attention patterns"
                if key in self._patterns
                else "Attention weights of rollouts"
                if key in self.of_rollouts and self._with_heads
                else "Texts of rollouts and what was measured at their tokens"
                if key in self.of_rollouts
                else "Readings of more than 4,000 numbers"
            )
            groups.setdefault((what, len(chosen.get(key, ())), count), []).append(key)
        notes = []
        for (what, here, steps), keys in groups.items():
            what = f"{what} ({names_of(keys)})"
            if not here:
                notes.append(f"{what} are not in this page: there is no room for them.")
            elif here < steps:
                notes.append(
                    f"{what} are in this page at {here} of {steps} steps: the first, the last and "
                    f"some evenly between, or a step near by that has an event."
                )
        if 0 < n_heads < len(self._heads):
            which = (
                f"those with the highest {', '.join(self._ranked_by)}, one of each in turn"
                if self._ranked_by
                else "the first ones, since no measured score ranks them"
            )
            notes.append(
                f"Attention patterns in this page are of {n_heads} of {len(self._heads)} heads: "
                f"{which}."
            )
        return notes

    def _choose(self, n_steps: int) -> dict[str, list[int]]:
        """Returns key -> its steps that are kept: the same share of each key, but at least two.

        All readings of rollouts are kept at the same steps, for a text without its numbers, or the
        numbers of other texts, say nothing.
        """
        if not n_steps:
            return {key: [] for key in self.steps_of}

        def share(steps: Sequence[int]) -> list[int]:
            most = max(2, round(len(steps) * n_steps / self._most))
            return evenly_spaced(steps, most, self._events)

        of_rollouts = {step for key in self.of_rollouts for step in self.steps_of.get(key, ())}
        together = set(share(sorted(of_rollouts)))
        return {
            key: [step for step in steps if step in together]
            if key in self.of_rollouts
            else share(steps)
            for key, steps in self.steps_of.items()
        }

    def _ranked(self) -> list[Head]:
        """Returns all heads, those with the largest changes and scores first."""
        if self._order is None:
            rankings: dict[str, Scores] = {"change of the pattern since its first step": {}}
            (change,) = rankings.values()
            for key in self._patterns:
                self._take_changes(key, change)
            for key, steps in self._scores.items():
                scores = rankings[key] = {}
                for step in steps:
                    keep_largest(scores, self._store.reading(key, step))
            telling = {name: of for name, of in rankings.items() if len(set(of.values())) > 1}
            self._ranked_by = list(telling)
            heads = set(self._heads)
            order = dict.fromkeys([*interleave(telling.values()), *self._heads])
            self._order = [head for head in order if head in heads]
        return self._order

    def _take_changes(self, key: str, into: Scores) -> None:
        """Raises each head's entry of `into` to the largest mean absolute difference of its pattern
        to its first one, over a few steps."""
        first = None
        for step in evenly_spaced(self.steps_of[key], _COMPARED_STEPS + 1):
            reading = self._store.reading(key, step)
            at = heads_of(reading.axes, reading.values.shape, reading.labels)
            if not at:
                return
            values = reading.values.reshape(len(at), -1)
            if first is None:
                first = values
            if first.shape != values.shape:
                continue
            for head, value in zip(at, np.abs(values - first).mean(-1).tolist(), strict=True):
                into[head] = max(into.get(head, 0.0), value)


def names_of(keys: Collection[str], most: int = 4) -> str:
    """Lists the instruments and measures of keys, the first few by name."""
    names = list(dict.fromkeys("/".join(split_key(key)[:2]) for key in keys))
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _heads(about: Mapping[str, Any]) -> list[Head]:
    return heads_of(about["axes"], about["shape"], about["labels"])
