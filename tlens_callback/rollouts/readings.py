"""Turns what was seen of rollouts into readings."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tlens_callback.instruments.parts.predictions import most_frequent
from tlens_callback.instruments.parts.selection import layer_labels
from tlens_callback.instruments.parts.texts import token_texts
from tlens_callback.probes import ProbeBatch
from tlens_callback.reading import Reading
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.meanings import HEAD_MEASURES, HEAD_UNITS, LAYER_UNITS
from tlens_callback.rollouts.seen import Seen, layers_of, reading
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.rollouts.winners import contrasts
from tlens_callback.shadow import Shadow

_OFF = 0.1
"""A sampler whose probability of a token differs by more than this share is off."""


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
    yield reading("group", group.float().numpy(), ("rollout",), "index", labels)
    rewards = np.array([one.rewards for one in of], np.float32).reshape(len(of), -1)
    if seen.names:
        both = labels | {"function": list(seen.names)}
        yield reading("rewards", rewards, ("rollout", "function"), "reward", both)
    _add_sampler(seen)
    yield from seen.of_tokens()
    length = torch.tensor([float(len(one.completion)) for one in of], dtype=torch.float32)
    facts = {"advantage": seen.advantage}
    if seen.names:
        facts["weighted_reward"] = torch.tensor([one.reward for one in of], dtype=torch.float32)
    facts["length"] = length
    if seen.truncated is not None:
        facts["truncated"] = torch.tensor([float(not one.ended) for one in of], dtype=torch.float32)
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
            yield reading(name, share, ("rank",), "fraction", {}, (0.0, 1.0), texts)
    yield from _inside(seen, shadow)
    sets = torch.tensor([one.group if one.compared is None else one.compared for one in of])
    compared = [*contrasts(seen, settings, shadow, baseline, sets, length, step)]
    yield from compared
    if seen.features is not None:
        told = (one for one in compared if one.measure == "contrast_feature")
        top = next((one.texts for one in told if np.isfinite(one.values).any()), None)
        yield from _features(seen, seen.features, top, settings.features)


def _features(
    seen: Seen, features: Features, top: np.ndarray | None, most: int
) -> Iterator[Reading]:
    """Some features of each rollout and of each token: those that are of interest in any case, and
    those that differ most between winners and losers, or else those of largest mean."""
    means = seen.inside["feature"]
    numbers = {name: i for i, name in enumerate(features.names)}
    others = [numbers[str(name)] for name in top] if top is not None else []
    if top is None:
        others = means.abs().mean(0).argsort(descending=True, stable=True)[:most].tolist()
    shown = list(dict.fromkeys([*features.shown, *others]))[:most]
    if not shown:
        return
    values = features.at_tokens(shown).cpu()[:, seen.back].numpy()
    for i, of in zip(shown, values, strict=True):
        name = features.names[i]
        yield from seen.of_rollouts({f"mean_feature/{name}": means[:, i]})
        yield seen.row_reading(f"feature/{name}", of, "activation")


def _add_sampler(seen: Seen) -> None:
    """Adds what the trainer knows of each token."""
    pairs = list(zip(seen.rollouts, seen.sizes, strict=True))
    trained = [t for one, n in pairs for t in (one.trained or (True,) * n)[:n]]
    seen.tokens["trained"] = torch.tensor(trained, dtype=torch.float32)
    if all(one.sampled_with is not None for one in seen.rollouts):
        known = [x for one, n in pairs for x in (one.sampled_with or ())[:n]]
        sampler = torch.tensor(known, dtype=torch.float32)
        seen.tokens["sampler_logp"] = sampler
        seen.tokens["sampler_gap"] = seen.tokens["logp"] - sampler


def _curves(seen: Seen) -> Iterator[Reading]:
    counted = seen.tokens["trained"] > 0
    if seen.names:
        reward = torch.tensor([one.reward for one in seen.rollouts], dtype=torch.float32)
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
            labels = rollout | layers_of(name, shadow)
            values = seen.inside[name].numpy()
            yield reading(name, values, ("rollout", "layer", "head"), HEAD_UNITS[name], labels)
    for name in ("mlp_direct", "lens_logp"):
        if name in seen.inside:
            values, unit = seen.inside[name].numpy(), LAYER_UNITS[name]
            yield reading(name, values, ("rollout", "layer"), unit, rollout)
    if seen.attention:
        width = max(len(seen.rollouts[i].prompt) + seen.sizes[i] for i in seen.attention)
        first = next(iter(seen.attention.values()))
        rows = np.full((len(seen.attention), *first.shape[:2], width), np.nan, np.float32)
        for row, (i, keys) in enumerate(seen.attention.items()):
            n = len(seen.rollouts[i].prompt) + seen.sizes[i]
            rows[row, ..., :n] = keys[..., :n].numpy()
        labels = {"rollout": [seen.labels[i] for i in seen.attention]}
        yield reading(
            "attention",
            rows,
            ("rollout", "layer", "head", "key"),
            "probability",
            labels | layer_labels(shadow.attention_layers, shadow),
            (0.0, 1.0),
        )
