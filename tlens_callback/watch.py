"""`Watch`: says when something happens. Reads what the instruments read; runs no model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tlens_callback.reading import Reading

ROLES = ("previous", "duplicate", "induction")
"""The scores of `HeadScores` that make a head a head of a kind."""

Event = tuple[float, str]
"""The number that it is about, and a sentence."""

_HISTORY, _ENOUGH = 20, 3
_SAID = 8
"""So many heads or entries are named in one sentence."""


@dataclass(frozen=True)
class Rule:
    """When a number is worth an event.

    Args:
        key: of the reading to follow; if it has axes, each of its entries.
        above, below: an event when an entry crosses this value upwards, or downwards. One that
            is beyond it at the first observation has not crossed it.
        jump: an event when an entry is further than this, and further than six standard deviations
            (1.4826 times the median absolute deviation), from the median of its own last
            observations, at most 20, once there are 3.

    Raises:
        ValueError: without any of the three, or for a jump that is not positive.
    """

    key: str
    above: float | None = None
    below: float | None = None
    jump: float | None = None

    def __post_init__(self) -> None:
        if self.above is None and self.below is None and self.jump is None:
            raise ValueError(f"Rule({self.key!r}) asks for nothing; give above=, below= or jump=.")
        if self.jump is not None and not self.jump > 0:
            raise ValueError(f"Rule({self.key!r}): jump is more than 0, got {self.jump}.")


@dataclass(frozen=True)
class Watch:
    """Follows roles of heads, rules and guards, and raises an event when one of them changes.

    - Roles: a head's score in a role is the minimum over the block lengths of
      `head_scores/<role>_by_block`, for the roles previous, duplicate and induction (a positional
      copy scores high at one length only). A head takes a role when its score reaches `takes`,
      and loses it when it falls below `loses`; both are events, and what a head is at the first
      observation is none.
    - Entropy collapse: a layer's mean of `head_scores/entropy` over its heads falls below
      `collapse` times that of the first observation.
    - Features: one that is shown by `<instrument>/frequency` begins to fire, on a share `fires` of
      the tokens, or falls silent.
    - A frozen base weight has changed: `frozen_weights/changed` is above 0.
    - Fidelity is breached: the observer says so, and watching ends.
    - `rules`, for whatever else is read.

    An event is a reading as others are, is printed once, and becomes an alert in W&B. The same
    event about the same head or entry is raised at most once in `cooldown` observations. What
    several heads do at one observation is one event.

    Args:
        rules: further numbers to follow.
        heads: follow only these heads, as (layer, head). None: all of them.
        pinned: without `heads`, this many heads of highest score in each role at the first
            observation have curves of their own; with `heads`, each of these.
        takes, loses: scores at which a head takes and loses a role.
        collapse: share of a layer's first mean entropy.
        fires: share of the tokens.
        cooldown: observations.
        scores: name of the `HeadScores` whose readings are followed.

    Keys:
        watch/count: [], count, 0..inf; events at this observation
        watch/events: [event], event, -inf..inf; the number that each is about, the sentences as
            labels; only where there are events
        watch/<role>_L<layer>H<head>: [], probability, 0..1; score in the role, of pinned heads

    Source:
        Olsson et al. 2022 (roles); Zhai et al. 2023 (entropy collapse).

    Raises:
        ValueError: for thresholds out of order.
    """

    rules: Sequence[Rule] = ()
    heads: Sequence[tuple[int, int]] | None = None
    pinned: int = 1
    takes: float = 0.3
    loses: float = 0.15
    collapse: float = 0.25
    fires: float = 0.1
    cooldown: int = 10
    scores: str = "head_scores"
    name: str = "watch"
    memory: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.loses <= self.takes:
            raise ValueError(
                f"A head loses a role below the score at which it takes one: 0 < loses <= takes, "
                f"got loses={self.loses}, takes={self.takes}."
            )
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
            ValueError: for a head that is not there.
        """
        by_key = {reading.key: reading for reading in readings}
        now = int(self.memory["looks"]) + 1 if "looks" in self.memory else 0
        self.memory["looks"] = torch.tensor(now)
        found: list[Event] = []
        curves: list[Reading] = []
        for role in ROLES:
            reading = by_key.get(f"{self.scores}/{role}_by_block")
            if reading is not None:
                score = reading.values.min(0)
                layers = reading.labels.get("layer") or [str(i) for i in range(len(score))]
                found += self._role(role, score, layers)
                curves += self._curves(role, score, layers)
        found += self._entropy(by_key.get(f"{self.scores}/entropy"))
        found += self._frozen(by_key.get("frozen_weights/changed"))
        found += self._features(by_key.values())
        for rule in self.rules:
            if rule.key in by_key:
                found += self._follow(rule, by_key[rule.key])
        return [*curves, *self._events(found)]

    def breach(self, error: Exception) -> list[Reading]:
        """The event of a shadow that is not the live model any more."""
        return self._events([(float("nan"), str(error))])

    def _events(self, events: Sequence[Event]) -> list[Reading]:
        count = Reading(key=f"{self.name}/count", values=np.asarray(len(events)), unit="count")
        if not events:
            return [count]
        about = Reading(
            key=f"{self.name}/events",
            values=np.array([value for value, _ in events]),
            axes=("event",),
            unit="event",
            labels={"event": [sentence for _, sentence in events]},
        )
        return [count, about]

    def _fresh(self, about: str) -> bool:
        """Whether this was not raised a short while ago; from now on it was."""
        now, raised = self.memory["looks"], self.memory.get(f"raised {about}")
        if raised is not None and int(now) - int(raised) <= self.cooldown:
            return False
        self.memory[f"raised {about}"] = now
        return True

    def _role(self, role: str, score: np.ndarray, layers: Sequence[str]) -> Iterator[Event]:
        """From scores [layer, head]: heads that take the role, and those that lose it."""
        names = np.array([[f"L{i}H{j}" for j in range(score.shape[1])] for i in layers])
        best = f"; best is {names.flat[score.argmax()]} {score.max():.2f}"
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
            if reading.axes == ("feature",) and reading.measure == "frequency":
                often = reading.values
                names = reading.labels.get("feature") or [str(i) for i in range(len(often))]
                yield from self._holders(
                    f"{reading.instrument} {' '.join(names)}",
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
            key: of the memory.
            measured: the values, from which on one has it, and below which one has lost it.
            names, followed: of the values' shape.
            said: what is said of the former, and of the latter; `end` is added to that.
        """
        values, takes, loses = measured
        held, before = self._old(f"{key} held"), self._old(f"{key} score")
        holds = values >= takes
        if held is not None and before is not None:
            held = held.astype(bool)
            holds |= held & (values >= loses)
            for what, changed, tail in (
                (said[0], holds & ~held, ""),
                (said[1], held & ~holds, end),
            ):
                parts = {
                    f"{names[at]} ({before[at]:.2f} -> {values[at]:.2f})": float(values[at])
                    for at in zip(*np.nonzero(followed & changed), strict=True)
                    if self._fresh(f"{what} {names[at]}")
                }
                if parts:
                    yield max(parts.values()), f"{what}: {_some(list(parts))}{tail}"
        self._keep(f"{key} held", holds)
        self._keep(f"{key} score", values)

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
        if pins is None:
            if self.heads is None:
                pins = np.argsort(-score, axis=None, kind="stable")[: self.pinned]
            else:
                pins = np.flatnonzero(self._followed(score.shape, layers))
            self._keep(f"{role} pins", pins)
        for at in zip(*np.unravel_index(pins.astype(int), score.shape), strict=True):
            yield Reading(
                key=f"{self.name}/{role}_L{layers[at[0]]}H{at[1]}",
                values=score[at],
                unit="probability",
                limits=(0.0, 1.0),
            )

    def _entropy(self, reading: Reading | None) -> Iterator[Event]:
        if reading is None:
            return
        mean = reading.values.mean(1)
        first = self._old("entropy first")
        if first is None:
            self._keep("entropy first", mean)
            return
        names = reading.labels.get("layer") or [str(i) for i in range(len(mean))]
        low, were = mean < self.collapse * first, self._old("entropy low")
        new = low if were is None else low & ~were.astype(bool)
        for i in np.flatnonzero(new).tolist():
            if self._fresh(f"entropy {i}"):
                said = f"attention entropy of layer {names[i]} collapsed: {first[i]:.2f} at first,"
                yield float(mean[i]), f"{said} now {mean[i]:.2f} (1 is uniform attention)"
        self._keep("entropy low", low)

    def _frozen(self, reading: Reading | None) -> Iterator[Event]:
        if reading is not None and reading.values > 0 and self._fresh("frozen"):
            many = int(reading.values)
            said = f"{many} frozen weights of the base model are not what they were at first"
            yield float(many), f"{said}: something writes to what should not be trained"

    def _follow(self, rule: Rule, reading: Reading) -> Iterator[Event]:
        past, new = self._old(f"past {rule}"), reading.values
        if past is None or past.shape[1:] != new.shape:
            past = np.empty((0, *new.shape))
        crossed: dict[str, np.ndarray] = {}
        if len(past):
            if rule.above is not None:
                crossed[f"above {rule.above:g}"] = (new > rule.above) & (past[-1] <= rule.above)
            if rule.below is not None:
                crossed[f"below {rule.below:g}"] = (new < rule.below) & (past[-1] >= rule.below)
        if rule.jump is not None and len(past) >= _ENOUGH:
            median = np.median(past, axis=0)
            spread = 6 * 1.4826 * np.median(np.abs(past - median), axis=0)
            crossed["jumped"] = np.abs(new - median) > np.maximum(rule.jump, spread)
        for what, where in crossed.items():
            parts = {
                f"{_entry(reading, at)}({past[-1][at]:.4g} -> {new[at]:.4g})": float(new[at])
                for at in map(tuple, np.argwhere(where).tolist())
                if self._fresh(f"{rule.key} {what} {at}")
            }
            if parts:
                said = f"{reading.key} {what}: {_some(list(parts))}, {reading.unit}"
                yield next(iter(parts.values())), said
        self._keep(f"past {rule}", np.concatenate([past, new[None]])[-_HISTORY:])

    def _old(self, key: str) -> np.ndarray | None:
        return self.memory[key].cpu().numpy() if key in self.memory else None

    def _keep(self, key: str, values: np.ndarray) -> None:
        self.memory[key] = torch.from_numpy(np.array(values))


def _entry(reading: Reading, at: Sequence[int]) -> str:
    """Which entry of a reading with axes: "layer 3 head 2 "; empty for a number."""
    labels: Mapping[str, Sequence[str]] = reading.labels
    names = [
        f"{axis} {labels[axis][i] if axis in labels else i}"
        for axis, i in zip(reading.axes, at, strict=True)
    ]
    return "".join(f"{name} " for name in names)


def _some(parts: Sequence[str]) -> str:
    """The parts in a row, the first few where there are many."""
    left = len(parts) - _SAID
    return ", ".join(parts[:_SAID]) + (f" and {left} more" if left > 0 else "")
