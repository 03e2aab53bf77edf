"""`page`: makes one HTML file of a whole store, within a size limit; the page says what it
leaves out."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tlens_callback.meaning import Description
from tlens_callback.page.encode import Part, Track, blobs, code
from tlens_callback.page.template import html, step_element, title_of
from tlens_callback.page.thin import evenly_spaced, is_bulky, thin

if TYPE_CHECKING:
    from tlens_callback.store.store import Store

_FOR_NOTES = 4000
"""Bytes kept free for the notes, which are known last."""


def page(store: "Store", *, most_bytes: int = 15_000_000, view: str = "") -> str:
    """Makes one HTML file with all complete steps of a store.

    If that takes more than `most_bytes` (of UTF-8), attention patterns, texts of rollouts with what
    was measured at their tokens, and readings of more than 4,000 numbers are kept at fewer steps:
    the first, the last and some evenly between, moved to steps with events if these are near. If
    that would leave fewer than 20 steps, the patterns of fewer heads are kept: those with the
    largest change since the first step and with the largest head scores, one of each in turn. After
    that steps are left out again, down to none. All other readings are kept, unless they alone take
    more than `most_bytes`: then the page has fewer steps. The page says what it leaves out.

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
    room = most_bytes - len(_html(store, instruments, [], [], view).encode()) - _FOR_NOTES
    fits = _fit_small(store, steps, room)
    if fits is None:
        raise ValueError(
            f"most_bytes={most_bytes} is too few for {store.path}: the page with only the small "
            f"readings of its first and last step takes more. Give a larger most_bytes."
        )
    chosen, small = fits
    # The parts together may take a little more than the sum of their estimated sizes.
    for share in (0.99, 0.9, 0.5):
        kept = thin(store, chosen, int((room - small) * share))
        notes = [*_step_notes(steps, chosen, torn, most_bytes), *kept.notes]
        if kept.notes:
            notes.append(
                f"That keeps the page within {most_bytes / 1e6:,.3g} MB. The store has everything."
            )
        text = _html(store, instruments, notes, list(_elements(store, chosen, kept.parts)), view)
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
    store: "Store", steps: Sequence[int], parts: Mapping[tuple[int, str], Part]
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
                parts[step, key] if key in bulky else track.part(code(here[key]))
                for key in about
                if key not in bulky or (step, key) in parts
            ),
        )


def _fit_small(store: "Store", steps: Sequence[int], room: int) -> tuple[list[int], int] | None:
    """Returns the steps whose small readings fit, if possible all, and the characters they take;
    None if not even two steps fit."""
    chosen = list(steps)
    events: set[int] = set()
    while True:
        size = done = 0
        for element in _elements(store, chosen, {}):
            size += len(element)
            if size > room:
                break
            done += 1
        else:
            return chosen, size
        if len(chosen) <= 2:
            return None
        if not events:
            events = {
                s for s in steps if any(a["unit"] == "event" for a in store.about(s).values())
            }
        chosen = evenly_spaced(steps, max(2, int(done * 0.95)), events)


def _step_notes(
    steps: Sequence[int], chosen: Sequence[int], torn: Sequence[int], most_bytes: int
) -> list[str]:
    notes = []
    if torn:
        names = ", ".join(map(str, torn[:10])) + (", ..." if len(torn) > 10 else "")
        notes.append(
            f"{len(torn)} of {len(steps) + len(torn)} steps are incomplete in the store, so they "
            f"are not here: {names}."
        )
    if len(chosen) < len(steps):
        notes.append(
            f"This page has {len(chosen)} of {len(steps)} steps, because all of them would take "
            f"more than {most_bytes / 1e6:,.3g} MB even without attention patterns."
        )
    return notes
