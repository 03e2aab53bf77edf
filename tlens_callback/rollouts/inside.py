"""Runs rollouts through the shadow, and reduces what happens inside to numbers of each rollout."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tlens_callback.instruments.parts.direct import (
    before_norm,
    has_direct_path,
    mlp_hook,
)
from tlens_callback.instruments.parts.selection import (
    neuron_hook,
    neuron_layers,
    pattern_hook,
    resid_hook,
    similar_lengths,
    z_hook,
)
from tlens_callback.probes import Probe, ProbeBatch
from tlens_callback.rollouts.rollout import Rollout
from tlens_callback.shadow import LAST_LOGITS, Reduce, Shadow, Taken
from tlens_callback.shadow.unembed import CHUNK, demand_equal, gap, unembed

TOKENS = 2048
"""Tokens that are run at once; patterns and logits take memory in proportion."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some rollouts that are run together.

    Attributes:
        which: their numbers among all.
        batch: their tokens, prompt and completion.
        row, pos: [token], where each sampled token was predicted.
        tokens: [token], ids of the sampled tokens.
        prompts: [rollout], length of each prompt.
    """

    which: list[int]
    batch: ProbeBatch
    row: Int[Tensor, " token"]
    pos: Int[Tensor, " token"]
    tokens: Int[Tensor, " token"]
    prompts: Int[Tensor, " rollout"]

    @property
    def sizes(self) -> list[int]:
        """Number of sampled tokens of each rollout."""
        return torch.bincount(self.row, minlength=len(self.which)).tolist()

    @property
    def asks(self) -> Float[Tensor, "rollout pos"]:
        """Weights of the mean over the positions that read sampled tokens: those tokens' own."""
        weight = torch.zeros(self.batch.tokens.shape, dtype=torch.float32, device=self.row.device)
        weight[self.row, self.pos + 1] = 1
        return weight / weight.sum(1, keepdim=True)


class Inside(NamedTuple):
    """What a pass over a part gives.

    Attributes:
        resid: [token, d_model], the residual stream where each sampled token was predicted.
        numbers: measure -> [rollout, layer, head], [rollout, layer], [rollout] or [rollout, layer,
            neuron].
        received: [row of keys, layer, head, key], attention to each token; None: it has no layer
            with attention patterns.
        more: what the reductions that were added returned.
    """

    resid: Float[Tensor, "token d_model"]
    numbers: dict[str, Tensor]
    received: Float[Tensor, "row layer head key"] | None
    more: dict[str, Taken]


def parts(rollouts: Sequence[Rollout], batch: ProbeBatch, longest: int) -> list[Part]:
    """Puts rollouts of similar length together, each cut to `longest` tokens.

    Raises:
        ValueError: for tokens outside the vocabulary, or in the place of an image.
    """
    if batch.context is not None:
        longest = min(longest, batch.context)
    ids = [[*one.prompt, *one.completion][:longest] for one in rollouts]
    found = []
    for which in similar_lengths([len(one) for one in ids], TOKENS):
        here = batch.beside([Probe(str(i), ids[i]) for i in which])
        device = here.tokens.device
        row, pos = [], []
        for at, i in enumerate(which):
            for p in range(len(rollouts[i].prompt) - 1, len(ids[i]) - 1):
                row.append(at)
                pos.append(p)
        rows, places = torch.tensor(row, device=device), torch.tensor(pos, device=device)
        tokens = here.tokens[rows, places + 1]
        prompts = torch.tensor([len(rollouts[i].prompt) for i in which], device=device)
        found.append(Part(which, here, rows, places, tokens, prompts))
    return found


def last_residuals(shadow: Shadow, part: Part) -> Float[Tensor, "token d_model"]:
    """Runs a part, and returns the residual stream where its sampled tokens were predicted."""
    kept: list[Tensor] = []

    def keep(resid: Float[Tensor, "rollout pos d_model"]) -> Float[Tensor, " 0"]:
        kept.append(resid[part.row, part.pos])
        return resid.new_empty(0)

    shadow.run(part.batch, [{resid_hook(shadow.n_layers - 1): keep}])
    return kept[0]


def inside(
    shadow: Shadow, part: Part, keys: Sequence[int], more: Mapping[str, Reduce] | None = None
) -> Inside:
    """Runs a part once, and reduces attention, direct effects and neurons to numbers of a rollout.

    With S the tokens that a rollout samples, each measure of a head is a mean over them:

    - attention_first, attention_prompt, attention_answer: attention of a sampled token to the first
      token, to the others of the prompt, and to the sampled ones up to itself. Their sum is 1.
    - repetition: attention to the tokens that came after earlier ones equal to it, in the rollout,
      mean over those sampled tokens that have any; 0 if none has. It is `HeadScores`'
      prefix_matching, on the rollout itself.
    - direct: what the head adds directly to the logit of the next sampled token minus the mean
      logit, before the soft cap; as `LogitAttribution`. `mlp_direct` is that of the MLP.
    - neuron: mean activation.
    - lens_logp: log probability of the sampled token by the logit lens after each layer, and
      lens_layer, the first layer after which the token is the likeliest to the end; their number
      if it never is. Both are means over four of the tokens, evenly among all.

    Args:
        keys: the rollouts, by their rows in the part, whose attention to each token is kept.
        more: reductions that are to be run in the same pass.

    Raises:
        ValueError: for a family whose logits are not norm and unembedding of the last layer.
    """
    device = part.row.device
    asks, repeats = part.asks, _repeats(part)
    layers = range(shadow.n_layers)
    taps: dict[str, Reduce] = {}
    width = part.batch.tokens.shape[1]
    at = torch.arange(width, device=device)
    in_prompt = (at < part.prompts[:, None]).float()

    def attention(pattern: Float[Tensor, "rollout head query key"]) -> tuple[Tensor, ...]:
        of = pattern.float()
        # Products of matrices, since einsum would copy the patterns.
        each = (asks[:, None, None] @ of)[:, :, 0]
        first, prompt = each[..., 0], (each * in_prompt[:, None]).sum(2)
        repeated = (of.flatten(2) @ repeats.flatten(1)[:, :, None])[..., 0]
        return first, prompt - first, each.sum(2) - prompt, repeated, each[list(keys)]

    for i in shadow.attention_layers:
        taps[pattern_hook(i)] = attention
    directs = has_direct_path(shadow)
    if directs:
        taps |= _direct_taps(shadow, part)
    neurons = neuron_layers(shadow)
    taps |= dict.fromkeys(map(neuron_hook, neurons), partial(_mean, part))
    kept: list[Tensor] = []
    ends: list[Tensor] = []
    spots, last, first_end = _spots(part), shadow.n_layers - 1, part.batch.last[:1]

    def keep(resid: Float[Tensor, "rollout pos d_model"]) -> Float[Tensor, " 0"]:
        kept.append(resid[part.row, part.pos])
        ends.append(resid[0, first_end])
        return resid.new_empty(0)

    def lens(resid: Float[Tensor, "rollout pos d_model"]) -> Float[Tensor, "spot d_model"]:
        return resid[part.row[spots], part.pos[spots]]

    def check(logits: Float[Tensor, "rollout vocab"]) -> Float[Tensor, ""]:
        return gap(unembed(shadow, ends.pop()), logits[:1])

    taken: Any
    of_layers: Any
    lenses = {resid_hook(i): lens for i in layers}
    at_end = {resid_hook(last): keep, LAST_LOGITS: check}
    taken, of_layers, ended, added = shadow.run(part.batch, [taps, lenses, at_end, more or {}])
    off = ended[LAST_LOGITS]
    assert isinstance(off, Tensor)
    demand_equal(off, shadow, "Rollouts")
    found = _lens(shadow, part, spots, torch.stack([of_layers[resid_hook(i)] for i in layers]))
    received = None
    if shadow.attention_layers:
        each = [torch.stack(of, 1) for of in zip(*_of(taken, pattern_hook, shadow), strict=True)]
        *shares, received = each
        names = ("attention_first", "attention_prompt", "attention_answer", "repetition")
        found |= dict(zip(names, shares, strict=True))
    if directs:
        found |= _directs(shadow, part, taken)
    posts = [taken[neuron_hook(i)] for i in neurons]
    if posts and len({post.shape for post in posts}) == 1:
        found["neuron"] = torch.stack(posts, 1)
    return Inside(kept[0], found, received, added)


def _spots(part: Part, most: int = 4) -> Int[Tensor, " spot"]:
    """Some of the sampled tokens of each rollout, evenly among all; as many of each."""
    starts = np.cumsum([0, *part.sizes[:-1]])
    places = [
        start + np.linspace(0, n - 1, most).round()
        for start, n in zip(starts, part.sizes, strict=True)
    ]
    return torch.from_numpy(np.concatenate(places)).long().to(part.row.device)


def _lens(
    shadow: Shadow,
    part: Part,
    spots: Int[Tensor, " spot"],
    resid: Float[Tensor, "layer spot d_model"],
) -> dict[str, Tensor]:
    """What the logit lens says of some tokens after each layer; see `inside`."""
    ids = part.tokens[spots].expand(len(resid), -1).flatten()
    logps, ranks = [], []
    rows = max(1, CHUNK // shadow.vocab_size)
    for few, own in zip(resid.flatten(0, 1).split(rows), ids.split(rows), strict=True):
        z = unembed(shadow, few)
        mine = z.gather(1, own[:, None])
        logps.append(mine[:, 0] - z.logsumexp(1))
        ranks.append((z > mine).sum(1))
    each = len(resid), len(part.which), -1
    best = torch.cat(ranks).view(each) == 0
    # Layers from the end on after which it is the likeliest without a gap.
    stays = best.flip(0).cumprod(0).sum(0)
    return {
        "lens_logp": torch.cat(logps).view(each).mean(2).T,
        "lens_layer": (len(resid) - stays).float().mean(1),
    }


def _of(taken: Mapping[str, Any], hook: Any, shadow: Shadow) -> list[Any]:
    return [taken[hook(i)] for i in shadow.attention_layers]


def _repeats(part: Part) -> Float[Tensor, "rollout query key"]:
    """Weights of the attention of each sampled token to what came after its equals."""
    tokens, mask = part.batch.tokens, part.batch.mask
    same = (tokens[:, :, None] == tokens[:, None, :]) & mask[:, None, :]
    # The key after an equal token: one further on, up to the query itself.
    after = torch.zeros_like(same)
    after[:, :, 1:] = same[:, :, :-1]
    after = after.tril() & (part.asks > 0)[:, :, None]
    has = after.any(2).sum(1).clamp(min=1)
    return after / has[:, None, None].float()


def _mean(part: Part, values: Float[Tensor, "rollout pos width"]) -> Float[Tensor, "rollout width"]:
    """Mean over the sampled tokens."""
    return (part.asks[:, None] @ values.float())[:, 0]


def _direct_taps(shadow: Shadow, part: Part) -> dict[str, Reduce]:
    """The products of what heads and MLPs write with the direction of each sampled token.

    They are to be divided by the scale of the final norm, which the pass finds last.
    """
    bridge: Any = shadow.bridge
    w_u = bridge.W_U
    mean = w_u.mean(1, dtype=torch.float32)
    to = before_norm(bridge.ln_final, w_u[:, part.tokens].T.float() - mean)

    def head(layer: int, z: Float[Tensor, "rollout pos head d_head"]) -> Float[Tensor, "token h"]:
        block, here = bridge.blocks[layer], to
        if f"blocks.{layer}.ln1_post.hook_scale" in shadow.hooks:
            here = before_norm(block.ln1_post, to)
        w_o = block.attn.W_O.float()
        reads = here @ w_o.flatten(0, 1).T
        return (z[part.row, part.pos].float() * reads.unflatten(1, w_o.shape[:2])).sum(2)

    def mlp(out: Float[Tensor, "rollout pos d_model"]) -> Float[Tensor, " token"]:
        return (out[part.row, part.pos].float() * to).sum(1)

    def scale(of: Float[Tensor, "rollout pos 1"]) -> Float[Tensor, " token"]:
        return of[part.row, part.pos, 0].float()

    taps: dict[str, Reduce] = {"ln_final.hook_scale": scale}
    for i in range(shadow.n_layers):
        if z_hook(i) in shadow.hooks:
            taps[z_hook(i)] = partial(head, i)
        if (hook := f"blocks.{i}.ln1_post.hook_scale") in shadow.hooks:
            taps[hook] = scale
        if mlp_hook(i) in shadow.hooks:
            taps[mlp_hook(i)] = mlp
    return taps


def _directs(shadow: Shadow, part: Part, taken: Mapping[str, Tensor]) -> dict[str, Tensor]:
    final, sizes = taken["ln_final.hook_scale"], part.sizes

    def means(values: Float[Tensor, "token ..."]) -> Float[Tensor, "rollout ..."]:
        return torch.stack([one.mean(0) for one in values.split(sizes)])

    heads, mlps = [], []
    for i in range(shadow.n_layers):
        if z_hook(i) in taken:
            scale = final * taken.get(f"blocks.{i}.ln1_post.hook_scale", torch.ones_like(final))
            heads.append(means(taken[z_hook(i)] / scale[:, None]))
        if mlp_hook(i) in taken:
            mlps.append(means(taken[mlp_hook(i)] / final))
    found = {}
    if len(heads) == shadow.n_layers:
        found["direct"] = torch.stack(heads, 1)
    if len(mlps) == shadow.n_layers:
        found["mlp_direct"] = torch.stack(mlps, 1)
    return found
