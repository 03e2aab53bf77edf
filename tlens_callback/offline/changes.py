"""Finds what changed between the first and the last observation of a store, as plain numbers."""

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple, TypeVar

import numpy as np

from tlens_callback.events import Watch
from tlens_callback.events.roles import lowest_over_blocks, of_heads, role_of
from tlens_callback.meaning import Description, Meaning, Quantity, described_class
from tlens_callback.reading import RESERVED, Reading, split_key
from tlens_callback.store import Store

_OF_THE_RUN = {
    name: Description(others=Meaning(of_run=True)) for name in RESERVED if name != "fidelity"
}
"""Descriptions of what the observer reads itself; all but its fidelity is of one run alone."""

BESIDE = (*RESERVED, "watch")
"""The first segments of keys that say nothing about the model.

A step with such keys only is not an observation.
"""


LEAST = 1e-5
"""The smallest change, in bits or as cosine distance, that counts as a move.

Rounding alone reaches 1e-8 in float32 and 1e-6 in stored patterns.
"""

LEAST_SAID = 0.005
"""The smallest change, in nats or logits, that a text with two digits does not show as 0."""


Taken = TypeVar("Taken")


class Change(NamedTuple):
    """The first and the last value of a number.

    Attributes:
        what: a head (L3H1), an MLP (L3 MLP), a token, or a key.
        when: the two neighbouring steps between which the number changed most; None if there is
            only one interval, or no change.
    """

    what: str
    first: float
    last: float
    when: tuple[int, int] | None = None

    @property
    def size(self) -> float:
        """The distance between the first and the last value."""
        return abs(self.last - self.first)


class History:
    """The readings of a store by key, with the steps that have each key.

    Attributes:
        store: the store; it is asked for the keys of each step only once, here.
        steps: key -> the steps that have it.
        observed: the steps at which more than `BESIDE` was read.
        descriptions: instrument -> what it says about itself. If the store does not record it,
            the description of the package's instrument of that name.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.steps: dict[str, list[int]] = {}
        self.observed: list[int] = []
        self.descriptions = dict(_OF_THE_RUN)
        for step in store.steps:
            about = store.about(step)
            if any(key.split("/", 1)[0] not in BESIDE for key in about):
                self.observed.append(step)
            for key in about:
                self.steps.setdefault(key, []).append(step)
            self.descriptions |= store.descriptions(step)
        named = {key.split("/", 1)[0] for key in self.steps}
        if named - self.descriptions.keys() - {"fidelity"}:
            self.descriptions = own_descriptions() | self.descriptions
        self._of: dict[Quantity | None, list[str]] = {}
        for key in self.steps:
            self._of.setdefault(self.meaning(key).quantity, []).append(key)

    def ends(self, key: str) -> tuple[Reading, Reading] | None:
        """The first reading that can be compared with the last one, and the last one.

        None if no step has the key.
        """
        found = self.all(key, ends=True)
        return (found[min(found)], found[max(found)]) if found else None

    def all(self, key: str, *, ends: bool = False) -> dict[int, Reading]:
        """Step -> reading, for all readings that have the shape and labels of the last one.

        Args:
            ends: return only the first and the last of them.
        """
        steps = self.steps.get(key, [])
        last: Reading | None = None
        found: dict[int, Reading] = {}
        for step in [*steps[-1:], *steps[:-1]]:
            reading = self.store.reading(key, step)
            last = last or reading
            if _form(reading) == _form(last):
                found[step] = reading
                if ends and len(found) == 2:
                    break
        return dict(sorted(found.items()))

    def meaning(self, key: str) -> Meaning:
        """The `Meaning` of the readings of a key."""
        instrument, measure, _ = split_key(key)
        return self.descriptions.get(instrument, Description()).meaning(measure)

    def keys(self, *quantities: Quantity, numbers: bool = False) -> list[str]:
        """The keys of these quantities, quantity by quantity, each in order of appearance.

        Args:
            numbers: only those whose readings are one number.
        """
        found = [key for one in quantities for key in self._of.get(one, ())]
        return [key for key in found if not (numbers and self.meaning(key).axes)]

    def key(self, quantity: Quantity, probe: str | None = None) -> str | None:
        """The first key of this quantity for this probe; None stands for no single probe."""
        return next((key for key in self.keys(quantity) if probe_of(key) == probe), None)

    def number(self, key: str) -> Change | None:
        """How a reading of one number changed; None if the key has no such reading."""
        return self.numbers([key]).get(key)

    def numbers(self, keys: Collection[str]) -> dict[str, Change]:
        """Key -> how its reading changed, for those of these keys that are one number each."""
        numbers = [key for key, reading in self.last(keys).items() if not reading.axes]
        found = self.alike(numbers, lambda reading: float(reading.values))
        return {key: _change(key, found[key]) for key in keys if key in found}

    def alike(
        self, keys: Collection[str], take: Callable[[Reading], Taken]
    ) -> dict[str, dict[int, Taken]]:
        """Key -> step -> what `take` returns for the reading, for all readings that have the shape
        and labels of the key's last one.

        Each step is read once, however many keys there are, and only what `take` returns is kept.
        """
        last = {key: _form(reading) for key, reading in self.last(keys).items()}
        found: dict[str, dict[int, Taken]] = {key: {} for key in last}
        for step in sorted({step for key in last for step in self.steps[key]}):
            for reading in self.store.readings(step, last.keys()):
                if _form(reading) == last[reading.key]:
                    found[reading.key][step] = take(reading)
        return found

    def last(self, keys: Collection[str]) -> dict[str, Reading]:
        """Key -> its last reading, for those of these keys that there are."""
        by_step: dict[int, list[str]] = {}
        for key in keys:
            if key in self.steps:
                by_step.setdefault(self.steps[key][-1], []).append(key)
        found = {
            reading.key: reading
            for step, here in by_step.items()
            for reading in self.store.readings(step, set(here))
        }
        return {key: found[key] for key in keys if key in found}


def _form(reading: Reading) -> tuple[object, object]:
    """What two readings have in common if they can be compared."""
    return reading.values.shape, reading.labels


def _change(what: str, values: Mapping[int, float]) -> Change:
    steps = list(values)
    moves = np.nan_to_num(np.abs(np.diff(list(values.values()))))
    at = int(moves.argmax()) if len(moves) > 1 and moves.any() else None
    when = None if at is None else (steps[at], steps[at + 1])
    return Change(what, values[steps[0]], values[steps[-1]], when)


def own_descriptions() -> dict[str, Description]:
    """Default name -> description: of each instrument of the package, of the watch, and of what the
    observer reads itself."""
    # Late, because this takes seconds, and only a store without descriptions needs it.
    from tlens_callback import instruments

    exported = [Watch, *(getattr(instruments, name) for name in instruments.__all__)]
    found = {one.name: described_class(one) for one in exported if isinstance(one, type)}
    return found | _OF_THE_RUN


def probe_of(key: str) -> str | None:
    """The probe that a key belongs to; None if it belongs to no single probe."""
    return split_key(key)[2]


def value_name(reading: Reading, at: tuple[int, ...]) -> str:
    """The name of one value of a reading: L3H1 for a head, "layer 3 mlp" for a layer's part."""
    names = {}
    for axis, index in zip(reading.axes, at, strict=True):
        labels = reading.labels.get(axis)
        names[axis] = labels[index] if labels else str(index)
    if reading.axes == ("layer", "head"):
        return f"L{names['layer']}H{names['head']}"
    return " ".join(name if axis == "part" else f"{axis} {name}" for axis, name in names.items())


def _largest(reading: Reading, most: int) -> list[tuple[str, float]]:
    """Name and value of the values of largest magnitude, from `LEAST` on, largest first."""
    size = np.where(np.isfinite(reading.values), np.abs(reading.values), 0)
    return [
        (value_name(reading, at), float(reading.values[at]))
        for at in _largest_indices(size, most, LEAST)
    ]


def moved_heads(history: History, most: int) -> list[tuple[str, float]]:
    """The heads whose attention has moved farthest by the last observation."""
    return _farthest(history, Quantity.ATTENTION_CHANGE, most)


def moved_layers(history: History, most: int) -> list[tuple[str, float]]:
    """The layers and parts whose activations have moved farthest by the last observation."""
    return _farthest(history, Quantity.ACTIVATION_CHANGE, most)


def _farthest(history: History, quantity: Quantity, most: int) -> list[tuple[str, float]]:
    key = history.key(quantity)
    ends = history.ends(key) if key else None
    return _largest(ends[1], most) if ends else []


def role_scores(history: History) -> Iterator[tuple[str, dict[int, np.ndarray], Reading]]:
    """For each role: its name, step -> scores [layer, head], and a reading that names the layers.

    A head's score in a role is the lowest over the block lengths, as `Watch` takes it.
    """
    lasts: dict[str, Reading] = {}
    seen = set()
    for key, last in history.last(history.keys(Quantity.HEAD_ROLE)).items():
        meaning = history.meaning(key)
        last = last.described(history.descriptions[key.split("/", 1)[0]])
        # Of several instruments with one role the first, as `Watch` does.
        if of_heads([last]) and role_of(meaning) not in seen:
            seen.add(role_of(meaning))
            lasts[key] = last
    for key, scores in history.alike(lasts, lowest_over_blocks).items():
        yield history.meaning(key).role, scores, lasts[key]


def changed_roles(history: History, most: int) -> list[Change]:
    """The heads whose score in a role changed most, by 0.01 or more, as "L3H1 induction"."""
    changes = []
    for role, scores, named in role_scores(history):
        far = np.abs(scores[max(scores)] - scores[min(scores)])
        for at in _largest_indices(far, most, 0.01):
            what = f"{_head(named, at)} {role}"
            changes.append(_change(what, {step: float(s[at]) for step, s in scores.items()}))
    return sorted(changes, key=lambda change: -change.size)[:most]


def roles_taken(history: History, watch: Watch) -> tuple[list[Change], list[Change]]:
    """The heads that gained a role between the first and the last observation, and those that lost
    one.

    The thresholds of `Watch` are applied to these two observations only. A head gained a role if
    its score was below `takes` and no longer is; it lost a role if its score was at least `takes`
    and is now below `loses`. In both cases the score must have changed by at least `moves`. Every
    such head is named, the one that changed most first.
    """
    gained, lost = [], []
    for role, scores, named in role_scores(history):
        first, last = scores[min(scores)], scores[max(scores)]
        up = (first < watch.takes) & (last >= watch.takes) & (last - first >= watch.moves)
        down = (first >= watch.takes) & (last < watch.loses) & (first - last >= watch.moves)
        for found, where in ((gained, up), (lost, down)):
            for at in map(tuple, np.argwhere(where)):
                what = f"{_head(named, at)} {role}"
                found.append(_change(what, {step: float(s[at]) for step, s in scores.items()}))
    for found in (gained, lost):
        found.sort(key=lambda change: -change.size)
    return gained, lost


def changed_tokens(history: History, probe: str, most: int) -> list[Change]:
    """The tokens of a probe whose loss changed most, in nats."""
    key = history.key(Quantity.TOKEN_LOSS, probe)
    ends = history.ends(key) if key else None
    if ends is None:
        return []
    first, last = ends
    far = np.abs(last.values - first.values)
    names = last.labels["token"]
    return [
        Change(repr(names[i]), float(first.values[i]), float(last.values[i]))
        for (i,) in _largest_indices(far, most, LEAST_SAID)
    ]


def changed_writers(history: History, probe: str, most: int) -> list[Change]:
    """The heads and MLPs whose direct attribution changed most, in logits."""
    changes = []
    for key in history.keys(Quantity.DIRECT_EFFECT):
        ends = history.ends(key) if probe_of(key) == probe else None
        if ends is not None:
            first, last = ends
            far = np.abs(last.values - first.values)
            for at in _largest_indices(far, most, LEAST_SAID):
                name = component(last, at)
                changes.append(Change(name, float(first.values[at]), float(last.values[at])))
    return sorted(changes, key=lambda change: -change.size)[:most]


def changed_keys(history: History, most: int) -> list[Change]:
    """The keys whose values changed most relative to their size: |last - first| / |first|, in
    norms.

    A `Change` has the norms of the values if there are several, or the number itself. Keys of
    indices, and keys in `BESIDE`, are left out.
    """
    found: list[tuple[float, Change]] = []
    for key in history.steps:
        ends = None if key.split("/", 1)[0] in BESIDE else history.ends(key)
        if ends is None or ends[0].unit == "index":
            continue
        first, last = (np.nan_to_num(end.values.astype(np.float64)) for end in ends)
        size, far = np.linalg.norm(first.ravel()), np.linalg.norm((last - first).ravel())
        if far > 0:
            at_first, now = (
                float(x if x.ndim == 0 else np.linalg.norm(x.ravel())) for x in (first, last)
            )
            found.append((float(far / size) if size else np.inf, Change(key, at_first, now)))
    found.sort(key=lambda one: -one[0])
    return [change for _, change in found[:most]]


def _largest_indices(far: np.ndarray, most: int, least: float) -> list[tuple[int, ...]]:
    """Indices of the largest values that are at least `least`, largest first."""
    far = np.nan_to_num(far)
    order = np.argsort(-far, axis=None, kind="stable")[:most].tolist()
    order = [i for i in order if far.flat[i] >= least]
    return [tuple(int(i) for i in np.unravel_index(i, far.shape)) for i in order]


def _head(reading: Reading, at: tuple[int, ...]) -> str:
    return f"L{_layer(reading, at[0])}H{at[1]}"


def component(reading: Reading, at: tuple[int, ...]) -> str:
    """The name of a head, or of the MLP of a layer: L3H1, L3 MLP."""
    if reading.axes == ("layer", "head"):
        return _head(reading, at)
    return f"L{_layer(reading, at[0])} MLP"


def _layer(reading: Reading, at: int) -> str:
    layers = reading.labels.get("layer")
    return layers[at] if layers else str(at)
