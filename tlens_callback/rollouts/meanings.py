"""What the readings of rollouts mean."""

from tlens_callback.meaning import Description, Meaning, Quantity

_HEADS = {
    "direct": ("What each head adds to the sampled tokens", "logit"),
    "attention_first": ("Attention to the first token", "probability"),
    "attention_prompt": ("Attention to the prompt", "probability"),
    "attention_answer": ("Attention to the answer itself", "probability"),
    "repetition": ("Attention to what came after the same token", "probability"),
}
"""Measure of each head and rollout -> title, unit."""

HEAD_MEASURES = tuple(_HEADS)
HEAD_UNITS = {name: unit for name, (_, unit) in _HEADS.items()}

LAYER_UNITS = {"mlp_direct": "logit", "lens_logp": "nats"}
"""Measure of each layer and rollout -> unit."""

TOKEN_MEASURES = {
    "log_ratio": ("Change of the log probability since the base", "nats"),
    "entropy": ("Entropy of the next token", "nats"),
    "js": ("Jensen-Shannon divergence from the base", "nats"),
    "logp": ("Log probability of the token", "nats"),
    "base_logp": ("Log probability to the base", "nats"),
    "base_entropy": ("Entropy of the next token to the base", "nats"),
    "kl": ("KL divergence from the base", "nats"),
    "rank": ("How many tokens are likelier", "rank"),
    "base_rank": ("How many tokens are likelier to the base", "rank"),
    "sampler_logp": ("Log probability when it was sampled", "nats"),
    "sampler_gap": ("Log probability now minus when it was sampled", "nats"),
    "feature": ("Feature of the sampled token", "activation"),
    "trained": ("Counts in the loss", "fraction"),
    "step_change": ("Change of the log probability by this update", "nats"),
}
"""Measure of each sampled token -> title, unit."""

ROLLOUT_MEASURES = {
    "advantage": ("Advantage", "advantage"),
    "weighted_reward": ("Reward", "reward"),
    "length": ("Length of the completion", "tokens"),
    "truncated": ("Cut off at the longest length", "fraction"),
    "sum_logp": ("Log probability of the completion", "nats"),
    "mean_logp": ("Mean log probability of a token", "nats"),
    "sum_log_ratio": ("Change of the log probability since the base", "nats"),
    "mean_log_ratio": ("Mean change of a token's log probability", "nats"),
    "mean_entropy": ("Mean entropy of a token", "nats"),
    "mean_js": ("Mean divergence of a token from the base", "nats"),
    "mean_kl": ("Mean KL divergence of a token from the base", "nats"),
    "lens_layer": ("Layer from which the lens reads the tokens", "layer"),
    "mean_feature": ("Mean of a feature over the sampled tokens", "activation"),
    "sum_step_change": ("Change of the log probability by this update", "nats"),
}
"""Measure of each rollout -> title, unit."""

CURVES = {
    "reward_mean": ("Mean reward of the rollouts looked at", "reward", None),
    "entropy_mean": ("Mean entropy of the sampled tokens", "nats", None),
    "kl_mean": ("Mean KL divergence from the base", "nats", None),
    "kl_k3": ("Mean KL divergence from the base, as TRL estimates it", "nats", None),
    "js_mean": ("Mean divergence of the sampled tokens from the base", "nats", None),
    "dead_groups": ("Groups without spread", "fraction", "lower"),
    "truncated_share": ("Completions that were cut off", "fraction", "lower"),
    "age": ("Updates since the rollouts were sampled", "count", None),
    "off_policy": ("Tokens whose sampler is off by more than a tenth", "fraction", "lower"),
    "update_gain": ("How much more the update gave to winners than to losers", "nats", "higher"),
    "discoveries": (
        "Numbers that tell winners from losers",
        "count",
        None,
    ),
    "run_discoveries": ("The same over all observations so far", "count", None),
    "looked_at": ("Numbers that were compared", "count", None),
}
"""Number of an observation -> title, unit, what good training does."""


def _contrast(title: str, axes: tuple[str, ...], *, headline: bool = False) -> dict[str, Meaning]:
    """The meanings of a contrast: its value, and what is said beside it; suffix -> meaning."""
    lower = title[0].lower() + title[1:]
    heads = axes == ("layer", "head")
    return {
        "": Meaning(
            title=f"Winners minus losers: {lower}",
            axes=axes,
            headline=headline,
            of_run=True,
            quantity=Quantity.CONTRAST if heads else None,
            explanation="Weighted by advantage, inside the groups: half of what the average winner "
            "has more than the average loser.",
        ),
        "_q": Meaning(
            title=f"False discovery rate: {lower}",
            axes=axes,
            of_run=True,
            quantity=Quantity.CONTRAST_Q if heads else None,
            explanation="Below 0.05: at most one in twenty such discoveries is due to chance.",
        ),
        "_p": Meaning(title=f"Share of chance that does as much: {lower}", axes=axes, of_run=True),
        "_length": Meaning(
            title=f"Correlation with length: {lower}",
            axes=axes,
            of_run=True,
            explanation="Inside the groups. If it is large, the contrast may be that of length.",
        ),
        "_run": Meaning(
            title=f"The whole run, winners minus losers: {lower}",
            axes=axes,
            of_run=True,
            quantity=Quantity.CONTRAST if heads else None,
            explanation="All observations so far together, in standard deviations of chance.",
        ),
        "_run_q": Meaning(
            title=f"False discovery rate of the whole run: {lower}",
            axes=axes,
            of_run=True,
            quantity=Quantity.CONTRAST_Q if heads else None,
        ),
        "_sign": Meaning(
            title=f"Does the sign hold: {lower}",
            axes=axes,
            of_run=True,
            explanation="Mean sign over the observations so far: 1 or -1 if it never changed.",
        ),
    }


def _of_heads() -> dict[str, Meaning]:
    found: dict[str, Meaning] = {}
    for name, (title, _) in _HEADS.items():
        found[name] = Meaning(title=title, axes=("rollout", "layer", "head"), of_run=True)
        many = _contrast(title, ("layer", "head"), headline=name == "direct")
        found |= {f"contrast_{name}{suffix}": one for suffix, one in many.items()}
    lens = "What the lens gives the sampled tokens after each layer"
    found["lens_logp"] = Meaning(title=lens, axes=("rollout", "layer"), of_run=True)
    found |= {f"contrast_lens_logp{s}": one for s, one in _contrast(lens, ("layer",)).items()}
    mlp = "What each MLP adds to the sampled tokens"
    found["mlp_direct"] = Meaning(title=mlp, axes=("rollout", "layer"), of_run=True)
    found |= {f"contrast_mlp_direct{s}": one for s, one in _contrast(mlp, ("layer",)).items()}
    return found | _top("neuron", "top neurons") | _top("feature", "top features")


def _top(name: str, title: str) -> dict[str, Meaning]:
    """The meanings of the contrasts of some of many: those that tell winners from losers best."""
    titles = {
        "": ("Winners minus losers", Quantity.CONTRAST),
        "_q": ("False discovery rate", Quantity.CONTRAST_Q),
        "_length": ("Correlation with length", None),
        "_run": ("The whole run, winners minus losers", None),
        "_run_q": ("False discovery rate of the whole run", None),
    }
    return {
        f"contrast_{name}{suffix}": Meaning(
            title=f"{what}: {title}",
            axes=("rank",),
            of_run=True,
            sometimes=name == "feature",
            quantity=quantity,
        )
        for suffix, (what, quantity) in titles.items()
    }


DESCRIPTION = Description(
    title="Rollouts",
    group="Rollouts",
    measures={
        "token": Meaning(
            title="Sampled tokens",
            axes=("rollout", "pos"),
            quantity=Quantity.ROLLOUT_TOKEN,
            of_run=True,
            sometimes=True,
        ),
        "prompt": Meaning(
            title="Prompts",
            axes=("group", "pos"),
            quantity=Quantity.ROLLOUT_PROMPT,
            of_run=True,
            sometimes=True,
        ),
        "group": Meaning(
            title="Rollouts that were looked at",
            axes=("rollout",),
            quantity=Quantity.ROLLOUT_GROUP,
            headline=True,
            of_run=True,
        ),
        "rewards": Meaning(
            title="Rewards",
            axes=("rollout", "function"),
            quantity=Quantity.ROLLOUT_REWARD,
            of_run=True,
        ),
        "attention": Meaning(
            title="What the sampled tokens look at",
            axes=("rollout", "layer", "head", "key"),
            quantity=Quantity.ROLLOUT_ATTENTION,
            of_run=True,
            sometimes=True,
        ),
        "gained": Meaning(title="Tokens gained most", axes=("rank",), of_run=True, sometimes=True),
        "lost": Meaning(title="Tokens lost most", axes=("rank",), of_run=True, sometimes=True),
        **{
            name: Meaning(title=title, axes=("rollout", "pos"), of_run=True, sometimes=True)
            for name, (title, _) in TOKEN_MEASURES.items()
        },
        **{
            name: Meaning(
                title=title,
                axes=("rollout",),
                of_run=True,
                sometimes=True,
                quantity=Quantity.ROLLOUT_ADVANTAGE if name == "advantage" else None,
            )
            for name, (title, _) in ROLLOUT_MEASURES.items()
        },
        **{
            name: Meaning(
                title=title,
                axes=(),
                headline=name != "looked_at",  # the same number at each observation
                of_run=True,
                sometimes=True,
                better=better,
            )
            for name, (title, _, better) in CURVES.items()
        },
        **_of_heads(),
    },
    kind="Rollouts",
    sentence="What the model samples, and what tells winners from losers inside it.",
)
