"""Two watched runs, side by side: the readings of a step of each, from their stores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tlens_callback import instruments as own_instruments
from tlens_callback.events import Watch
from tlens_callback.interfaces import Instrument
from tlens_callback.meaning import Description, Needs, described
from tlens_callback.offline.changes import History
from tlens_callback.offline.compare import Pair
from tlens_callback.offline.stages import name_reading
from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.store import Store


def compare_stores(
    a: Store, b: Store, *, step: int | None = None, instruments: Sequence[Instrument] = ()
) -> Pair:
    """The last observation of A and of B, or both at one step, with B's measured against A's.

    Readings that both have are taken as they are, but for those that say something of the run that
    read them (`Meaning.of_run`): what compares with the first observation of a run is made anew, of
    B against A, where the instrument can (`Instrument.between`), and so are the watch's events; the
    rest of that kind is left out.

    A probe whose tokens differ is left out, and so is what only one has, or has in another shape;
    `left_out` says so. Not seen in a store, and taken to be the same, are targets and foils.

    Args:
        step: None: the last observation of each, at whatever steps these are.
        instruments: of the caller's own, to make their readings anew; by the names in the stores.

    Raises:
        ValueError: a step that is not in both, models of another shape, or nothing in common.
    """
    histories = History(a), History(b)
    first, last = (_step(history, step) for history in histories)
    if first is None or last is None:
        raise ValueError(_no_step(a, b, histories, step))
    said = histories[0].descriptions | histories[1].descriptions
    again = {one.name: one for one in (*_own(said), *instruments) if hasattr(one, "between")}
    about = _measured(a.about(first), said, again), _measured(b.about(last), said, again)
    _demand_shape(*about)
    common, left_out = _common(*about, said)
    readings = [
        {r.key: _with_description(r, said) for r in store.readings(at, common)}
        for store, at in ((a, first), (b, last))
    ]
    both = [_against(readings[0], now, again) for now in readings]
    if not any(key.split("/", 1)[0] != "fidelity" for key in common):
        raise ValueError(
            f"{a.path} at step {first} and {b.path} at step {last} have nothing in common: "
            f"{' '.join(left_out)}"
        )
    names = f"{a.path}, step {first}", f"{b.path}, step {last}"
    watch = Watch()
    with_events = [
        [*of, *watch.look(of), name_reading(name)] for of, name in zip(both, names, strict=True)
    ]
    return Pair(names, *with_events, left_out=tuple(left_out))


def _own(said: Mapping[str, Description]) -> Iterator[Any]:
    """The package's instruments that the stores have readings of, under the names they had."""
    for name, description in said.items():
        if description.kind in own_instruments.__all__:
            kind = getattr(own_instruments, description.kind)
            if hasattr(kind, "between"):
                yield kind(name=name)


def _with_description(reading: Reading, said: Mapping[str, Description]) -> Reading:
    """A store from before instruments described themselves lacks it."""
    return reading.described(said.get(reading.instrument, reading.description))


def _step(history: History, step: int | None) -> int | None:
    observed = history.observed
    if step is None:
        return observed[-1] if observed else None
    return step if step in observed else None


def _no_step(a: Store, b: Store, histories: Sequence[History], step: int | None) -> str:
    steps = [history.observed for history in histories]
    empty = [str(store.path) for store, of in zip((a, b), steps, strict=True) if not of]
    if empty:
        return f"{' and '.join(empty)} has no complete observation, so there is nothing to compare."
    common = sorted(set(steps[0]) & set(steps[1]))
    are = f"they have {common} in common" if common else "they have no step in common"
    return (
        f"Step {step} is not in both: {a.path} has {steps[0]}, {b.path} has {steps[1]}; {are}."
        + " Without --step the last of each are compared." * (not common)
    )


def _measured(
    about: Mapping[str, dict[str, Any]],
    said: Mapping[str, Description],
    again: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The keys that can be compared, or made anew."""
    found = {}
    for key, of in about.items():
        instrument, measure = key.split("/", 2)[:2]
        if instrument in again or not said.get(instrument, Description()).meaning(measure).of_run:
            found[key] = of
    return found


def _demand_shape(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises for models with other layers or heads; a selection of layers has labels."""
    for axis in ("layer", "head"):
        sizes = [
            {
                of["shape"][of["axes"].index(axis)]
                for of in about.values()
                if axis in of["axes"] and not of["labels"].get(axis)
            }
            for about in (a, b)
        ]
        if all(sizes) and sizes[0] != sizes[1]:
            raise ValueError(
                f"The models have another shape and cannot be compared head by head: "
                f"{max(sizes[0])} and {max(sizes[1])} for the number of {axis}s."
            )


def _common(
    a: Mapping[str, dict[str, Any]],
    b: Mapping[str, dict[str, Any]],
    descriptions: Mapping[str, Description],
) -> tuple[set[str], list[str]]:
    """The keys to compare, and sentences about the others."""
    others = {
        key
        for key in set(a) & set(b)
        if key.count("/") == 2
        and any(a[key]["labels"].get(x) != b[key]["labels"].get(x) for x in TOKEN_AXES)
    }
    probes = {key.split("/", 2)[2] for key in others}
    said = [f"The probe {name!r} has other tokens in A than in B." for name in sorted(probes)]
    blocks = [_blocks(of) for of in (a, b)]
    on_blocks: set[str] = set()
    if all(blocks) and blocks[0] != blocks[1]:
        # Their other numbers are means, or the worst, of all blocks.
        on_blocks = {key.split("/")[0] for of in (a, b) for key in of if "block" in of[key]["axes"]}
        there = {key.split("/")[0] for key in (*a, *b)}
        needing = {name for name, one in descriptions.items() if Needs.BLOCKS in one.needs}
        on_blocks |= needing & there
        lengths = [", ".join(of) for of in blocks]
        said.append(
            f"The repeated blocks are of {lengths[0]} tokens in A and of {lengths[1]} in B, so "
            f"that {', '.join(sorted(on_blocks))} say nothing of B against A."
        )
    left = [
        key
        for key in dict.fromkeys((*a, *b))
        if _probe(key) not in probes and key.split("/")[0] not in on_blocks
    ]
    for here, there, where in ((a, b, "A"), (b, a, "B")):
        alone = [key for key in left if key in here and key not in there and key[:9] != "fidelity/"]
        said += _only(alone, there, where)
    common = {key for key in left if key in a and key in b}
    for key in sorted(common):
        mine, its = (
            [of[x] for x in ("axes", "shape", "unit", "labels")] for of in (a[key], b[key])
        )
        if mine != its:
            common.remove(key)
            said.append(f"{key} is of another shape, or of other things, in A than in B.")
    return common, said


def _blocks(about: Mapping[str, dict[str, Any]]) -> list[str]:
    """Lengths of the repeated blocks that were looked at."""
    found = {x for of in about.values() if "block" in of["axes"] for x in of["labels"]["block"]}
    return sorted(found, key=int)


def _only(alone: Iterable[str], there: Iterable[str], where: str) -> Iterator[str]:
    """What only one has: whole probes, whole instruments, or else keys."""
    there = list(there)
    probes, instruments = set(map(_probe, there)), {key.split("/")[0] for key in there}
    found: dict[str, None] = {}
    for key in alone:
        if _probe(key) and _probe(key) not in probes:
            found[f"the probe {_probe(key)!r}"] = None
        elif key.split("/")[0] not in instruments:
            found[key.split("/")[0]] = None
        else:
            found[key] = None
    if found:
        yield f"Only {where} has {', '.join(found)}."


def _probe(key: str) -> str | None:
    return key.split("/", 2)[2] if key.count("/") >= 2 else None


def _against(
    first: Mapping[str, Reading], now: Mapping[str, Reading], again: Mapping[str, Any]
) -> list[Reading]:
    """The readings of now, with those that compare made anew, against `first`."""
    anew = {
        reading.key: reading.described(described(one))
        for one in again.values()
        for reading in one.between(first, now)
    }
    found = [
        anew.pop(key, reading)
        for key, reading in now.items()
        if key in anew or not reading.meaning.of_run
    ]
    return [*found, *anew.values()]
