"""`Watch`: finds events in what the instruments read. It runs no model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tlens_callback.demands import demand_numbers
from tlens_callback.events.roles import first_of_each, lowest_over_blocks, of_heads
from tlens_callback.events.rules import HISTORY, Rule, entry
from tlens_callback.meaning import Description, Meaning, Quantity, described
from tlens_callback.reading import Reading

Event = tuple[float, str]
"""The number that the event is about, and a sentence that says what happened."""

_MOST_NAMED = 8
"""At most this many heads or entries are named in one sentence."""

_LONG_AGO = -(2**62)


@dataclass(frozen=True)
class Watch:
    """Raises an event when a head changes its role, a rule is met or something goes wrong.

    - Roles: a reading of `Quantity.HEAD_ROLE` scores each head in a role, such as the roles
      previous, duplicate and induction of `HeadScores`. With several block lengths a head's lowest
      score counts (a positional copy scores high at one length only). A head takes a role when its
      score reaches `takes` and is at least `moves` above the lowest since its last change; it loses
      the role when its score falls below `loses` and is at least `moves` below the highest since
      then. Both are events. A role that a head has at the first observation is not an event.
    - Entropy collapse: a layer's mean of `Quantity.HEAD_ENTROPY` over its heads falls below
      `collapse` times its value at the first observation.
    - Features: a feature of a `Quantity.FEATURE_FREQUENCY` reading begins to fire on a share
      `fires` of the tokens, or falls silent.
    - Alarms: a number with a `Meaning.alarm` is above 0, such as the number of frozen base weights
      that have changed.
    - Fidelity: the shadow does not agree with the model any more. The observer reports it, and
      watching ends.
    - `rules`: any other number.

    An event is a reading like others. It is printed once and becomes an alert in W&B. The same
    change of several heads at one observation is one event. The same event about the same head or
    entry is raised at most once in `cooldown` observations; a change that is still there when they
    are over is raised then. A score that is NaN changes nothing.

    Args:
        rules: further numbers to follow, of any instrument, or `fidelity/...` and `cost/...`.
        heads: follow only these heads, as (layer, head). None: all heads.
        pinned: with `heads`, each of these heads has a curve of its own in each role. Without, this
            many heads have one: those with the highest score in the role at the first observation.
        takes, loses: scores at which a head takes and loses a role; for attention to the token
            before two thirds of them (`Meaning.sharpness`), since that role is seldom as sharp.
        moves: smaller changes of a score, or of a feature's frequency, are ignored.
        collapse: share of a layer's mean entropy at the first observation.
        fires: share of the tokens.
        cooldown: number of observations.
        scores: name of the instrument whose roles and entropy are followed. None: each role, and
            the entropy, of the first instrument that has it.

    Keys:
        watch/count: [], count, 0..inf; events at this observation
        watch/events: [event], event, -inf..inf; the number that each is about, the sentences as
            texts; only where there are events
        watch/<role>_L<layer>H<head>: [], probability, 0..1; score in the role, of pinned heads

    Source:
        Olsson et al. 2022 (roles); Zhai et al. 2023 (entropy collapse).

    Raises:
        ValueError: if a threshold is out of its range, or loses is more than takes.
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
        demand_numbers(self)
        if not 0 < self.loses <= self.takes:
            raise ValueError(
                f"loses must be above 0 and at most takes, got {self.loses} and {self.takes}."
            )
        if not self.moves >= 0:
            raise ValueError(f"moves must be 0 or more, got {self.moves}.")
        if not 0 <= self.collapse < 1:
            raise ValueError(f"collapse must be 0 or more and below 1, got {self.collapse}.")
        if not 0 < self.fires <= 1:
            raise ValueError(f"fires must be a share, above 0 and at most 1, got {self.fires}.")
        if self.cooldown < 0 or self.pinned < 0:
            raise ValueError("cooldown and pinned must be 0 or more.")
        if wrong := [rule for rule in self.rules if not isinstance(rule, Rule)]:
            raise ValueError(f"rules must be Rule objects, got {wrong[0]!r}.")
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.heads is not None:
            object.__setattr__(self, "heads", tuple((int(i), int(j)) for i, j in self.heads))

    def look(self, readings: Iterable[Reading]) -> list[Reading]:
        """Returns the watch's own readings for those of one observation; call it once for each
        observation, in order.

        Raises:
            ValueError: if the heads, the scores or the key of a rule have never been read.
        """
        by_key = {reading.key: reading for reading in readings}
        now = int(self.baseline["looks"]) + 1 if "looks" in self.baseline else 0
        self.baseline["looks"] = torch.tensor(now)
        found: list[Event] = []
        curves: list[Reading] = []
        followed = self._followed_readings(by_key.values())
        for reading in followed:
            if reading.meaning.quantity is Quantity.HEAD_ROLE:
                score, role = lowest_over_blocks(reading), reading.meaning.role
                layers = reading.labels.get("layer") or [str(i) for i in range(len(score))]
                found += self._role_events(reading.meaning, score, layers)
                curves += self._pinned(role, score, layers)
        for reading in followed:
            if reading.meaning.quantity is Quantity.HEAD_ENTROPY:
                found += self._entropy_events(reading)
        found += self._alarm_events(by_key.values())
        found += self._feature_events(by_key.values())
        for rule in self.rules:
            if rule.key in by_key:
                found += self._rule_events(rule, by_key[rule.key])
            elif f"past {rule}" not in self.baseline:
                near = get_close_matches(rule.key, by_key, cutoff=0.3)
                raise ValueError(f"Watch: no reading is {rule.key!r}; the nearest are {near}.")
        return [r.described(described(self)) for r in [*curves, *self._event_readings(found)]]

    def breach(self, error: Exception) -> list[Reading]:
        """Returns the event that the shadow does not agree with the live model any more."""
        events = self._event_readings([(float("nan"), str(error))])
        return [reading.described(described(self)) for reading in events]

    def _event_readings(self, events: Sequence[Event]) -> list[Reading]:
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

    def _followed_readings(self, readings: Iterable[Reading]) -> list[Reading]:
        """Returns the roles and the entropy to follow, each of the first instrument that has it."""
        there = of_heads(readings)
        wanted = [one for one in there if self.scores in (None, one.instrument)]
        asked = self.scores is not None or self.heads is not None
        if asked and not wanted and not any(key.endswith(" head held") for key in self.baseline):
            raise ValueError(
                f"Watch(heads=..., scores=...) needs an instrument that scores heads in a role, "
                f"such as HeadScores(). Asked for: {self.scores or 'any'}; there are: "
                f"{', '.join(dict.fromkeys(r.instrument for r in there)) or 'none'}."
            )
        return first_of_each(wanted)

    def _allowed(self, about: str, where: np.ndarray) -> np.ndarray:
        """Returns which of these events are not in a cooldown, and starts the cooldown of those."""
        now, raised = int(self.baseline["looks"]), self._old(f"{about} raised")
        if raised is None or raised.shape != where.shape:
            raised = np.full(where.shape, _LONG_AGO)
        fresh = where & (now - raised > self.cooldown)
        if fresh.any():
            self._store(f"{about} raised", np.where(fresh, now, raised))
        return fresh

    def _role_events(
        self, meaning: Meaning, score: np.ndarray, layers: Sequence[str]
    ) -> Iterator[Event]:
        """Yields the events of heads that take or lose a role, from scores [layer, head]."""
        names = np.array([[f"L{i}H{j}" for j in range(score.shape[1])] for i in layers])
        at = np.where(np.isfinite(score), score, -np.inf).argmax()
        best = f"; best is {names.flat[at]} {score.flat[at]:.2f}"
        head = f"{meaning.role} head"
        seen = f", seen in {meaning.seen_in}" if meaning.seen_in else ""
        yield from self._crossings(
            head,
            (score, self.takes * meaning.sharpness, self.loses * meaning.sharpness),
            names,
            self._followed_heads(score.shape, layers),
            (f"new {head}{seen}", f"no {head} any more"),
            best,
        )

    def _feature_events(self, readings: Iterable[Reading]) -> Iterator[Event]:
        """Yields the events of autoencoder features that begin to fire or fall silent."""
        seen: set[str] = set()
        for reading in readings:
            frequency = reading.meaning.quantity is Quantity.FEATURE_FREQUENCY
            if frequency and reading.axes == ("feature",) and reading.instrument not in seen:
                seen.add(reading.instrument)
                often, key = reading.values, f"{reading.instrument} features"
                names = reading.labels.get("feature") or [str(i) for i in range(len(often))]
                shown = np.frombuffer("\n".join(names).encode(), np.uint8)
                if not np.array_equal(self.baseline.get(f"{key} names", ()), shown):
                    for of_others in [name for name in self.baseline if name.startswith(f"{key} ")]:
                        del self.baseline[of_others]
                    self._store(f"{key} names", shown)
                yield from self._crossings(
                    key,
                    (often, self.fires, float(np.finfo(np.float32).tiny)),
                    np.array(names),
                    np.full(often.shape, True),
                    (f"{reading.instrument}: new feature", f"{reading.instrument}: silent feature"),
                )

    def _crossings(
        self,
        key: str,
        measured: tuple[np.ndarray, float, float],
        names: np.ndarray,
        followed: np.ndarray,
        said: tuple[str, str],
        end: str = "",
    ) -> Iterator[Event]:
        """Yields the events of heads or features whose value crosses one of two thresholds.

        Args:
            key: what the keys of the stored state begin with.
            measured: the values; the threshold to reach upwards; the threshold to fall below.
            names, followed: the name of each entry, and whether it is followed; in the shape of the
                values.
            said: the sentence's beginning for entries that rise, and for entries that fall.
            end: the end of the sentence for entries that fall.
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
                fresh = self._allowed(f"{key} {what}", followed & changed)
                if fresh.any():
                    parts = [
                        f"{names[at]} ({since[at]:.2f} -> {values[at]:.2f})"
                        for at in map(tuple, np.argwhere(fresh)[:_MOST_NAMED])
                    ]
                    yield float(values[fresh].max()), f"{what}: {_join_some(parts, fresh)}{tail}"
                # An entry inside its cooldown counts as not changed yet.
                done = fresh | (changed & ~followed)
                held, since = held ^ done, np.where(done, values, since)
            since = np.where(held, np.fmax(since, values), np.fmin(since, values))
        self._store(f"{key} held", held)
        self._store(f"{key} since", since)

    def _followed_heads(self, shape: tuple[int, ...], layers: Sequence[str]) -> np.ndarray:
        """Returns [layer, head]: which heads are followed."""
        followed = np.full(shape, self.heads is None)
        for layer, head in self.heads or ():
            if str(layer) not in layers or not 0 <= head < shape[1]:
                raise ValueError(
                    f"Watch: the scores have no head {(layer, head)}; they have {shape[1]} heads "
                    f"in each of the layers {', '.join(layers)}."
                )
            followed[list(layers).index(str(layer)), head] = True
        return followed

    def _pinned(self, role: str, score: np.ndarray, layers: Sequence[str]) -> Iterator[Reading]:
        pins = self._old(f"{role} pins")
        if self.heads is not None:
            pins = np.flatnonzero(self._followed_heads(score.shape, layers))
        elif pins is None:
            pins = np.argsort(-score, axis=None, kind="stable")[: self.pinned]
            self._store(f"{role} pins", pins)
        for at in zip(*np.unravel_index(pins, score.shape), strict=True):
            yield Reading(
                key=f"{self.name}/{role}_L{layers[at[0]]}H{at[1]}",
                values=score[at],
                unit="probability",
                limits=(0.0, 1.0),
            )

    def _entropy_events(self, reading: Reading) -> Iterator[Event]:
        mean = reading.values.mean(1)
        first = self._old("entropy first")
        if first is None:
            self._store("entropy first", mean)
            return
        names = reading.labels.get("layer") or [str(i) for i in range(len(mean))]
        low, were = mean < self.collapse * first, self._old("entropy low")
        new = low if were is None else low & ~were
        for i in np.flatnonzero(self._allowed("entropy", new)).tolist():
            said = f"attention entropy of layer {names[i]} collapsed: {first[i]:.2f} at first,"
            yield float(mean[i]), f"{said} now {mean[i]:.2f} (1 is uniform attention)"
        self._store("entropy low", low)

    def _alarm_events(self, readings: Iterable[Reading]) -> Iterator[Event]:
        for reading in readings:
            alarm = reading.meaning.alarm
            if alarm and not reading.axes and self._allowed(reading.key, reading.values > 0):
                yield float(reading.values), f"{float(reading.values):g} {alarm}"

    def _rule_events(self, rule: Rule, reading: Reading) -> Iterator[Event]:
        past, new = self._old(f"past {rule}"), reading.values
        if past is None or past.shape[1:] != new.shape:
            past = np.empty((0, *new.shape))
        for what, where in rule.crossed(past, new).items():
            fresh = self._allowed(f"{rule.key} {what}", where)
            if fresh.any():
                first, *rest = map(tuple, np.argwhere(fresh)[:_MOST_NAMED])
                parts = [
                    f"{entry(reading, at)}({past[-1][at]:.4g} -> {new[at]:.4g})"
                    for at in (first, *rest)
                ]
                said = f"{reading.key} {what}: {_join_some(parts, fresh)}, {reading.unit}"
                yield float(new[first]), said
        self._store(f"past {rule}", np.concatenate([past, new[None]])[-HISTORY:])

    def _old(self, key: str) -> np.ndarray | None:
        return self.baseline[key].cpu().numpy() if key in self.baseline else None

    def _store(self, key: str, values: np.ndarray) -> None:
        self.baseline[key] = torch.from_numpy(np.array(values))


def _join_some(parts: Sequence[str], of: np.ndarray) -> str:
    """Joins the parts and adds how many entries of `of` are not among them."""
    left = np.count_nonzero(of) - len(parts)
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")
