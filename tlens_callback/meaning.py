"""`Description` and `Meaning`: what an instrument says about itself and about its readings.

Everything that shows or compares readings asks these, and never the name of an instrument: which
curves come first, which heads have a role, what the page opens with, how two runs are compared. So
an instrument that a user writes is treated like those of the package.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import Flag, StrEnum, auto
from functools import lru_cache
from typing import Any, Literal


class Needs(Flag):
    """What an instrument needs beside a model and probes.

    Attributes:
        BLOCKS: repeated random blocks among the probes; they are added if there are none.
        TARGET: a probe with a target.
        ADAPTER: an adapter over a base.
        EARLIER: an earlier observation, to compare with.
        SAME_WEIGHTS: an earlier observation of a model with the same parameters in the same
            places.
        TRAINING: a training run that goes on between two observations.
    """

    NOTHING = 0
    BLOCKS = auto()
    TARGET = auto()
    ADAPTER = auto()
    EARLIER = auto()
    SAME_WEIGHTS = auto()
    TRAINING = auto()


class Quantity(StrEnum):
    """What a measure measures, so that a reading is found by it, whatever its instrument is named.

    Attributes:
        ATTENTION: attention of each head: [layer, head, query, key], probability.
        ATTENTION_CHANGE: how far the attention of each head has moved: [layer, head].
        ACTIVATION_CHANGE: how far the activations of each layer have moved, by part:
            [layer, part].
        HEAD_ROLE: how much each head plays the role that `Meaning.role` names: [layer,
            head], probability; or [block, layer, head], where a head's score is its lowest
            over the block lengths.
        HEAD_ENTROPY: how widely each head spreads its attention: [layer, head].
        DIRECT_EFFECT: logits that each head, [layer, head], or MLP, [layer], adds directly
            to a probe's answer.
        DIRECT_TOTAL: logits that all components together add directly to a probe's answer:
            a number.
        DIRECT_REMAINDER: logits of a probe's answer that the components do not account for:
            a number.
        ANSWER_PROBABILITY: probability of a probe's target: a number, or one after each
            layer.
        ANSWER_RANK: how many tokens are likelier than the target's first: a number, or one
            after each layer.
        ANSWER_LEAD: logit of the target minus that of the foil: a number.
        ANSWER_LAYER: the first layer after which the target stays the likeliest token: a
            number.
        NEXT_TOKEN: the likeliest next tokens after each layer, as texts: [layer, rank].
        NEXT_TOKEN_PROBABILITY: the probabilities of the tokens of `NEXT_TOKEN`: [layer,
            rank].
        TOKEN_LOSS: loss of each token of a probe: [token], nats.
        PROBE_LOSS: mean loss of a probe's tokens: a number, nats.
        REPEAT_GAIN: loss on the second copy of a random block minus loss on the first: a
            number, nats.
        FEATURE_FREQUENCY: share of the tokens on which each feature fires: [feature].
        ROLLOUT_TOKEN: ids of the tokens that the model sampled, as texts: [rollout, pos]. Readings
            of the same instrument with these two axes measure these tokens, those with only the
            axis rollout the whole completion.
        ROLLOUT_PROMPT: the prompt of each group, as texts of its tokens: [group, pos].
        ROLLOUT_GROUP: the group of each rollout, which share a prompt: [rollout], index.
        ROLLOUT_ADVANTAGE: how much better each rollout is than its group, as the trainer counts it:
            [rollout].
        ROLLOUT_REWARD: what each reward function gives: [rollout, function].
        ROLLOUT_ATTENTION: attention of a rollout's sampled tokens to each token of its prompt and
            to each token sampled, mean over the sampled ones: [rollout, layer, head, key].
        CONTRAST: how much more winners have than losers, of each head: [layer, head]; or of those
            neurons or features that differ most, with their names as texts: [rank].
        CONTRAST_Q: the smallest false discovery rate at which that is a discovery.
    """

    ATTENTION = auto()
    ATTENTION_CHANGE = auto()
    ACTIVATION_CHANGE = auto()
    HEAD_ROLE = auto()
    HEAD_ENTROPY = auto()
    DIRECT_EFFECT = auto()
    DIRECT_TOTAL = auto()
    DIRECT_REMAINDER = auto()
    ANSWER_PROBABILITY = auto()
    ANSWER_RANK = auto()
    ANSWER_LEAD = auto()
    ANSWER_LAYER = auto()
    NEXT_TOKEN = auto()
    NEXT_TOKEN_PROBABILITY = auto()
    TOKEN_LOSS = auto()
    PROBE_LOSS = auto()
    REPEAT_GAIN = auto()
    FEATURE_FREQUENCY = auto()
    ROLLOUT_TOKEN = auto()
    ROLLOUT_PROMPT = auto()
    ROLLOUT_GROUP = auto()
    ROLLOUT_ADVANTAGE = auto()
    ROLLOUT_REWARD = auto()
    ROLLOUT_ATTENTION = auto()
    CONTRAST = auto()
    CONTRAST_Q = auto()


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """Says what the readings of one measure mean.

    Attributes:
        title: a heading for a panel, in plain words.
        axes: the axes of its readings, if they are the same for all probes and models; None: not
            known.
        headline: True: people look at it first, so W&B shows a single number as a curve and other
            readings as a figure or a table. False: W&B leaves it out; the store and the page have
            it. None: not known; W&B shows the figures and tables, and only the first numbers.
        quantity: which known quantity it is; None: another one.
        role: the role of a head with a high score, as in "new induction head". `Watch` follows the
            roles of quantity `HEAD_ROLE`.
        seen_in: what of the head the score judges, "its attention pattern": the event says so.
        sharpness: share of `Watch`'s thresholds that counts for this role. In a role that few heads
            play sharply, such as attention to the token before, a lower score says as much.
        better: whether good training makes it "higher" or "lower"; None: neither.
        of_run: it describes the run that it was read in: it compares with an earlier observation,
            or counts what was done. Such readings of two runs are not compared directly.
        sometimes: only some settings or some models have it.
        alarm: makes a number above 0 an event. The sentence of the event is the number followed by
            this text.
        explanation: one sentence that explains it to a person who looks at it.
    """

    title: str = ""
    axes: tuple[str, ...] | None = None
    headline: bool | None = False
    quantity: Quantity | None = None
    role: str = ""
    seen_in: str = ""
    sharpness: float = 1.0
    better: Literal["higher", "lower"] | None = None
    of_run: bool = False
    sometimes: bool = False
    alarm: str = ""
    explanation: str = ""

    def __post_init__(self) -> None:
        if self.quantity is not None:
            object.__setattr__(self, "quantity", Quantity(self.quantity))
        if self.axes is not None:
            object.__setattr__(self, "axes", tuple(self.axes))
        if self.better not in (None, "higher", "lower"):
            raise ValueError(f'better must be "higher", "lower" or None, got {self.better!r}.')


UNDESCRIBED = Meaning(headline=None)
"""The meaning of a measure that its instrument does not describe."""

_TEXTS = ("title", "group", "kind", "sentence")


@dataclass(frozen=True, kw_only=True)
class Description:
    """Describes an instrument, as its class attribute `description`.

    Attributes:
        title: a heading for a panel, in plain words.
        group: the section in which its panels are shown: "Heads", "Answers".
        needs: what it needs beside a model and probes.
        measures: second segment of a key -> what the readings with that segment mean.
        others: what the readings of all other measures mean.
        kind: the name of the instrument's class; filled in by `described`.
        sentence: the first sentence of its docstring; filled in by `described`.
    """

    title: str = ""
    group: str = ""
    needs: Needs = Needs.NOTHING
    measures: Mapping[str, Meaning] = field(default_factory=dict)
    others: Meaning = UNDESCRIBED
    kind: str = ""
    sentence: str = ""

    def __post_init__(self) -> None:
        for measure, meaning in self.measures.items():
            if not isinstance(meaning, Meaning):
                raise ValueError(f"measures[{measure!r}] must be a Meaning, got {meaning!r}.")

    def meaning(self, measure: str) -> Meaning:
        """Returns what the readings of this measure mean."""
        return self.measures.get(measure, self.others)

    def as_json(self) -> dict[str, Any]:
        """Returns the description in a form that can be written as JSON."""
        return {
            **{name: getattr(self, name) for name in _TEXTS},
            "needs": [one.name for one in self.needs],
            "measures": {name: _changed_fields(one) for name, one in self.measures.items()},
            "others": _changed_fields(self.others),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Description":
        """Reads what `as_json` wrote, and ignores what a newer version of this package added."""
        needs = Needs.NOTHING
        for name in told["needs"]:
            needs |= Needs.__members__.get(name, Needs.NOTHING)
        return cls(
            **{name: told[name] for name in _TEXTS},
            needs=needs,
            measures={name: _meaning_from_json(of) for name, of in told["measures"].items()},
            others=_meaning_from_json(told["others"]),
        )


def described(thing: object) -> Description:
    """Returns the description of an instrument or a watch, completed by the name of its class and
    the first sentence of its docstring.

    Raises:
        ValueError: if its `description` is not a `Description`.
    """
    return described_class(type(thing))


@lru_cache
def described_class(kind: type) -> Description:
    """Returns the description of a class of instruments, completed as `described` does."""
    said = getattr(kind, "description", None) or Description()
    if not isinstance(said, Description):
        raise ValueError(
            f"{kind.__name__}.description must be a tlens_callback.Description, got {said!r}."
        )
    text = " ".join((kind.__doc__ or "").split())
    # A dataclass without a docstring has its signature as one.
    sentence = None if text.startswith(f"{kind.__name__}(") else re.match(r".+?\.(?=\s|$)", text)
    return replace(said, kind=kind.__name__, sentence=sentence[0] if sentence else "")


def _changed_fields(meaning: Meaning) -> dict[str, Any]:
    """Returns the fields of a meaning that differ from the default."""
    told = {one.name: getattr(meaning, one.name) for one in fields(Meaning)}
    return {one.name: told[one.name] for one in fields(Meaning) if told[one.name] != one.default}


def _meaning_from_json(told: Mapping[str, Any]) -> Meaning:
    known = {one.name: told[one.name] for one in fields(Meaning) if one.name in told}
    if "axes" in known:
        known["axes"] = tuple(known["axes"])
    if "quantity" in known:
        is_known = known["quantity"] in set(Quantity)
        known["quantity"] = Quantity(known["quantity"]) if is_known else None
    return Meaning(**known)
