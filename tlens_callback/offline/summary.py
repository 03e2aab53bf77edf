"""`summary` describes what a run changed inside its model, in a few lines for a commit message."""

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
from tlens_callback.offline.rollout_summary import rollouts_changed, winners_and_losers
from tlens_callback.store import Store

WIDTH = 72
"""Columns of the text, as for a commit message."""

_PROBES, _EVENTS, _HEADS = 4, 3, 4

_LOGGED = {"loss": "Training loss", "eval_loss": "Evaluation loss", "reward": "Reward"}
"""Name of a number that the trainer logs -> its name in the summary."""

_WHOLE = "\N{NO-BREAK SPACE}"


def summary(store: Store) -> str:
    """Describes what changed most between the first and the last observation, when, and the events.

    The text is plain, about 20 lines of 72 columns. It uses the readings of these quantities, from
    whatever instrument, as far as the store has them:

    - what the trainer logged: `trainer/loss`, `eval_loss` and `reward`, the first value and the
      last, and their steps.
    - rollouts: reward, length, and the shares that were cut off and of groups without spread, first
      and last; what tells winners from losers at the last observation that has rollouts, with its
      false discovery rate q, the share of observations with the same sign, and the correlation with
      length where that is above 0.7 in size.
    - each probe: probability and rank of its target, first and last; the four probes whose
      probability changed most. A rank is the number of tokens that are likelier.
    - heads whose attention, and parts whose activations, are farthest from the first observation.
    - heads that took or lost a role, by the thresholds of `Watch`; if there are none, the heads
      whose score in a role (minimum over the block lengths) changed most, by 0.01 or more.
    - what the repetition of a random block gains, at the block length that gains least, if it
      changed by 0.01 nats or more.
    - heads and MLPs whose direct attribution changed most.
    - events, and where shadow and model differed most (`fidelity/max_abs_diff`).

    "most in steps 10-20" means that, of all intervals between neighbouring observations, the one
    from step 10 to step 20 has the largest change. If the store has none of these keys, the summary
    names the keys whose values changed most relative to their size, |last - first| / |first| in
    norms. A reading that was made only once is given as a value without a change.

    Raises:
        ValueError: if the store has no complete step.
    """
    history = History(store)
    if not history.steps:
        raise ValueError(f"{store.path} has no complete step, so there is nothing to summarise.")
    known = [
        *_logged(history),
        *map(paragraph, rollouts_changed(history)),
        *map(paragraph, winners_and_losers(history, whole)),
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
    """Breaks a text into lines of `WIDTH` columns, but never at a space that `whole` protects.

    All lines but the first are indented.
    """
    lines = wrap(
        text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace(_WHOLE, " ")


def whole(text: str) -> str:
    """Protects the spaces of a text, so that `paragraph` keeps it on one line."""
    return text.replace(" ", _WHOLE)


def targets(history: History, *, same: str = "") -> Iterator[str]:
    """Describes the probes whose target's probability changed most, one line each.

    `same` is as in `arrow`.
    """
    chances = history.keys(Quantity.ANSWER_PROBABILITY, numbers=True)
    ranks: dict[str | None, str] = {}
    for key in history.keys(Quantity.ANSWER_RANK, numbers=True):
        ranks.setdefault(probe_of(key), key)
    changes = history.numbers([*chances, *ranks.values()])
    found = []
    for key in chances:
        if chance := changes.get(key):
            rank = changes.get(ranks.get(probe_of(key), ""))
            found.append((probe_of(key) or "", chance, rank))
    found.sort(key=lambda one: -np.nan_to_num(one[1].size))
    width = max([len(_short(probe)) for probe, _, _ in found[:_PROBES]], default=0)
    ranked = False
    for probe, chance, rank in found[:_PROBES]:
        line = (
            f"P(target) {_short(probe):{width}} {arrow(chance, _probability, same)}{when(chance)}"
        )
        # The rank means nothing if the target's logit is NaN.
        if rank and np.isfinite([chance.first, chance.last]).all():
            ranked = True
            line += f", rank {arrow(rank, lambda value: f'{value:.0f}', same)}"
        yield paragraph(line)
    if (left := len(found) - _PROBES) > 0:
        yield f"  and {left} more probe{'s' * (left > 1)}"
    if ranked:
        yield "  (rank: how many tokens are likelier)"


def moved(history: History) -> Iterator[str]:
    """Describes the heads whose attention moved most, and where activations moved most."""
    if heads := moved_heads(history, _HEADS):
        yield paragraph(f"Attention moved most: {listed(heads)} (JS divergence, 1 bit at most)")
    elif (
        (key := history.key(Quantity.ATTENTION_CHANGE))
        and (ends := history.ends(key))
        and len(history.observed) > 1
    ):
        if np.isfinite(ends[1].values).all():
            yield f"Attention has not moved: no head by {LEAST:.0e} bits JS divergence or more."
        else:
            yield "How far attention moved cannot be said: the values are NaN or infinite."
    if parts := moved_layers(history, 3):
        yield paragraph(f"Activations moved most: {listed(parts)} (cosine distance)")


def two_digits(value: float) -> str:
    """Formats a number with two digits after the point, and no minus before a zero."""
    return f"{round(value, 2) + 0.0:.2f}"


def arrow(change: Change, show: Callable[[float], str] = two_digits, same: str = "") -> str:
    """Formats a change as "first -> last", or as one value and `same` if both look the same."""
    first, last = show(change.first), show(change.last)
    return f"{last}{same}" if first == last else f"{first} -> {last}"


def listed(values: Iterable[tuple[str, float]], form: str = ".3g") -> str:
    """Formats names with their values as a list."""
    return ", ".join(whole(f"{name} {value:{form}}") for name, value in values)


def when(change: Change) -> str:
    """Formats the steps between which a number changed most; empty if these are unknown."""
    return f" (most in steps {change.when[0]}-{change.when[1]})" if change.when else ""


def change_list(changes: Sequence[Change], most: int) -> str:
    """Formats the first `most` changes as a list, and says how many more there are."""
    parts = [whole(f"{change.what} {arrow(change)}{when(change)}") for change in changes[:most]]
    left = len(changes) - most
    return ", ".join(parts) + (f" and {left} more" if left > 0 else "")


def _opening(history: History) -> str:
    steps = history.observed or [step for steps in history.steps.values() for step in steps]
    observations = f"{len(steps)} observations, steps {min(steps)} to {max(steps)}"
    if len(steps) == 1:
        observations = f"1 observation, step {steps[0]}"
    of_probes = Quantity.ANSWER_PROBABILITY, Quantity.TOKEN_LOSS, Quantity.NEXT_TOKEN
    probes = {probe for key in history.keys(*of_probes) if (probe := probe_of(key))}
    facts = [observations]
    if probes:
        facts.append(f"{len(probes)} probe{'s' * (len(probes) > 1)}")
    for key in history.keys(Quantity.ATTENTION_CHANGE, Quantity.HEAD_ROLE):
        if ends := history.ends(key):
            layers, heads = ends[1].values.shape[-2:]
            facts.append(f"{layers} layers x {heads} heads")
            break
    return ", ".join(facts)


def _logged(history: History) -> Iterator[str]:
    for name, title in _LOGGED.items():
        values: dict[str, float] = {}
        steps = history.steps.get(f"trainer/{name}", [])
        for step in [*steps[:1], *steps[-1:]]:
            reading = history.store.reading(f"trainer/{name}", step)
            values |= dict(zip(reading.labels["update"], reading.values.tolist(), strict=True))
        if values:
            (at, first), (end, last) = next(iter(values.items())), [*values.items()][-1]
            line = f"{title} {arrow(Change(name, first, last), lambda value: f'{value:.3g}')}"
            yield f"{line} (logged at steps {at} and {end})" if at != end else f"{line} (step {at})"


def _roles(history: History) -> Iterator[str]:
    gained, lost = roles_taken(history, Watch())
    if gained:
        yield paragraph(f"Roles gained: {change_list(gained, _HEADS)}")
    if lost:
        yield paragraph(f"Roles lost: {change_list(lost, _HEADS)}")
    if not gained and not lost and (changes := changed_roles(history, 3)):
        start = "No role gained or lost by the end; scores changed most"
        yield paragraph(f"{start}: {change_list(changes, 3)}")


def repeats(history: History) -> Iterator[str]:
    """Describes how learning in context changed."""
    key = history.key(Quantity.REPEAT_GAIN)
    change = history.number(key) if key else None
    if change and change.size >= 0.01:
        start = "Loss of a repeated block, second time minus first, at the worst length"
        yield paragraph(f"{start}: {arrow(change)} nats{when(change)}")


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
    # Name each component once: a head that writes the answer of one probe often writes those of
    # the others too.
    best = {change.what: (change, probe) for change, probe in reversed(found)}
    shown = sorted(best.values(), key=lambda one: -one[0].size)[:3]
    if shown:
        parts = [
            whole(f"{change.what} {arrow(change)} for {_short(probe)}") for change, probe in shown
        ]
        yield paragraph(f"Direct attribution changed most: {', '.join(parts)} (logits)")


def unknown(history: History) -> list[str]:
    """Describes a store with none of the known quantities: what changed most, or some values."""
    found = changed_keys(history, 5)
    if found:
        return [
            "Changed most relative to their size:",
            *[
                paragraph(f"  {one.what} {arrow(one, lambda value: f'{value:.4g}')}")
                for one in found
            ],
        ]
    numbers = history.numbers([key for key in history.steps if key.split("/")[0] != "cost"])
    return [f"  {one.what} {one.last:.4g}" for one in numbers.values()][:5]


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
    """Formats a probability with three or four digits after the point, or as "<1e-4"."""
    return "<1e-4" if value < 1e-4 else f"{value:.3f}" if value >= 0.001 else f"{value:.4f}"


def _short(probe: str) -> str:
    return shorten(probe, 24, placeholder="...") if len(probe) > 24 else probe
