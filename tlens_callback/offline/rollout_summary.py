"""Describes the rollouts of a run: how they changed, and what tells winners from losers now."""

from collections.abc import Callable, Iterator

import numpy as np

from tlens_callback.events.contrasts import Discoveries, Told, discoveries
from tlens_callback.meaning import Quantity
from tlens_callback.offline.changes import History
from tlens_callback.reading import Reading

_NAMED = 3


def rollouts_changed(history: History) -> Iterator[str]:
    """Describes reward, length, and the shares that were cut off and without spread, at the first
    and at the last observation that has rollouts, in one sentence."""
    instrument, steps = _observed(history)
    if not steps:
        return
    first, last = steps[0], steps[-1]

    def change(name: str, title: str, show: Callable[[float], str], unit: str = "") -> str | None:
        key = f"{instrument}/{name}"
        if not {first, last} <= {*history.steps.get(key, ())}:
            return None
        ends = [show(_mean(history.store.reading(key, step))) for step in (first, last)]
        return f"{title} {' -> '.join(dict.fromkeys(ends))}{unit}"

    facts = [
        change("reward_mean", "reward", "{:.3g}".format),
        change("length", "length", "{:.3g}".format, " tokens"),
        change("truncated_share", "cut off", "{:.0%}".format),
        change("dead_groups", "groups without spread", "{:.0%}".format),
    ]
    when = f"steps {first} to {last}" if first != last else f"step {first}"
    yield f"Rollouts, {when}: {', '.join(fact for fact in facts if fact)}"


def winners_and_losers(history: History, whole: Callable[[str], str]) -> Iterator[str]:
    """Describes what tells winners from losers at the last observation that has rollouts.

    Args:
        whole: makes a text that is not to be broken into lines.
    """
    instrument, steps = _observed(history)
    if not steps:
        return
    last = steps[-1]
    own = [key for key, at in history.steps.items() if last in at and _is_of(key, instrument)]
    wanted = {key for key in own if "rollout" not in (history.meaning(key).axes or ())}
    told = discoveries(history.store.readings(last, wanted), _NAMED)
    if told is None:
        return
    start = f"Winners and losers at step {last}:"
    if not told.spread:
        yield f"{start} no group has spread, so there are none to compare"
    else:
        yield f"{start} {_found(told, whole, several=len(steps) > 1)}"
    together = discoveries(history.store.readings(last, wanted), _NAMED, run=True)
    if together is not None and len(steps) > 1:
        yield f"Over all observations so far: {_found(together, whole, several=True)}"


def _found(told: Discoveries, whole: Callable[[str], str], *, several: bool) -> str:
    if not told.found:
        return f"none of {told.compared} numbers compared tells them apart"
    verb = "tells" if told.found == 1 else "tell"
    named = [_described(one, whole, several=several) for one in told.surest]
    if more := told.found - len(named):
        named.append(f"and {more} more")
    return f"{told.found} of {told.compared} numbers compared {verb} them apart: {'; '.join(named)}"


def _described(one: Told, whole: Callable[[str], str], *, several: bool) -> str:
    parts = [str(one), whole(f"q {one.q:.2g}")]
    if several and np.isfinite(one.sign):
        # The mean of signs of 1 and -1, as the share of those that are the sign of now.
        same = (1 + np.sign(one.value) * one.sign) / 2
        parts.append(f"same sign in {whole(f'{same:.0%} of')} observations")
    if one.may_be_length:
        parts.append(f"may be length ({whole(f'correlation {one.length:.2f}')})")
    return ", ".join(parts)


def _observed(history: History) -> tuple[str, list[int]]:
    """The instrument that looked at rollouts, and the steps at which it did."""
    key = history.key(Quantity.ROLLOUT_GROUP)
    return (key.split("/", 1)[0], history.steps[key]) if key else ("", [])


def _is_of(key: str, instrument: str) -> bool:
    return key.split("/", 1)[0] == instrument


def _mean(reading: Reading) -> float:
    known = reading.values[~np.isnan(reading.values)]
    return float(known.mean()) if known.size else float("nan")
