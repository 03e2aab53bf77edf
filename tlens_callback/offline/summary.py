"""`summary`: what a run changed inside its model, in a few lines for a commit message."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from textwrap import shorten, wrap

import numpy as np

from tlens_callback.events import Watch
from tlens_callback.meaning import Quantity
from tlens_callback.offline.changes import (
    LEAST,
    Change,
    History,
    changed_keys,
    changed_roles,
    changed_writers,
    moved_heads,
    moved_layers,
    probe_of,
    roles_taken,
)
from tlens_callback.store import Store

WIDTH = 72
"""Columns, those of a commit message."""

_PROBES, _EVENTS, _HEADS = 4, 3, 4

_LOGGED = {"loss": "Training loss", "eval_loss": "Evaluation loss", "reward": "Reward"}
"""What the trainer logs, and what it is called."""

_WHOLE = "\N{NO-BREAK SPACE}"


def summary(store: Store) -> str:
    """What changed most between the first and the last observation, when, and the events.

    Plain text of about 20 lines of 72 columns, from the readings of these quantities, whoever
    measured them, as far as they are there:

    - what the trainer logged: `trainer/loss`, `eval_loss` and `reward`, the first value and the
      last, and their steps.
    - each probe: probability and rank of its target, first and last; the four probes whose
      probability changed most. A rank is the number of tokens that are likelier.
    - heads whose attention, and parts whose activations, are farthest from the first observation.
    - heads that took or lost a role, by the thresholds of `Watch`, or where none did, those whose
      score in a role (minimum over the block lengths) changed most, from 0.01 on.
    - what the repetition of a random block gains, where it changed by 0.01 nats: of the block
      length that gains least.
    - heads and MLPs whose direct attribution changed most.
    - events, and where shadow and model differed most (`fidelity/max_abs_diff`).

    "most in steps 10-20" says that of all intervals between neighbouring observations the one from
    step 10 to step 20 has the largest change. A store with none of these keys gives the keys whose
    values changed most for their size, |last - first| / |first| in norms. With one observation,
    and from readings that were made once, there are values only.

    Raises:
        ValueError: for a store without a complete step.
    """
    history = History(store)
    if not history.steps:
        raise ValueError(f"{store.path} has no complete step, so there is nothing to say.")
    known = [
        *_logged(history),
        *targets(history),
        *moved(history),
        *_roles(history),
        *repeats(history),
        *_writers(history),
    ]
    if not known:
        known = unknown(history)
    return "\n".join([_opening(history), *known, *_events(history), *_fidelity(history)])


def paragraph(text: str) -> str:
    """Lines of `WIDTH` columns, all but the first indented; never broken at a `whole` space."""
    lines = wrap(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_WHOLE, " ")


def whole(text: str) -> str:
    """Something that stays on one line."""
    return text.replace(" ", _WHOLE)


def targets(history: History, *, same: str = "") -> Iterator[str]:
    """A line for each of the probes whose target's probability changed most; `same` as `arrow`."""
    found = []
    for key in history.keys(Quantity.ANSWER_PROBABILITY, numbers=True):
        probe = probe_of(key) or ""
        if chance := history.number(key):
            ranks = history.keys(Quantity.ANSWER_RANK, numbers=True)
            rank = next((one for one in ranks if probe_of(one) == probe), None)
            found.append((probe, chance, history.number(rank) if rank else None))
    found.sort(key=lambda one: -np.nan_to_num(one[1].size))
    width = max([len(_short(probe)) for probe, _, _ in found[:_PROBES]], default=0)
    ranked = False
    for probe, chance, rank in found[:_PROBES]:
        line = (
            f"P(target) {_short(probe):{width}} {arrow(chance, _probability, same)}{when(chance)}"
        )
        # Nothing is above a logit that is not a number.
        if rank and np.isfinite([chance.first, chance.last]).all():
            ranked = True
            line += f", rank {arrow(rank, lambda value: f'{value:.0f}', same)}"
        yield paragraph(line)
    if (left := len(found) - _PROBES) > 0:
        yield f"  and {left} more probe{'s' * (left > 1)}"
    if ranked:
        yield "  (rank: how many tokens are likelier)"


def moved(history: History) -> Iterator[str]:
    """The heads whose attention moved most, and where activations did."""
    if heads := moved_heads(history, _HEADS):
        yield paragraph(f"Attention moved most: {listed(heads)} (JS divergence, 1 bit at most)")
    elif (
        (key := history.key(Quantity.ATTENTION_CHANGE))
        and (ends := history.ends(key))
        and len(history.observed) > 1
    ):
        if np.isfinite(ends[1].values).all():
            yield f"Attention has not moved: no head by {LEAST:.0e} bits of JS divergence."
        else:
            yield "How far attention moved is not a number."
    if parts := moved_layers(history, 3):
        yield paragraph(f"Activations moved most: {listed(parts)} (cosine distance)")


def two_digits(value: float) -> str:
    """Two digits behind the point, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def arrow(change: Change, show: Callable[[float], str] = two_digits, same: str = "") -> str:
    """First -> last; one of them, and `same` behind it, where they look the same."""
    first, last = show(change.first), show(change.last)
    return f"{last}{same}" if first == last else f"{first} -> {last}"


def listed(values: Iterable[tuple[str, float]], form: str = ".3g") -> str:
    """Names with their values."""
    return ", ".join(whole(f"{name} {value:{form}}") for name, value in values)


def when(change: Change) -> str:
    """Between which steps it changed most."""
    return f" (most in steps {change.when[0]}-{change.when[1]})" if change.when else ""


def change_list(changes: Sequence[Change], most: int) -> str:
    """Names with both values, and how many more there are."""
    parts = [whole(f"{change.what} {arrow(change)}{when(change)}") for change in changes[:most]]
    left = len(changes) - most
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")


def _opening(history: History) -> str:
    steps = history.observed or [step for steps in history.steps.values() for step in steps]
    looks = f"{len(steps)} observations, steps {min(steps)} to {max(steps)}"
    if len(steps) == 1:
        looks = f"1 observation, step {steps[0]}"
    of_probes = Quantity.ANSWER_PROBABILITY, Quantity.TOKEN_LOSS, Quantity.NEXT_TOKEN
    probes = {probe for key in history.keys(*of_probes) if (probe := probe_of(key))}
    said = [looks]
    if probes:
        said.append(f"{len(probes)} probe{'s' * (len(probes) > 1)}")
    for key in history.keys(Quantity.ATTENTION_CHANGE, Quantity.HEAD_ROLE):
        if ends := history.ends(key):
            layers, heads = ends[1].values.shape[-2:]
            said.append(f"{layers} layers x {heads} heads")
            break
    return ", ".join(said)


def _logged(history: History) -> Iterator[str]:
    for name, said in _LOGGED.items():
        values: dict[str, float] = {}
        steps = history.steps.get(f"trainer/{name}", [])
        for step in [*steps[:1], *steps[-1:]]:
            reading = history.store.reading(f"trainer/{name}", step)
            values |= dict(zip(reading.labels["update"], reading.values.tolist(), strict=True))
        if values:
            (at, first), (end, last) = next(iter(values.items())), [*values.items()][-1]
            line = f"{said} {arrow(Change(name, first, last), lambda value: f'{value:.3g}')}"
            yield f"{line} (logged at steps {at} and {end})" if at != end else f"{line} (step {at})"


def _roles(history: History) -> Iterator[str]:
    gained, lost = roles_taken(history, Watch())
    if gained:
        yield paragraph(f"Roles gained: {change_list(gained, _HEADS)}")
    if lost:
        yield paragraph(f"Roles lost: {change_list(lost, _HEADS)}")
    if not gained and not lost and (changes := changed_roles(history, 3)):
        said = "No role gained or lost by the end; scores changed most"
        yield paragraph(f"{said}: {change_list(changes, 3)}")


def repeats(history: History) -> Iterator[str]:
    """How learning in context changed."""
    key = history.key(Quantity.REPEAT_GAIN)
    change = history.number(key) if key else None
    if change and change.size >= 0.01:
        said = "Loss of a repeated block, second time less first, at the worst length"
        yield paragraph(f"{said}: {arrow(change)} nats{when(change)}")


def attributed(history: History) -> list[str]:
    """The probes whose answer was attributed to heads and MLPs."""
    keys = history.keys(Quantity.DIRECT_EFFECT)
    return list(dict.fromkeys(probe for key in keys if (probe := probe_of(key))))


def _writers(history: History) -> Iterator[str]:
    found = [
        (change, probe)
        for probe in attributed(history)
        for change in changed_writers(history, probe, 3)
    ]
    found.sort(key=lambda one: -one[0].size)
    # One entry a component: a head that writes one probe's answer often writes the others' too.
    best = {change.what: (change, probe) for change, probe in reversed(found)}
    shown = sorted(best.values(), key=lambda one: -one[0].size)[:3]
    if shown:
        parts = [
            whole(f"{change.what} {arrow(change)} for {_short(probe)}") for change, probe in shown
        ]
        yield paragraph(f"Direct attribution changed most: {', '.join(parts)} (logits)")


def unknown(history: History) -> list[str]:
    """Of a store with none of the package's keys: what changed most, or some values."""
    found = changed_keys(history, 5)
    if found:
        return [
            "Changed most for their size:",
            *[
                paragraph(f"  {one.what} {arrow(one, lambda value: f'{value:.4g}')}")
                for one in found
            ],
        ]
    numbers = [history.number(key) for key in history.steps if key.split("/")[0] != "cost"]
    return [f"  {one.what} {one.last:.4g}" for one in numbers if one][:5]


def _events(history: History) -> list[str]:
    found: list[tuple[int, str]] = []
    for step in history.steps.get("watch/events", []):
        texts = history.store.reading("watch/events", step).texts
        found += [] if texts is None else [(step, text) for text in texts.tolist()]
    lines = [
        shorten(f"step {step}: {text}", WIDTH - 2, placeholder=" ...")
        for step, text in found[:_EVENTS]
    ]
    if left := len(found) - len(lines):
        lines.append(f"and {left} more")
    return ["Events:", *(f"  {line}" for line in lines)] if found else []


def _fidelity(history: History) -> list[str]:
    found = history.all("fidelity/max_abs_diff")
    if not found:
        return []
    worst = max(found, key=lambda step: np.nan_to_num(found[step].values, nan=np.inf))
    line = f"Shadow against model, at worst: {float(found[worst].values):.1e} logits"
    if worst in history.steps.get("fidelity/kl", []):
        kl = float(history.store.reading("fidelity/kl", worst).values)
        line += f", KL {kl:.0e} nats"
    return [f"{line} (step {worst})"]


def _probability(value: float) -> str:
    """Three digits, also near 1; "<1e-4" says no more than is worth saying."""
    return "<1e-4" if value < 1e-4 else f"{value:.3f}" if value >= 0.001 else f"{value:.4f}"


def _short(probe: str) -> str:
    return shorten(probe, 24, placeholder="...") if len(probe) > 24 else probe
