"""Two watched runs, side by side: the readings of a step of each, from their stores."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tlens_callback.events import Watch
from tlens_callback.instruments.parts.distance import js_terms, with_sink
from tlens_callback.offline.changes import History
from tlens_callback.offline.compare import Pair
from tlens_callback.offline.stages import name_reading
from tlens_callback.reading import TOKEN_AXES, Reading
from tlens_callback.store import Store

PATTERN = "attention_patterns/pattern/"

OF_ONE_RUN = (
    "cost",
    "trainer",
    "checkpoint",
    "watch",
    "activation_drift",
    "difference_lens",
    "update_sparsity",
    "frozen_weights",
    "adapter_spectrum/rotation",
    "contrast/cosine",
    "sparse_features/drift",
    "trained_features",
)
"""Beginnings of keys that say something of a run, or compare with a run's own first observation by
what its store does not hold. Of runs that began with one model their difference would say nothing
of B against A either."""

AGAIN = {
    "token_loss/change": "token_loss/loss",
    "logit_attribution/head_change": "logit_attribution/head",
    "logit_attribution/mlp_change": "logit_attribution/mlp",
    "pattern_change/pattern": "attention_patterns/pattern",
}
"""What is measured anew from what the stores hold: B's minus A's."""


def compare_stores(a: Store, b: Store, *, step: int | None = None) -> Pair:
    """The last observation of A and of B, or both at one step, with B's measured against A's.

    Readings that both have are taken as they are. What compares with the first observation of a run
    is made anew, of B against A: `token_loss/change`, the changes of `logit_attribution`,
    `residual_norms/ratio`, `pattern_change`, and `attention_drift` from the stored patterns, over
    the probes that it was measured on in either and that both have patterns of. So are the watch's
    events. Stored patterns are float16, with a relative error of 2**-12: js is off by 2**-11 bits
    at worst, usually by less than 3e-5. The rest of that kind cannot be made from a store and is
    left out (`OF_ONE_RUN`, under the instruments' own names), as what belongs to a run is.

    A probe whose tokens differ is left out, and so is what only one has, or has in another shape;
    `left_out` says so. Not seen in a store, and taken to be the same, are targets and foils.

    Args:
        step: None: the last observation of each, at whatever steps these are.

    Raises:
        ValueError: a step that is not in both, models of another shape, or nothing in common.
    """
    first, last = _step(a, step), _step(b, step)
    if first is None or last is None:
        raise ValueError(_no_step(a, b, step))
    about = _measured(a.about(first)), _measured(b.about(last))
    _demand_shape(*about)
    common, left_out = _common(*about)
    readings = [
        {reading.key: reading for reading in store.readings(at, common)}
        for store, at in ((a, first), (b, last))
    ]
    probes = {key.split("/", 2)[2] for of in about for key in of if _is_drift(key)}
    both = _against(readings[0], readings[1], probes)
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


def _step(store: Store, step: int | None) -> int | None:
    observed = History(store).observed
    if step is None:
        return observed[-1] if observed else None
    return step if step in observed else None


def _no_step(a: Store, b: Store, step: int | None) -> str:
    steps = [History(store).observed for store in (a, b)]
    empty = [str(store.path) for store, of in zip((a, b), steps, strict=True) if not of]
    if empty:
        return f"{' and '.join(empty)} has no complete observation, so there is nothing to compare."
    common = sorted(set(steps[0]) & set(steps[1]))
    are = f"they have {common} in common" if common else "they have no step in common"
    return (
        f"Step {step} is not in both: {a.path} has {steps[0]}, {b.path} has {steps[1]}; {are}."
        + " Without --step the last of each are compared." * (not common)
    )


def _measured(about: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        key: of
        for key, of in about.items()
        if not any(key == name or key.startswith((f"{name}/", f"{name}_")) for name in OF_ONE_RUN)
        and not key.startswith("sparse_features/drifting")
    }


def _is_drift(key: str) -> bool:
    return key.startswith("attention_drift/js/")


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
    a: Mapping[str, dict[str, Any]], b: Mapping[str, dict[str, Any]]
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
        on_blocks |= {"virtual_heads"} & {key.split("/")[0] for key in (*a, *b)}
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
    a: Mapping[str, Reading], b: Mapping[str, Reading], drifting: set[str]
) -> tuple[list[Reading], list[Reading]]:
    """The readings of both, with what is relative measured against A."""
    patterns = [key for key in a if key.startswith(PATTERN)]
    measured = [key for key in patterns if key.removeprefix(PATTERN) in drifting] or patterns
    sides: tuple[list[Reading], list[Reading]] = [], []
    for now, out in zip((a, b), sides, strict=True):
        for key, reading in now.items():
            instrument, measure, *probe = key.split("/", 2)
            of = AGAIN.get(f"{instrument}/{measure}")
            of = "/".join([of, *probe]) if of else None
            if of is not None and of in a and a[of].values.shape == reading.values.shape:
                out.append(replace(reading, values=now[of].values - a[of].values))
            elif key == "residual_norms/ratio":
                median = "residual_norms/median"
                out.append(replace(reading, values=now[median].values / a[median].values))
            elif of is None and not key.startswith("attention_drift/"):
                out.append(reading)
        out += _drift([(a[key], now[key]) for key in measured])
    return sides


def _drift(patterns: list[tuple[Reading, Reading]]) -> Iterator[Reading]:
    """As `AttentionDrift` measures it, of the second of each pair against the first."""
    patterns = [(one, other) for one, other in patterns if one.values.shape[-1] > 1]
    if not patterns:
        return
    js = [_js(one.values, other.values) for one, other in patterns]
    layers = {axis: n for axis, n in patterns[0][0].labels.items() if axis == "layer"}
    names = [one.key.removeprefix(PATTERN) for one, _ in patterns]
    mean = np.mean(js, 0)
    for key, values in (("js", mean), *((f"js/{n}", v) for n, v in zip(names, js, strict=True))):
        yield Reading(
            key=f"attention_drift/{key}",
            values=values,
            axes=("layer", "head"),
            unit="bits",
            labels=layers,
            limits=(0.0, 1.0),
        )
    for measure, value in (("max", mean.max()), ("mean", mean.mean())):
        values = np.asarray(value)
        yield Reading(
            key=f"attention_drift/{measure}", values=values, unit="bits", limits=(0.0, 1.0)
        )


def _js(first: np.ndarray, now: np.ndarray) -> np.ndarray:
    """[layer, head], from two patterns [layer, head, query, key], over the queries from 1 on."""
    out = []
    for p, q in zip(now, first, strict=True):
        one, other = (torch.from_numpy(np.array(x[:, 1:])) for x in (p, q))
        # A model with attention sinks of its own: more is missing from a row than rounding takes.
        if min(one.sum(-1).min(), other.sum(-1).min()) < 1 - 2**-7:
            one, other = with_sink(one), with_sink(other)
        out.append(js_terms(one, other).sum(-1).mean(-1).clamp(0, 1).numpy())
    return np.stack(out)
