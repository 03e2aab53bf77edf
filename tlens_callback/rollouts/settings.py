"""`Rollouts`: says which of the sampled completions are looked at, and how."""

from dataclasses import dataclass
from typing import Literal

from tlens_callback.demands import demand_numbers


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Says which of the completions that a trainer samples are looked at, and how closely.

    At each observation at most `per_observation` rollouts are run through the shadow, twice where
    there is a base: with the adapters and without. Groups whose completions differ in advantage
    come first. Of a group that is too large the best, the worst and some between are taken.

    What is written is text of your training data, as token ids and texts, to every sink of the
    callback: also to the servers of W&B and trackio. `texts=False` keeps the numbers only.

    Args:
        per_observation: most rollouts.
        groups: most groups, of completions to one prompt.
        max_tokens: longest rollout in tokens, its prompt included. Longer ones are cut at their
            end; groups with a longer prompt are left out.
        after_update: look at the same rollouts once more after the update that they led to.
        texts: write the tokens of prompts and completions.
        fdr: the false discovery rate at which a head, neuron or layer counts as a discovery.
        permutations: of the advantages inside their groups, for the p-values.
        base: what the model is compared with. "adapter": the model with its adapters left out,
            which takes no memory; under full fine-tuning there is none. "copy": a copy of the
            weights with which this training, or its resumption, begins; it takes their memory
            again.
        neurons: how many neurons to show, those that differ most between winners and losers, at
            this observation or over all so far.
        features: how many features of instruments to show, `SparseFeatures(sae)` and
            `Contrast(...)` among them: those that differ most, at this observation or over all so
            far, each also at every token, after those that the instrument was told to show. 0: they
            are not read.

    Raises:
        ValueError: for a number that is too small, or groups > per_observation / 2.
    """

    per_observation: int = 32
    groups: int = 4
    max_tokens: int = 512
    after_update: bool = False
    texts: bool = True
    fdr: float = 0.05
    permutations: int = 1000
    neurons: int = 20
    features: int = 8
    base: Literal["adapter", "copy"] = "adapter"

    def __post_init__(self) -> None:
        demand_numbers(self, groups=1, max_tokens=2, permutations=1, neurons=0, features=0)
        if self.per_observation < 2 * self.groups:
            raise ValueError(
                f"Rollouts(per_observation={self.per_observation}, groups={self.groups}): winners "
                f"and losers are compared inside a group, so each needs two rollouts at least. "
                f"Give fewer groups or more rollouts."
            )
        if self.base not in ("adapter", "copy"):
            raise ValueError(f"Rollouts(base={self.base!r}): give 'adapter' or 'copy'.")
        if not 0 < self.fdr < 1:
            raise ValueError(f"Rollouts(fdr={self.fdr}) is a share: give one between 0 and 1.")

    def longest(self, context: int | None) -> int:
        """How many tokens of a rollout are read, by a model with this context; None: no limit."""
        return self.max_tokens if context is None else min(self.max_tokens, context)
