"""Compares winners with losers, and turns what is found into readings."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from tlens_callback.instruments.parts.selection import neuron_layers
from tlens_callback.reading import Reading
from tlens_callback.rollouts.contrast import Contrast, contrast, over_observations, tails
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.meanings import HEAD_MEASURES, HEAD_UNITS, LAYER_UNITS
from tlens_callback.rollouts.seen import Seen, layers_of, reading
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.shadow import Shadow


def contrasts(
    seen: Seen,
    settings: Rollouts,
    shadow: Shadow,
    baseline: dict[str, Tensor],
    group: Tensor,
    length: Tensor,
    step: int,
) -> Iterator[Reading]:
    """Compares winners and losers by all numbers at once, so that one rate covers all of them."""
    every = (*HEAD_MEASURES, *LAYER_UNITS, "neuron", "feature")
    names = [name for name in every if name in seen.inside]
    gain = seen.advantage
    if not names or gain.isnan().any():
        return
    flat = [seen.inside[name].flatten(1) for name in names]
    found = contrast(
        torch.cat(flat, 1), gain, group, length, permutations=settings.permutations, seed=step
    )
    run = _run(baseline, found, seen.features)
    at = 0
    for name, of in zip(names, flat, strict=True):
        here = slice(at, at + of.shape[1])
        at += of.shape[1]
        shape = seen.inside[name].shape[1:]
        one = Contrast(**{field: value[here] for field, value in vars(found).items()})
        mine = None if run is None else tuple(part[here] for part in run[:2])
        if name == "neuron":
            layers = neuron_layers(shadow)
            yield from _top(
                name,
                one,
                mine,
                settings.neurons,
                lambda i, n=shape[1], layers=layers: f"L{layers[i // n]}N{i % n}",
            )
            continue
        if name == "feature":
            assert seen.features is not None
            yield from _top(name, one, mine, settings.features, seen.features.names.__getitem__)
            continue
        parts = [
            ("", one.value, (HEAD_UNITS | LAYER_UNITS)[name], None),
            ("_q", one.q, "fraction", (0.0, 1.0)),
            ("_p", one.p, "fraction", (0.0, 1.0)),
            ("_length", one.length, "correlation", (-1.0, 1.0)),
        ]
        if mine is not None and run is not None:
            parts += [
                ("_run", mine[0], "sd", None),
                ("_run_q", mine[1], "fraction", (0.0, 1.0)),
                ("_sign", run[2][here], "fraction", (-1.0, 1.0)),
            ]
        axes, labels = ("layer", "head")[: len(shape)], layers_of(name, shadow)
        for suffix, values, unit, limits in parts:
            shaped = values.view(shape).float().numpy()
            yield reading(f"contrast_{name}{suffix}", shaped, axes, unit, labels, limits)
    yield seen.curve("discoveries", int((found.q <= settings.fdr).sum()))
    if run is not None:
        yield seen.curve("run_discoveries", int((run[1] <= settings.fdr).sum()))
    yield seen.curve("looked_at", found.q.numel())


def _top(
    measure: str,
    found: Contrast,
    run: tuple[Tensor, ...] | None,
    k: int,
    name_of: Callable[[int], str],
) -> Iterator[Reading]:
    """The neurons or features with the smallest q, of this observation or of the run so far; of
    equal ones those farthest from chance."""
    q, far = found.q, found.z.nan_to_num().abs()
    if run is not None:
        q, far = torch.minimum(q, run[1]), torch.maximum(far, run[0].nan_to_num().abs())
    order = np.lexsort((-far.numpy(), q.numpy()))
    top = torch.from_numpy(order[:k].copy())
    if not len(top):
        return
    texts = np.array([name_of(i) for i in top.tolist()])
    parts = [
        ("", found.value, "activation"),
        ("_q", found.q, "fraction"),
        ("_length", found.length, "correlation"),
    ]
    if run is not None:
        parts += [("_run", run[0], "sd"), ("_run_q", run[1], "fraction")]
    for suffix, values, unit in parts:
        numbers = values[top].float().numpy()
        yield reading(f"contrast_{measure}{suffix}", numbers, ("rank",), unit, {}, None, texts)


def _run(
    baseline: dict[str, Tensor], found: Contrast, features: Features | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """z and q over all observations so far, with this one, and the mean sign; None before the
    first with spread. Features begin anew where they are others than before."""
    own = [] if features is None else features.fixed
    which = torch.tensor(0 if features is None else features.identity)
    others, every = len(found.z) - len(own), len(found.z)
    fixed = torch.ones_like(found.z)
    fixed[others:] = torch.tensor(own, dtype=fixed.dtype)
    kept = every if int(baseline.get("features", which)) == int(which) else others
    sums = {name: torch.zeros_like(found.z) for name in ("n", "z", "tails", "signs")}
    for name, zeros in sums.items():
        before = baseline.get(name)
        if before is not None and before.ndim == 1 and len(before) >= kept:
            zeros[:kept] = before[:kept].cpu()
    if not found.value.isnan().all():
        # A model whose activations are not finite says nothing for a while.
        sums["n"] += fixed
        sums["z"] += fixed * found.z.nan_to_num()
        sums["tails"] += fixed * tails(found)
        sums["signs"] += fixed * found.value.nan_to_num().sign()
    baseline |= {**sums, "features": which}
    if not sums["n"].any():
        return None
    z, q = over_observations(sums["z"], sums["tails"], sums["n"])
    return z, q, sums["signs"] / sums["n"]
