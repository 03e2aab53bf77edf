"""`page`: makes one HTML file of a whole store, within a size limit; the page says what it
leaves out."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from tlens_callback.meaning import Description
from tlens_callback.page.encode import Part, Track, blobs, code
from tlens_callback.page.heads import HEAD_AXES
from tlens_callback.page.template import html, step_element, title_of
from tlens_callback.page.thin import evenly_spaced, is_bulky, thin

if TYPE_CHECKING:
    from tlens_callback.store.store import Store

MOST_BYTES = 15_000_000
"""Largest size of a page, except of one whose matrices of heads need more at all its steps."""

MOST_WITH_MATRICES = 60_000_000
"""Largest size of such a page."""

_FOR_PATTERNS = 5_000_000
"""Bytes of a page that what is kept at every step leaves to the rest, if nobody sets its size."""

_FOR_NOTES = 4000
"""Bytes kept free for the notes, which are known last."""


def page(store: "Store", *, most_bytes: int | None = None, view: str = "") -> str:
    """Makes one HTML file with all complete steps of a store.

    If that takes more than `most_bytes` (of UTF-8), attention patterns, texts of rollouts with what
    was measured at their tokens, and other readings of more than 4,000 numbers are kept at fewer
    steps: the first, the last and some evenly between, moved to steps with events if these are
    near. If that would leave fewer than 20 steps, the patterns of fewer heads are kept: those with
    the largest change since the first step and with the largest head scores, one of each in turn.
    After that steps are left out again, down to none.

    All other readings are kept at every step, the matrices of all heads among them. If they do not
    fit, these matrices are rounded to 8 binary digits, which is off by at most 0.4% of a value; if
    that is not enough, the page has fewer steps, each with all of these readings. The page says
    what it leaves out and what it rounds.

    By default `most_bytes` is 15 MB. Where the readings that are kept at every step take more than
    10 MB of it, it is what they take and 5 MB for the others, but at most 60 MB.

    `view` is what the page shows if its address says nothing, in the words of an address:
    "step=1&other=0&change=1". When something is chosen in the page, these words are written into
    its address.

    It holds the text, its parts and the patterns of one step in memory, never those of all steps.

    Raises:
        ValueError: if the store has no complete step, or not even the small readings of its first
            and last step fit.
    """
    steps, torn = store.steps, store.torn
    if not steps:
        raise ValueError(f"{store.path} has no complete step, so there is nothing to show yet.")
    instruments: dict[str, Description] = {}
    for step in steps:
        instruments |= store.descriptions(step)
    frame = len(_html(store, instruments, [], [], view).encode()) + _FOR_NOTES
    if most_bytes is None:
        small, most_bytes = _fit_by_default(store, steps, frame)
    else:
        small = _fit_small(store, steps, most_bytes - frame)
    if small is None:
        raise ValueError(
            f"most_bytes={most_bytes} is too few for {store.path}: the page with only the small "
            f"readings of its first and last step takes more. Give a larger most_bytes."
        )
    # The parts together may take a little more than the sum of their estimated sizes.
    for share in (0.99, 0.9, 0.5):
        kept = thin(store, small.steps, int((most_bytes - frame - small.size) * share))
        notes = [*_step_notes(store, steps, small, torn, most_bytes), *kept.notes]
        if kept.notes:
            notes.append(
                f"That keeps the page within {most_bytes / 1e6:,.3g} MB. The store has everything."
            )
        elements = _elements(store, small.steps, kept.parts, rounded=small.rounded)
        text = _html(store, instruments, notes, list(elements), view)
        if len(text.encode()) <= most_bytes:
            return text
    raise AssertionError(f"{len(text.encode())} bytes, not {most_bytes}")


def _html(
    store: "Store",
    instruments: Mapping[str, Description],
    notes: Sequence[str],
    elements: Sequence[str],
    view: str,
) -> str:
    about = {
        "title": title_of(store.path),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "live": False,
        "view": view,
        "instruments": {name: one.as_json() for name, one in instruments.items()},
        "notes": notes,
    }
    return html(about, elements)


def _elements(
    store: "Store",
    steps: Sequence[int],
    parts: Mapping[tuple[int, str], Part],
    *,
    rounded: bool,
) -> Iterator[str]:
    """Yields the element of each step, with its small readings and the given bulky ones."""
    track = Track()
    for step in steps:
        about = store.about(step)
        bulky = {key for key in about if is_bulky(about[key]["axes"], about[key]["shape"])}
        here = {r.key: r for r in store.readings(step, about.keys() - bulky)}
        yield step_element(
            step,
            blobs(
                parts[step, key] if key in bulky else track.part(code(here[key], rounded=rounded))
                for key in about
                if key not in bulky or (step, key) in parts
            ),
        )


class _Small(NamedTuple):
    """What is kept at every step of a page.

    Attributes:
        steps: the steps that the page has.
        size: the characters that these readings take.
        rounded: whether matrices of heads are rounded.
    """

    steps: Sequence[int]
    size: int
    rounded: bool


def _fit_by_default(store: "Store", steps: Sequence[int], frame: int) -> tuple[_Small | None, int]:
    """Returns what is kept at every step if nobody sets the size of the page, and this size."""
    done, size = _filled(store, steps, MOST_BYTES - _FOR_PATTERNS - frame, rounded=False)
    if done == len(steps):
        return _Small(steps, size, False), MOST_BYTES
    small = _fit_rounded(store, steps, MOST_WITH_MATRICES - _FOR_PATTERNS - frame)
    size = small.size if small else 0
    return small, max(MOST_BYTES, frame + size + _FOR_PATTERNS)


def _fit_small(store: "Store", steps: Sequence[int], room: int) -> _Small | None:
    """Returns what is kept at every step within this room; None if it has not even two steps."""
    done, size = _filled(store, steps, room, rounded=False)
    if done == len(steps):
        return _Small(steps, size, False)
    return _fit_rounded(store, steps, room)


def _fit_rounded(store: "Store", steps: Sequence[int], room: int) -> _Small | None:
    """Returns the same with rounded matrices, at all steps if they fit."""
    chosen = list(steps)
    events: set[int] = set()
    while True:
        done, size = _filled(store, chosen, room, rounded=True)
        if done == len(chosen):
            return _Small(chosen, size, True)
        if len(chosen) <= 2:
            return None
        if not events:
            events = {
                s for s in steps if any(a["unit"] == "event" for a in store.about(s).values())
            }
        chosen = evenly_spaced(steps, max(2, int(done * 0.95)), events)


def _filled(store: "Store", steps: Sequence[int], room: int, *, rounded: bool) -> tuple[int, int]:
    """Returns how many of the steps have room for their small readings, and the characters that
    these take."""
    done = size = 0
    for element in _elements(store, steps, {}, rounded=rounded):
        if size + len(element) > room:
            break
        done, size = done + 1, size + len(element)
    return done, size


def _step_notes(
    store: "Store", steps: Sequence[int], small: _Small, torn: Sequence[int], most_bytes: int
) -> list[str]:
    notes = []
    if torn:
        names = ", ".join(map(str, torn[:10])) + (", ..." if len(torn) > 10 else "")
        notes.append(
            f"{len(torn)} of {len(steps) + len(torn)} steps are incomplete in the store, so they "
            f"are not here: {names}."
        )
    if len(small.steps) < len(steps):
        notes.append(
            f"This page has {len(small.steps)} of {len(steps)} steps, because all of them would "
            f"take more than {most_bytes / 1e6:,.3g} MB even without attention patterns."
        )
    if small.rounded and any(_has_matrix(store, step) for step in (steps[0], steps[-1])):
        notes.append(
            "The scores of heads are rounded to 8 binary digits in this page, which is off by at "
            "most 0.4% of a value; with all digits they would take too much room. The store has "
            "all digits."
        )
    return notes


def _has_matrix(store: "Store", step: int) -> bool:
    about = store.about(step).values()
    return any(
        tuple(one["axes"][-2:]) == HEAD_AXES and not is_bulky(one["axes"], one["shape"])
        for one in about
    )
