"""Compares two watched runs: the readings of one step of each, from their stores."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tlens_callback import instruments as own_instruments
from tlens_callback.events import Watch
from tlens_callback.interfaces import Instrument
from tlens_callback.meaning import Description, Needs, described
from tlens_callback.offline.changes import History, probe_of
from tlens_callback.offline.compare import Pair
from tlens_callback.offline.stages import name_reading
from tlens_callback.reading import RESERVED, TOKEN_AXES, Reading, split_key
from tlens_callback.store import Store


def compare_stores(
    a: Store, b: Store, *, step: int | None = None, instruments: Sequence[Instrument] = ()
) -> Pair:
    """Compares the last observations of A and B, or the observations of both at one step.

    Readings that both have are kept as they are, except those about the run that made them
    (`Meaning.of_run`). A reading that compares with the first observation of its run is computed
    again, as B compared with A, if the instrument can do it (`Instrument.between`); so are the
    events of the watch. Other readings about a run are left out.

    A probe whose tokens differ is left out, and so is a reading that only one has or whose shape
    differs; `left_out` says so. A store does not record targets and foils: they are taken to be
    the same in both.

    Args:
        step: None: the last observation of each, at whatever steps these are.
        instruments: the caller's own instruments that can compute their readings again, with the
            names that they have in the stores.

    Raises:
        ValueError: if the step is not in both, the models have different shapes, or the stores
            have nothing in common.
    """
    histories = History(a), History(b)
    first, last = (_step(history, step) for history in histories)
    if first is None or last is None:
        raise ValueError(_no_step(a, b, histories, step))
    descriptions = histories[0].descriptions | histories[1].descriptions
    own = _package_instruments(descriptions)
    again = {one.name: one for one in (*own, *instruments) if hasattr(one, "between")}
    about = (
        _comparable(a.about(first), descriptions, again),
        _comparable(b.about(last), descriptions, again),
    )
    _demand_shape(*about)
    common, left_out = _common(*about, descriptions)
    left_out += _of_other_instruments({**a.about(first), **b.about(last)}, descriptions, again)
    readings = [
        {r.key: _with_description(r, descriptions) for r in store.readings(at, common)}
        for store, at in ((a, first), (b, last))
    ]
    both = [_compared_with(readings[0], now, again) for now in readings]
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


def _of_other_instruments(
    keys: Iterable[str], descriptions: Mapping[str, Description], again: Mapping[str, Any]
) -> Iterator[str]:
    """Gives a sentence for each instrument from outside this package whose readings about a run
    are left out."""
    names = dict.fromkeys(key.split("/", 1)[0] for key in keys)
    for name in names:
        said = descriptions.get(name, Description())
        of_run = [measure for measure, meaning in said.measures.items() if meaning.of_run]
        known = name in RESERVED or said.kind in (*own_instruments.__all__, Watch.__name__)
        if of_run and not known and name not in again:
            yield (
                f"{', '.join(f'{name}/{measure}' for measure in of_run)} are about one run. In "
                f"Python, compare_stores(..., instruments=[{said.kind}(...)]) computes them again, "
                f"with the instrument's method between()."
            )


def _package_instruments(descriptions: Mapping[str, Description]) -> Iterator[Any]:
    """The package's instruments that made readings in the stores, under the names they had."""
    for name, description in descriptions.items():
        if description.kind in own_instruments.__all__:
            kind = getattr(own_instruments, description.kind)
            if hasattr(kind, "between"):
                yield kind(name=name)


def _with_description(reading: Reading, descriptions: Mapping[str, Description]) -> Reading:
    """Adds the description of its instrument to a reading; older stores have none."""
    return reading.described(descriptions.get(reading.instrument, reading.description))


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
    shared = f"they have {common} in common" if common else "they have no step in common"
    return (
        f"Step {step} is not in both: {a.path} has {steps[0]}, {b.path} has {steps[1]}; {shared}."
        + " Without --step, the last observation of each is compared." * (not common)
    )


def _comparable(
    about: Mapping[str, dict[str, Any]],
    descriptions: Mapping[str, Description],
    again: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """The keys whose readings can be compared as they are or computed again."""
    found = {}
    for key, entry in about.items():
        instrument, measure, _ = split_key(key)
        meaning = descriptions.get(instrument, Description()).meaning(measure)
        if instrument in again or not meaning.of_run:
            found[key] = entry
    return found


def _demand_shape(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raises a ValueError if the numbers of layers or heads differ.

    An axis with labels is skipped: it can be a selection of layers.
    """
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
                f"The models have different shapes and cannot be compared head by head: "
                f"A has {max(sizes[0])} {axis}s, B has {max(sizes[1])}."
            )


def _common(
    a: Mapping[str, dict[str, Any]],
    b: Mapping[str, dict[str, Any]],
    descriptions: Mapping[str, Description],
) -> tuple[set[str], list[str]]:
    """The keys to compare, and sentences about the keys that are left out."""
    others = {
        key
        for key in set(a) & set(b)
        if probe_of(key) is not None
        and any(a[key]["labels"].get(x) != b[key]["labels"].get(x) for x in TOKEN_AXES)
    }
    probes = {name for key in others if (name := probe_of(key)) is not None}
    sentences = [f"The probe {name!r} has different tokens in A and B." for name in sorted(probes)]
    blocks = [_blocks(of) for of in (a, b)]
    on_blocks: set[str] = set()
    if all(blocks) and blocks[0] != blocks[1]:
        # The other numbers of these instruments are means, or the worst, over all blocks.
        on_blocks = {key.split("/")[0] for of in (a, b) for key in of if "block" in of[key]["axes"]}
        present = {key.split("/")[0] for key in (*a, *b)}
        needing = {name for name, one in descriptions.items() if Needs.BLOCKS in one.needs}
        on_blocks |= needing & present
        lengths = [", ".join(of) for of in blocks]
        sentences.append(
            f"The repeated blocks have {lengths[0]} tokens in A and {lengths[1]} in B, so these "
            f"instruments cannot be compared: {', '.join(sorted(on_blocks))}."
        )
    left = [
        key
        for key in dict.fromkeys((*a, *b))
        if probe_of(key) not in probes and key.split("/")[0] not in on_blocks
    ]
    for own, other, letter in ((a, b, "A"), (b, a, "B")):
        alone = [key for key in left if key in own and key not in other and key[:9] != "fidelity/"]
        sentences += _only_in(letter, alone, other)
    common = {key for key in left if key in a and key in b}
    for key in sorted(common):
        in_a, in_b = (
            [of[x] for x in ("axes", "shape", "unit", "labels")] for of in (a[key], b[key])
        )
        if in_a != in_b:
            common.remove(key)
            sentences.append(f"{key} has a different shape, unit or labels in A and B.")
    return common, sentences


def _blocks(about: Mapping[str, dict[str, Any]]) -> list[str]:
    """Lengths of the repeated blocks that were observed."""
    found = {x for of in about.values() if "block" in of["axes"] for x in of["labels"]["block"]}
    return sorted(found, key=int)


def _only_in(letter: str, alone: Iterable[str], other: Iterable[str]) -> Iterator[str]:
    """A sentence about what only one of the two has: probes, instruments, or else keys."""
    other = list(other)
    probes, instruments = set(map(probe_of, other)), {key.split("/")[0] for key in other}
    found: dict[str, None] = {}
    for key in alone:
        if probe_of(key) and probe_of(key) not in probes:
            found[f"the probe {probe_of(key)!r}"] = None
        elif key.split("/")[0] not in instruments:
            found[key.split("/")[0]] = None
        else:
            found[key] = None
    if found:
        yield f"Only {letter} has {', '.join(found)}."


def _compared_with(
    first: Mapping[str, Reading], now: Mapping[str, Reading], again: Mapping[str, Any]
) -> list[Reading]:
    """The readings `now`, with drift and changes computed again by `between`, from `first`."""
    anew: dict[str, Reading] = {}
    for name, one in again.items():
        try:
            anew |= {r.key: r.described(described(one)) for r in one.between(first, now)}
        except Exception as error:
            error.add_note(f"(raised by {type(one).__name__}.between, of the instrument {name!r})")
            raise
    found = [
        anew.pop(key, reading)
        for key, reading in now.items()
        if key in anew or not reading.meaning.of_run
    ]
    return [*found, *anew.values()]
