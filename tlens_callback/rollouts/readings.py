"""Turns what was seen of rollouts into readings."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.predictions import most_frequent
from tlens_callback.instruments.parts.selection import layer_labels
from tlens_callback.instruments.parts.unembed import token_texts
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.rollouts.contrast import Contrast, contrast, over_observations
from tlens_callback.rollouts.inside import Part
from tlens_callback.rollouts.meanings import (
    CURVES,
    HEAD_MEASURES,
    HEAD_UNITS,
    LAYER_UNITS,
    ROLLOUT_MEASURES,
    TOKEN_MEASURES,
)
from tlens_callback.rollouts.rollout import Rollout
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.shadow import Shadow

NAME = "rollouts"

_OFF = 0.1
"""A sampler whose probability of a token differs by more than this share is off."""


@dataclass(eq=False)
class Seen:
    """What was seen of some rollouts.

    Attributes:
        rollouts: in the order in which they are shown.
        sizes: [rollout], how many tokens of each completion were looked at.
        tokens: measure -> [token], those of all rollouts in turn.
        order: [token], where each token of the passes, in their order, is among those.
        inside: measure -> [rollout, ...], of heads, MLPs and neurons.
        attention: number of a rollout -> [layer, head, key].
        moved: "gained", "lost" -> ids of the tokens of some positions, and by how much.
        dead, truncated: shares of all groups and of all rollouts of the generation; None: nothing
            was sampled.
        age: updates since they were sampled; None: not known.
        names: of the reward functions.
    """

    rollouts: Sequence[Rollout]
    sizes: list[int]
    tokens: dict[str, Float[Tensor, " token"]]
    order: Int[Tensor, " token"]
    inside: dict[str, Tensor]
    attention: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[str, tuple[Tensor, Tensor]] | None = None
    dead: float | None = None
    truncated: float | None = None
    age: int | None = None
    names: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        rollouts: Sequence[Rollout],
        parts: Sequence[Part],
        tokens: Mapping[str, Tensor],
        inside: Sequence[Mapping[str, Tensor]],
    ) -> "Seen":
        """Puts what the parts gave into the order of the rollouts."""
        which = [i for part in parts for i in part.which]
        sizes_of = dict(zip(which, [n for part in parts for n in part.sizes], strict=True))
        sizes = [sizes_of[i] for i in range(len(rollouts))]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        order = torch.from_numpy(
            np.concatenate([np.arange(starts[i], starts[i + 1]) for i in which])
        )
        back = order.argsort()
        rows = torch.tensor(which).argsort()
        return cls(
            rollouts,
            sizes,
            {name: value[back] for name, value in tokens.items()},
            order,
            {name: torch.cat([one[name] for one in inside])[rows] for name in inside[0]},
        )

    @property
    def back(self) -> Int[Tensor, " token"]:
        """[token], where each token is in the order of the passes."""
        return self.order.argsort()

    @property
    def advantage(self) -> Float[Tensor, " rollout"]:
        """The advantage of each rollout."""
        return torch.tensor([one.advantage for one in self.rollouts])

    def sums(self, measure: str) -> Float[Tensor, " rollout"]:
        """Sums a measure over the tokens of each rollout."""
        return torch.stack([one.sum() for one in self.tokens[measure].split(self.sizes)])

    def means(self, measure: str) -> Float[Tensor, " rollout"]:
        """The mean of a measure over the tokens of each rollout."""
        return self.sums(measure) / torch.tensor(self.sizes)

    def of_tokens(self) -> Iterator[Reading]:
        """Yields the measures of each token."""
        for name, (_, unit) in TOKEN_MEASURES.items():
            if name in self.tokens:
                limits = {"js": (0.0, math.log(2)), "trained": (0.0, 1.0)}.get(name)
                yield self._rows(name, self.tokens[name].numpy(), unit, limits)

    def of_rollouts(self, measures: Mapping[str, Tensor]) -> Iterator[Reading]:
        """Yields measures of each rollout."""
        for name, values in measures.items():
            unit = ROLLOUT_MEASURES[name][1]
            limits = (0.0, 1.0) if name == "truncated" else None
            labels = {"rollout": self.labels}
            yield _reading(name, values.numpy(), ("rollout",), unit, labels, limits)

    def curve(self, name: str, value: float | Tensor) -> Reading:
        """The reading of one number of the observation."""
        return _reading(name, np.array(float(value)), (), CURVES[name][1])

    @property
    def labels(self) -> list[str]:
        """Names of the rollouts."""
        return [one.name for one in self.rollouts]

    def _rows(
        self,
        name: str,
        values: np.ndarray,
        unit: str,
        limits: tuple[float, float] | None = None,
        texts: Sequence[str] | None = None,
    ) -> Reading:
        """A reading of [rollout, pos]: NaN and no text where a rollout has no token."""
        rows = np.full((len(self.sizes), max(self.sizes)), np.nan, np.float32)
        real = np.arange(rows.shape[1]) < np.array(self.sizes)[:, None]
        rows[real] = values
        words = None
        if texts is not None:
            words = np.full(rows.shape, "", np.asarray(texts).dtype)
            words[real] = texts
        return _reading(
            name, rows, ("rollout", "pos"), unit, {"rollout": self.labels}, limits, words
        )

    def written(self, batch: ProbeBatch) -> Iterator[Reading]:
        """Yields the tokens of completions and prompts, as ids and texts."""
        ids = [
            i for one, n in zip(self.rollouts, self.sizes, strict=True) for i in one.completion[:n]
        ]
        name = {i: batch.token_text(i) for i in {*ids}}
        yield self._rows("token", np.array(ids), "index", None, [name[i] for i in ids])
        groups = list(dict.fromkeys((one.group, one.prompt) for one in self.rollouts))
        width = max(len(prompt) for _, prompt in groups)
        rows = np.full((len(groups), width), np.nan, np.float32)
        words = np.full(rows.shape, "", object)
        for row, (_, prompt) in enumerate(groups):
            rows[row, : len(prompt)] = prompt
            words[row, : len(prompt)] = [batch.token_text(i) for i in prompt]
        labels = {"group": [str(group + 1) for group, _ in groups]}
        yield _reading(
            "prompt", rows, ("group", "pos"), "index", labels, None, words.astype(np.str_)
        )


def readings_of(
    seen: Seen,
    settings: Rollouts,
    shadow: Shadow,
    batch: ProbeBatch,
    baseline: dict[str, Tensor],
    step: int,
) -> Iterator[Reading]:
    """Yields all readings of the rollouts of an observation."""
    of = seen.rollouts
    if settings.texts:
        yield from seen.written(batch)
    numbers = {group: i for i, group in enumerate(dict.fromkeys(one.group for one in of))}
    group = torch.tensor([numbers[one.group] for one in of])
    labels = {"rollout": seen.labels}
    yield _reading("group", group.float().numpy(), ("rollout",), "index", labels)
    rewards = np.array([one.rewards for one in of], np.float32).reshape(len(of), -1)
    if seen.names:
        both = labels | {"function": list(seen.names)}
        yield _reading("rewards", rewards, ("rollout", "function"), "reward", both)
    _add_sampler(seen)
    yield from seen.of_tokens()
    length = torch.tensor([float(len(one.completion)) for one in of])
    facts = {"advantage": seen.advantage}
    if seen.names:
        facts["weighted_reward"] = torch.tensor([one.reward for one in of])
    facts["length"] = length
    if seen.truncated is not None:
        facts["truncated"] = torch.tensor([float(not one.ended) for one in of])
    for measure in ("logp", "log_ratio"):
        if measure in seen.tokens:
            facts[f"sum_{measure}"] = seen.sums(measure)
    for measure in ("logp", "log_ratio", "entropy", "js", "kl"):
        if measure in seen.tokens:
            facts[f"mean_{measure}"] = seen.means(measure)
    facts["lens_layer"] = seen.inside["lens_layer"]
    yield from seen.of_rollouts(facts)
    yield from _curves(seen)
    if seen.moved is not None and settings.texts:
        for name, (tokens, sizes) in seen.moved.items():
            token, share = most_frequent(tokens.numpy(), sizes.numpy(), min(20, tokens.numel()))
            texts = token_texts(token, batch)
            yield _reading(name, share, ("rank",), "fraction", {}, (0.0, 1.0), texts)
    yield from _inside(seen, shadow)
    sets = torch.tensor([one.group if one.compared is None else one.compared for one in of])
    yield from _contrasts(seen, settings, shadow, baseline, sets, length, step)


def _add_sampler(seen: Seen) -> None:
    """Adds what the trainer knows of each token."""
    pairs = list(zip(seen.rollouts, seen.sizes, strict=True))
    trained = [t for one, n in pairs for t in (one.trained or (True,) * n)[:n]]
    seen.tokens["trained"] = torch.tensor(trained, dtype=torch.float32)
    if all(one.sampled_with is not None for one in seen.rollouts):
        sampler = torch.tensor([x for one, n in pairs for x in (one.sampled_with or ())[:n]])
        seen.tokens["sampler_logp"] = sampler
        seen.tokens["sampler_gap"] = seen.tokens["logp"] - sampler


def _curves(seen: Seen) -> Iterator[Reading]:
    counted = seen.tokens["trained"] > 0
    if seen.names:
        reward = torch.tensor([one.reward for one in seen.rollouts])
        yield seen.curve("reward_mean", reward.nanmean())
    for name in ("entropy", "kl", "js"):
        if name in seen.tokens:
            yield seen.curve(f"{name}_mean", seen.tokens[name][counted].mean())
    if "log_ratio" in seen.tokens:
        # TRL's estimate of KL(now || base) at sampled tokens: exp(d) - d - 1, d = ln p0 - ln p.
        d = -seen.tokens["log_ratio"][counted]
        yield seen.curve("kl_k3", (d.exp() - d - 1).mean())
    if "sampler_gap" in seen.tokens:
        ratio = seen.tokens["sampler_gap"].exp()
        yield seen.curve("off_policy", ((ratio - 1).abs() > _OFF)[counted].float().mean())
    if seen.dead is not None and seen.truncated is not None:
        yield seen.curve("dead_groups", seen.dead)
        yield seen.curve("truncated_share", seen.truncated)
    if seen.age is not None:
        yield seen.curve("age", seen.age)


def _inside(seen: Seen, shadow: Shadow) -> Iterator[Reading]:
    rollout = {"rollout": seen.labels}
    for name in HEAD_MEASURES:
        if name in seen.inside:
            labels = rollout | _layers(name, shadow)
            values = seen.inside[name].numpy()
            yield _reading(name, values, ("rollout", "layer", "head"), HEAD_UNITS[name], labels)
    for name in ("mlp_direct", "lens_logp"):
        if name in seen.inside:
            values, unit = seen.inside[name].numpy(), LAYER_UNITS[name]
            yield _reading(name, values, ("rollout", "layer"), unit, rollout)
    if seen.attention:
        width = max(len(seen.rollouts[i].prompt) + seen.sizes[i] for i in seen.attention)
        first = next(iter(seen.attention.values()))
        rows = np.full((len(seen.attention), *first.shape[:2], width), np.nan, np.float32)
        for row, (i, keys) in enumerate(seen.attention.items()):
            n = len(seen.rollouts[i].prompt) + seen.sizes[i]
            rows[row, ..., :n] = keys[..., :n].numpy()
        labels = {"rollout": [seen.labels[i] for i in seen.attention]}
        yield _reading(
            "attention",
            rows,
            ("rollout", "layer", "head", "key"),
            "probability",
            labels | layer_labels(shadow.attention_layers, shadow),
            (0.0, 1.0),
        )


def _contrasts(
    seen: Seen,
    settings: Rollouts,
    shadow: Shadow,
    baseline: dict[str, Tensor],
    group: Tensor,
    length: Tensor,
    step: int,
) -> Iterator[Reading]:
    """Compares winners and losers by all numbers at once, so that one rate covers all of them."""
    names = [name for name in (*HEAD_MEASURES, *LAYER_UNITS, "neuron") if name in seen.inside]
    gain = seen.advantage
    if not names or gain.isnan().any():
        return
    flat = [seen.inside[name].flatten(1) for name in names]
    found = contrast(
        torch.cat(flat, 1), gain, group, length, permutations=settings.permutations, seed=step
    )
    run = _run(baseline, found)
    at = 0
    for name, of in zip(names, flat, strict=True):
        here = slice(at, at + of.shape[1])
        at += of.shape[1]
        shape = seen.inside[name].shape[1:]
        one = Contrast(**{field: value[here] for field, value in vars(found).items()})
        mine = None if run is None else tuple(part[here] for part in run[:2])
        if name == "neuron":
            yield from _neurons(one, mine, shape[1], settings.neurons)
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
        axes, labels = ("layer", "head")[: len(shape)], _layers(name, shadow)
        for suffix, values, unit, limits in parts:
            shaped = values.view(shape).float().numpy()
            yield _reading(f"contrast_{name}{suffix}", shaped, axes, unit, labels, limits)
    yield seen.curve("discoveries", int((found.q <= settings.fdr).sum()))
    if run is not None:
        yield seen.curve("run_discoveries", int((run[1] <= settings.fdr).sum()))
    yield seen.curve("looked_at", found.q.numel())


def _neurons(
    found: Contrast, run: tuple[Tensor, ...] | None, width: int, k: int
) -> Iterator[Reading]:
    """The neurons with the smallest q; of equal ones those farthest from chance."""
    order = np.lexsort((-found.z.nan_to_num().abs().numpy(), found.q.numpy()))
    top = torch.from_numpy(order[:k].copy())
    if not len(top):
        return
    texts = np.array([f"L{int(i) // width}N{int(i) % width}" for i in top])
    parts = [
        ("", found.value, "activation"),
        ("_q", found.q, "fraction"),
        ("_length", found.length, "correlation"),
    ]
    if run is not None:
        parts += [("_run", run[0], "sd"), ("_run_q", run[1], "fraction")]
    for suffix, values, unit in parts:
        numbers = values[top].float().numpy()
        yield _reading(f"contrast_neuron{suffix}", numbers, ("rank",), unit, {}, None, texts)


def _run(baseline: dict[str, Tensor], found: Contrast) -> tuple[Tensor, Tensor, Tensor] | None:
    """z and q over all observations so far, with this one, and the mean sign; None before the
    first with spread."""
    n, z, signs = (baseline.get(name) for name in ("n", "z", "signs"))
    if n is None or z is None or signs is None or z.shape != found.z.shape:
        n, z, signs = torch.tensor(0), torch.zeros_like(found.z), torch.zeros_like(found.z)
    if not found.value.isnan().all():
        # A model whose activations are not finite says nothing for a while.
        n, z = n.cpu() + 1, z.cpu() + found.z.nan_to_num()
        signs = signs.cpu() + found.value.nan_to_num().sign()
    baseline |= {"n": n, "z": z, "signs": signs}
    if not (times := int(n)):
        return None
    return *over_observations(z.cpu(), times), signs.cpu() / times


def _layers(name: str, shadow: Shadow) -> dict[str, list[str]]:
    whole = name in ("direct", *LAYER_UNITS)
    layers = range(shadow.n_layers) if whole else shadow.attention_layers
    return dict(layer_labels(list(layers), shadow))


def _reading(
    name: str,
    values: np.ndarray,
    axes: tuple[str, ...],
    unit: str,
    labels: Mapping[str, Sequence[str]] | None = None,
    limits: tuple[float, float] | None = None,
    texts: np.ndarray | None = None,
) -> Reading:
    return Reading(
        key=f"{NAME}/{name}",
        values=values,
        axes=axes,
        unit=unit,
        labels=labels or {},
        limits=limits,
        texts=texts,
    )
