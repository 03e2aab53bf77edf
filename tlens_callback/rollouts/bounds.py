"""Says beforehand how many tokens a look at rollouts runs, and about how much memory it takes."""

from typing import Any

from tlens_callback.instruments.parts.predictions import IN_CACHE
from tlens_callback.rollouts.contrast import AT_ONCE
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.inside import TOKENS
from tlens_callback.rollouts.meanings import HEAD_MEASURES
from tlens_callback.rollouts.settings import Rollouts
from tlens_callback.shadow import Shadow
from tlens_callback.shadow.unembed import CHUNK


def most_tokens(settings: Rollouts, shadow: Shadow) -> int:
    """Returns how many tokens one pass over all rollouts has at most."""
    return settings.per_observation * settings.longest(shadow.context)


def peaks(
    settings: Rollouts, shadow: Shadow, *, has_base: bool, features: Features | None = None
) -> dict[str, float]:
    """Returns about how many bytes a look takes at most, in each of its three phases.

    The longest rollouts are counted, and as many as are allowed. With N tokens that are run at
    once, of L each, T in all, b bytes for a number of the model and 4 for one of the reductions:

    - pass: the residual streams of the passes so far, at most 2 T d_model b; and of the pass that
      is run, three tensors as large as a layer's attention patterns, 4 N L heads, nine as large as
      its residual stream and four as large as its neurons; of the features of instruments, those
      of all tokens, or the activations that they are read from, and four copies of `CHUNK`.
    - compare: four times T d_model b, since the parts are put together; and some copies of the
      logits of as many tokens as fit `CHUNK`.
    - contrast: in the memory of the CPU: every number of every rollout, in double precision, four
      times; and the sums of the permutations that are computed together.

    The first two are on the shadow's device.
    """
    cfg: Any = shadow.bridge.cfg
    longest, tokens = settings.longest(shadow.context), most_tokens(settings, shadow)
    at_once = min(max(TOKENS, longest), tokens)
    bytes_each = shadow.dtype.itemsize
    neurons = getattr(cfg, "d_mlp", None) or 4 * shadow.d_model
    model, heads, layers = shadow.d_model, shadow.n_heads, shadow.n_layers
    resid = tokens * model * bytes_each * (2 if has_base else 1)
    running = at_once * (3 * longest * heads + 4 * longest + 9 * model + 4 * neurons)
    logits, few = tokens * shadow.vocab_size, min(tokens, CHUNK // shadow.vocab_size + 1)
    read = 4 * min(CHUNK, logits) + 8 * min(IN_CACHE, logits) + 3 * few * model
    numbers = layers * (len(HEAD_MEASURES) * heads + 1 + neurons)
    kept = 0
    for hook, n in features.sizes if features is not None else ():
        numbers += n
        width = neurons if ".mlp.hook_p" in hook else model
        kept += 4 * tokens * min(n, width)
    if kept:
        kept += 4 * 4 * CHUNK
    sums = 3 * min(AT_ONCE, settings.permutations * numbers)
    return {
        "pass": resid + kept + 4 * (running + at_once * layers * heads),
        "compare": 2 * resid + kept + 4 * read,
        "contrast": 4 * 8 * settings.per_observation * numbers + 4 * sums,
    }
