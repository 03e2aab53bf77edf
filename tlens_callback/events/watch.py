"""`Watch`: says when something happens. Reads what the instruments read; runs no model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tlens_callback.events.rules import HISTORY, Rule, entry
from tlens_callback.meaning import Description, Meaning, Quantity, described
from tlens_callback.reading import Reading

Event = tuple[float, str]
"""The number that it is about, and a sentence."""

_SAID = 8
"""So many heads or entries are named in one sentence."""

_LONG_AGO = -(2**62)


def lowest_over_blocks(reading: Reading) -> np.ndarray:
    """[layer, head], a head's lowest score over the block lengths, where there are several."""
    return reading.values.min(0) if reading.axes[0] == "block" else reading.values


@dataclass(frozen=True)
class Watch:
    """Follows roles of heads, rules and guards, and raises an event when one of them changes.

    - Roles: a reading of `Quantity.HEAD_ROLE` scores each head in a role; over several block
      lengths, by its lowest score (a positional copy scores high at one length only). Of the
      package's own these are the roles previous, duplicate and induction of `HeadScores`. A head
      takes a role when its score reaches `takes`, and loses
      it when it falls below `loses`, if that is `moves` above the lowest, or below the highest,
      since it last changed; both are events, and what a head is at the first observation is none.
    - Entropy collapse: a layer's mean of `Quantity.HEAD_ENTROPY` over its heads falls below
      `collapse` times that of the first observation.
    - Features: one of `Quantity.FEATURE_FREQUENCY` begins to fire, on a share `fires` of the
      tokens, or falls silent.
    - Alarms: a number with a `Meaning.alarm` is above 0; of the package's own, the number of frozen
      base weights that have changed.
    - Fidelity is breached: the observer says so, and watching ends.
    - `rules`, for whatever else is read.

    An event is a reading as others are, is printed once, and becomes an alert in W&B. What several
    heads do at one observation is one event. The same event about the same head or entry is raised
    at most once in `cooldown` observations; a head or feature that is then still another than was
    said last is told of then. A score that is not a number changes nothing.

    Args:
        rules: further numbers to follow, of any instrument, or `fidelity/...` and `cost/...`.
        heads: follow only these heads, as (layer, head). None: all of them.
        pinned: without `heads`, this many heads of highest score in each role at the first
            observation have curves of their own; with `heads`, each of these.
        takes, loses: scores at which a head takes and loses a role.
        moves: least change of a score, or of a feature's frequency, that is one.
        collapse: share of a layer's first mean entropy.
        fires: share of the tokens.
        cooldown: observations.
        scores: name of the instrument whose roles and entropy are followed; None: the first that
            scores heads in a role.

    Keys:
        watch/count: [], count, 0..inf; events at this observation
        watch/events: [event], event, -inf..inf; the number that each is about, the sentences as
            texts; only where there are events
        watch/<role>_L<layer>H<head>: [], probability, 0..1; score in the role, of pinned heads

    Source:
        Olsson et al. 2022 (roles); Zhai et al. 2023 (entropy collapse).

    Raises:
        ValueError: for thresholds out of order.
    """

    description: ClassVar[Description] = Description(
        title="Events",
        group="Events",
        measures={
            "count": Meaning(title="Events", axes=(), headline=True, of_run=True),
            "events": Meaning(title="What happened", axes=("event",), headline=True, of_run=True),
        },
        others=Meaning(title="Heads that are followed", axes=(), headline=True, of_run=True),
    )

    rules: Sequence[Rule] = ()
    heads: Sequence[tuple[int, int]] | None = None
    pinned: int = 1
    takes: float = 0.3
    loses: float = 0.15
    moves: float = 0.05
    collapse: float = 0.25
    fires: float = 0.1
    cooldown: int = 10
    scores: str | None = None
    name: str = "watch"
    baseline: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.loses <= self.takes:
            raise ValueError(
                f"A head loses a role below the score at which it takes one: 0 < loses <= takes, "
                f"got loses={self.loses}, takes={self.takes}."
            )
        if not self.moves >= 0:
            raise ValueError(f"moves is 0 or more, got {self.moves}.")
        if not 0 <= self.collapse < 1:
            raise ValueError(f"collapse is a share of 1, got {self.collapse}.")
        if not 0 < self.fires <= 1:
            raise ValueError(f"fires is a share of the tokens, got {self.fires}.")
        if self.cooldown < 0 or self.pinned < 0:
            raise ValueError("cooldown and pinned are 0 or more.")
        if wrong := [rule for rule in self.rules if not isinstance(rule, Rule)]:
            raise ValueError(f"rules are Rule objects, got {wrong[0]!r}.")
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple((int(i), int(j)) for i, j in self.heads))

    def look(self, readings: Iterable[Reading]) -> list[Reading]:
        """The readings of the watch, from those of one observation, in order of time.

        Raises:
            ValueError: for a head, scores or a rule's key that are not there, and never were.
        """
        by_key = {reading.key: reading for reading in readings}
        now = int(self.baseline["looks"]) + 1 if "looks" in self.baseline else 0
        self.baseline["looks"] = torch.tensor(now)
        found: list[Event] = []
        curves: list[Reading] = []
        followed = self._scores(by_key.values())
        for reading in followed:
            if reading.meaning.quantity is Quantity.HEAD_ROLE:
                score, role = lowest_over_blocks(reading), reading.meaning.role
                layers = reading.labels.get("layer") or [str(i) for i in range(len(score))]
                found += self._role(role, score, layers)
                curves += self._curves(role, score, layers)
        for reading in followed:
            if reading.meaning.quantity is Quantity.HEAD_ENTROPY:
                found += self._entropy(reading)
        found += self._alarms(by_key.values())
        found += self._features(by_key.values())
        for rule in self.rules:
            if rule.key in by_key:
                found += self._follow(rule, by_key[rule.key])
            elif f"past {rule}" not in self.baseline:
                near = get_close_matches(rule.key, by_key, cutoff=0.3)
                raise ValueError(f"Watch: nothing reads {rule.key!r}; the nearest are {near}.")
        return [r.described(described(self)) for r in [*curves, *self._events(found)]]

    def breach(self, error: Exception) -> list[Reading]:
        """The event of a shadow that is not the live model any more."""
        return [r.described(described(self)) for r in self._events([(float("nan"), str(error))])]

    def _events(self, events: Sequence[Event]) -> list[Reading]:
        count = Reading(key=f"{self.name}/count", values=np.asarray(len(events)), unit="count")
        if not events:
            return [count]
        about = Reading(
            key=f"{self.name}/events",
            values=np.array([value for value, _ in events]),
            axes=("event",),
            unit="event",
            texts=np.array([sentence for _, sentence in events]),
        )
        return [count, about]

    def _scores(self, readings: Iterable[Reading]) -> list[Reading]:
        """The readings of the instrument that is followed; none where none scores heads in a role,
        and none was asked for."""
        readings = list(readings)
        roles = [r for r in readings if r.meaning.quantity is Quantity.HEAD_ROLE]
        there = list(dict.fromkeys(reading.instrument for reading in roles))
        asked = self.scores is not None or self.heads is not None
        known = there if self.scores is None else [name for name in there if name == self.scores]
        if asked and not known and not any(key.endswith(" head held") for key in self.baseline):
            raise ValueError(
                f"Watch follows heads, and no instrument{f' {self.scores!r}' * bool(self.scores)} "
                f"scores them in a role, as HeadScores does; there are {there}."
            )
        return [reading for reading in readings if reading.instrument in known[:1]]

    def _fresh(self, about: str, where: np.ndarray) -> np.ndarray:
        """Which of these were not raised a short while ago; from now on they were."""
        now, raised = int(self.baseline["looks"]), self._old(f"{about} raised")
        if raised is None or raised.shape != where.shape:
            raised = np.full(where.shape, _LONG_AGO)
        fresh = where & (now - raised > self.cooldown)
        if fresh.any():
            self._keep(f"{about} raised", np.where(fresh, now, raised))
        return fresh

    def _role(self, role: str, score: np.ndarray, layers: Sequence[str]) -> Iterator[Event]:
        """From scores [layer, head]: heads that take the role, and those that lose it."""
        names = np.array([[f"L{i}H{j}" for j in range(score.shape[1])] for i in layers])
        at = np.where(np.isfinite(score), score, -np.inf).argmax()
        best = f"; best is {names.flat[at]} {score.flat[at]:.2f}"
        yield from self._holders(
            f"{role} head",
            (score, self.takes, self.loses),
            names,
            self._followed(score.shape, layers),
            (f"new {role} head", f"no {role} head any more"),
            best,
        )

    def _features(self, readings: Iterable[Reading]) -> Iterator[Event]:
        """Features of sparse autoencoders that begin to fire, and those that fall silent."""
        for reading in readings:
            if reading.meaning.quantity is Quantity.FEATURE_FREQUENCY:
                often, key = reading.values, f"{reading.instrument} features"
                names = reading.labels.get("feature") or [str(i) for i in range(len(often))]
                shown = np.frombuffer("\n".join(names).encode(), np.uint8)
                if not np.array_equal(self.baseline.get(f"{key} names", ()), shown):
                    for of_others in [name for name in self.baseline if name.startswith(f"{key} ")]:
                        del self.baseline[of_others]
                    self._keep(f"{key} names", shown)
                yield from self._holders(
                    key,
                    (often, self.fires, float(np.finfo(np.float32).tiny)),
                    np.array(names),
                    np.full(often.shape, True),
                    (f"{reading.instrument}: new feature", f"{reading.instrument}: silent feature"),
                )

    def _holders(
        self,
        key: str,
        measured: tuple[np.ndarray, float, float],
        names: np.ndarray,
        followed: np.ndarray,
        said: tuple[str, str],
        end: str = "",
    ) -> Iterator[Event]:
        """Who takes something, and who loses it.

        Args:
            key: in the baseline.
            measured: the values, from which on one has it, and below which one has lost it.
            names, followed: of the values' shape.
            said: what is said of the former, and of the latter; `end` is added to that.
        """
        values, takes, loses = measured
        held, since = self._old(f"{key} held"), self._old(f"{key} since")
        if held is None or since is None:
            held, since = values >= takes, values
        else:
            since = np.where(np.isfinite(since), since, values)
            changes = (
                (said[0], ~held & (values >= takes) & (values - since >= self.moves), ""),
                (said[1], held & (values < loses) & (since - values >= self.moves), end),
            )
            for what, changed, tail in changes:
                fresh = self._fresh(f"{key} {what}", followed & changed)
                if fresh.any():
                    parts = [
                        f"{names[at]} ({since[at]:.2f} -> {values[at]:.2f})"
                        for at in map(tuple, np.argwhere(fresh)[:_SAID])
                    ]
                    yield float(values[fresh].max()), f"{what}: {_some(parts, fresh)}{tail}"
                # Who waits for the cool-down has not changed yet.
                done = fresh | (changed & ~followed)
                held, since = held ^ done, np.where(done, values, since)
            since = np.where(held, np.fmax(since, values), np.fmin(since, values))
        self._keep(f"{key} held", held)
        self._keep(f"{key} since", since)

    def _followed(self, shape: tuple[int, ...], layers: Sequence[str]) -> np.ndarray:
        """[layer, head], which heads can be the subject of an event."""
        followed = np.full(shape, self.heads is None)
        for layer, head in self.heads or ():
            if str(layer) not in layers or not 0 <= head < shape[1]:
                raise ValueError(
                    f"Watch: there is no head {(layer, head)} among the scores; they have "
                    f"{shape[1]} heads in each of the layers {', '.join(layers)}."
                )
            followed[list(layers).index(str(layer)), head] = True
        return followed

    def _curves(self, role: str, score: np.ndarray, layers: Sequence[str]) -> Iterator[Reading]:
        pins = self._old(f"{role} pins")
        if self.heads is not None:
            pins = np.flatnonzero(self._followed(score.shape, layers))
        elif pins is None:
            pins = np.argsort(-score, axis=None, kind="stable")[: self.pinned]
            self._keep(f"{role} pins", pins)
        for at in zip(*np.unravel_index(pins, score.shape), strict=True):
            yield Reading(
                key=f"{self.name}/{role}_L{layers[at[0]]}H{at[1]}",
                values=score[at],
                unit="probability",
                limits=(0.0, 1.0),
            )

    def _entropy(self, reading: Reading) -> Iterator[Event]:
        mean = reading.values.mean(1)
        first = self._old("entropy first")
        if first is None:
            self._keep("entropy first", mean)
            return
        names = reading.labels.get("layer") or [str(i) for i in range(len(mean))]
        low, were = mean < self.collapse * first, self._old("entropy low")
        new = low if were is None else low & ~were
        for i in np.flatnonzero(self._fresh("entropy", new)).tolist():
            said = f"attention entropy of layer {names[i]} collapsed: {first[i]:.2f} at first,"
            yield float(mean[i]), f"{said} now {mean[i]:.2f} (1 is uniform attention)"
        self._keep("entropy low", low)

    def _alarms(self, readings: Iterable[Reading]) -> Iterator[Event]:
        for reading in readings:
            alarm = reading.meaning.alarm
            if alarm and not reading.axes and self._fresh(reading.key, reading.values > 0):
                yield float(reading.values), f"{float(reading.values):g} {alarm}"

    def _follow(self, rule: Rule, reading: Reading) -> Iterator[Event]:
        past, new = self._old(f"past {rule}"), reading.values
        if past is None or past.shape[1:] != new.shape:
            past = np.empty((0, *new.shape))
        for what, where in rule.crossed(past, new).items():
            fresh = self._fresh(f"{rule.key} {what}", where)
            if fresh.any():
                first, *rest = map(tuple, np.argwhere(fresh)[:_SAID])
                parts = [
                    f"{entry(reading, at)}({past[-1][at]:.4g} -> {new[at]:.4g})"
                    for at in (first, *rest)
                ]
                said = f"{reading.key} {what}: {_some(parts, fresh)}, {reading.unit}"
                yield float(new[first]), said
        self._keep(f"past {rule}", np.concatenate([past, new[None]])[-HISTORY:])

    def _old(self, key: str) -> np.ndarray | None:
        return self.baseline[key].cpu().numpy() if key in self.baseline else None

    def _keep(self, key: str, values: np.ndarray) -> None:
        self.baseline[key] = torch.from_numpy(np.array(values))


def _some(parts: Sequence[str], of: np.ndarray) -> str:
    """The first parts in a row, and how many more there are."""
    left = np.count_nonzero(of) - len(parts)
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")
