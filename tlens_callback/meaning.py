"""What an instrument says about itself and its readings, for whoever shows or compares them.

Nobody else knows an instrument by its name: what is first among the curves, which heads have a
role, what a page opens with, how two runs are compared, is asked of what stands here. So an
instrument of a user's own is treated as the package's own are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Flag, StrEnum, auto
from functools import lru_cache
from typing import Any, Literal


class Needs(Flag):
    """What an instrument needs beside a model and probes."""

    NOTHING = 0
    BLOCKS = auto()
    """Repeated random blocks among the probes; they are added where there are none."""
    TARGET = auto()
    """A probe with a target token."""
    ADAPTER = auto()
    """An adapter over a base."""
    EARLIER = auto()
    """An earlier observation, to compare with."""
    SAME_WEIGHTS = auto()
    """An earlier observation of a model with the same parameters in the same places."""
    TRAINING = auto()
    """A training run that goes on between two observations."""


class Quantity(StrEnum):
    """What kind of thing a measure is, for those who look for that kind, whoever measured it."""

    ATTENTION = auto()
    """Attention of each head: [layer, head, query, key], probability."""
    ATTENTION_CHANGE = auto()
    """How far the attention of each head has moved: [layer, head]."""
    ACTIVATION_CHANGE = auto()
    """How far the activations of each layer have moved, by part: [layer, part]."""
    HEAD_ROLE = auto()
    """How much each head plays the role that `Meaning.role` names: [layer, head], probability; or
    [block, layer, head], where a head's score is its lowest over the block lengths."""
    HEAD_ENTROPY = auto()
    """How widely each head spreads its attention: [layer, head]."""
    DIRECT_EFFECT = auto()
    """Logits that each head, [layer, head], or MLP, [layer], adds directly to a probe's answer."""
    DIRECT_TOTAL = auto()
    """What all components together add: a number."""
    DIRECT_REMAINDER = auto()
    """What the components do not account for: a number."""
    ANSWER_PROBABILITY = auto()
    """Probability of a probe's target token: a number, or one after each layer."""
    ANSWER_RANK = auto()
    """How many tokens are likelier than the target: a number, or one after each layer."""
    ANSWER_LEAD = auto()
    """Logit of the target minus that of the foil: a number."""
    ANSWER_LAYER = auto()
    """The first layer from which on the target is the likeliest token: a number."""
    NEXT_TOKEN = auto()
    """The likeliest next tokens after each layer, as texts: [layer, rank]."""
    NEXT_TOKEN_PROBABILITY = auto()
    """The probabilities of these."""
    TOKEN_LOSS = auto()
    """Loss of each token of a probe: [token], nats."""
    PROBE_LOSS = auto()
    """Mean loss of a probe's tokens: a number, nats."""
    REPEAT_GAIN = auto()
    """Loss of a random block when it comes again minus when it came first: a number, nats."""
    FEATURE_FREQUENCY = auto()
    """Share of the tokens on which each feature fires: [feature]."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What the readings of one measure mean.

    Attributes:
        title: in plain words, as a heading of a panel.
        axes: of its readings, where they are alike for all probes and models; None: not said.
        headline: people look at it first: a number becomes a curve in W&B, another a figure or a
            table. None: not said; then W&B shows what fits, the first numbers alone.
        quantity: what kind of thing it is.
        role: that a head of a high score plays, as in "new induction head"; `Watch` follows those
            of quantity `HEAD_ROLE`.
        better: whether a good training makes it "higher" or "lower"; None: neither.
        of_run: it says something of the run that read it: it compares with an earlier observation,
            or counts what was done. Of two runs it is not compared as it is.
        sometimes: only some settings, or some models, have it.
        alarm: a sentence for the event that a number above 0 is; behind the number itself.
        explanation: a sentence for a person who looks at it.
    """

    title: str = ""
    axes: tuple[str, ...] | None = None
    headline: bool | None = False
    quantity: Quantity | None = None
    role: str = ""
    better: Literal["higher", "lower"] | None = None
    of_run: bool = False
    sometimes: bool = False
    alarm: str = ""
    explanation: str = ""


UNSAID = Meaning(headline=None)
"""The meaning of a measure of which its instrument says nothing."""

_TEXTS = ("title", "group", "kind", "sentence")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What an instrument says about itself, as its class attribute `description`.

    Attributes:
        title: in plain words, as a heading of a panel.
        group: the heading under which it stands with others: "Heads", "Answers".
        needs: what it needs beside a model and probes.
        measures: second segment of its keys -> what these readings mean.
        others: what the readings of all other measures mean.
        kind: the name of its class; known by itself, as the next.
        sentence: the first one of its docstring.
    """

    title: str = ""
    group: str = ""
    needs: Needs = Needs.NOTHING
    measures: Mapping[str, Meaning] = field(default_factory=dict)
    others: Meaning = UNSAID
    kind: str = ""
    sentence: str = ""

    def meaning(self, measure: str) -> Meaning:
        """What the readings of this measure mean."""
        return self.measures.get(measure, self.others)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            **{name: getattr(self, name) for name in _TEXTS},
            "needs": [one.name for one in self.needs],
            "measures": {name: _told(one) for name, one in self.measures.items()},
            "others": _told(self.others),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Description":
        """What `as_json` wrote; what a newer version of this package added is passed over."""
        needs = Needs.NOTHING
        for name in told["needs"]:
            needs |= Needs.__members__.get(name, Needs.NOTHING)
        return cls(
            **{name: told[name] for name in _TEXTS},
            needs=needs,
            measures={name: _meaning(of) for name, of in told["measures"].items()},
            others=_meaning(told["others"]),
        )


def described(thing: object) -> Description:
    """What an instrument or a watch says about itself; of one that says nothing, the name of its
    class and the first sentence of its docstring.

    Raises:
        ValueError: for a `description` that is none.
    """
    return described_class(type(thing))


@lru_cache
def described_class(kind: type) -> Description:
    """The same of a class of instruments."""
    said = getattr(kind, "description", None) or Description()
    if not isinstance(said, Description):
        raise ValueError(
            f"{kind.__name__}.description is a tlens_callback.Description, got {said!r}."
        )
    text = " ".join((kind.__doc__ or "").split())
    # A dataclass without a docstring has its signature as one.
    sentence = None if text.startswith(f"{kind.__name__}(") else re.match(r".+?\.(?=\s|$)", text)
    return replace(said, kind=kind.__name__, sentence=sentence[0] if sentence else "")


def _told(meaning: Meaning) -> dict[str, Any]:
    """What differs from the default."""
    told = {one.name: getattr(meaning, one.name) for one in fields(Meaning)}
    return {one.name: told[one.name] for one in fields(Meaning) if told[one.name] != one.default}


def _meaning(told: Mapping[str, Any]) -> Meaning:
    known = {one.name: told[one.name] for one in fields(Meaning) if one.name in told}
    if "axes" in known:
        known["axes"] = tuple(known["axes"])
    if "quantity" in known:
        there = known["quantity"] in set(Quantity)
        known["quantity"] = Quantity(known["quantity"]) if there else None
    return Meaning(**known)
