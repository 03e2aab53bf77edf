"""The instruments: one family a file. What is exported here is under the contract tests."""

from tlens_callback.instruments.attention import AttentionPatterns
from tlens_callback.instruments.heads import HeadScores
from tlens_callback.instruments.neurons import TopNeurons
from tlens_callback.instruments.targets import TargetScores
from tlens_callback.interfaces import Instrument

__all__ = ["AttentionPatterns", "HeadScores", "TargetScores", "TopNeurons", "fast"]


def fast() -> list[Instrument]:
    """The instruments that share one forward pass and suit every observation.

    `HeadScores` needs a repeated block among the probes.
    """
    return [AttentionPatterns(), HeadScores(), TopNeurons(), TargetScores()]
