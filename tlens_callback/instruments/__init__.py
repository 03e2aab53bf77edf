"""The instruments, one family in each file. The contract tests check everything exported here."""

from tlens_callback.instruments.ablation import HeadAblation
from tlens_callback.instruments.activations import ActivationDrift
from tlens_callback.instruments.adapters import AdapterSpectrum
from tlens_callback.instruments.attention import AttentionPatterns, PatternChange
from tlens_callback.instruments.attribution import LogitAttribution
from tlens_callback.instruments.change import TokenChange
from tlens_callback.instruments.composition import Composition
from tlens_callback.instruments.contrast import Contrast
from tlens_callback.instruments.copying import CopyingScores
from tlens_callback.instruments.difference import DifferenceLens
from tlens_callback.instruments.drift import AttentionDrift
from tlens_callback.instruments.features import SparseFeatures
from tlens_callback.instruments.frozen import FrozenWeights
from tlens_callback.instruments.generations import Generations
from tlens_callback.instruments.heads import HeadScores
from tlens_callback.instruments.lens import LogitLens
from tlens_callback.instruments.loss import RepeatLoss, TokenLoss
from tlens_callback.instruments.neurons import TopNeurons
from tlens_callback.instruments.patching import ActivationPatching
from tlens_callback.instruments.residual import ResidualNorms
from tlens_callback.instruments.sparsity import UpdateSparsity
from tlens_callback.instruments.targets import TargetScores
from tlens_callback.instruments.trained_features import TrainedFeatures
from tlens_callback.instruments.virtual import VirtualHeads
from tlens_callback.interfaces import Instrument

__all__ = [
    "ActivationDrift",
    "ActivationPatching",
    "AdapterSpectrum",
    "AttentionDrift",
    "AttentionPatterns",
    "Composition",
    "Contrast",
    "CopyingScores",
    "DifferenceLens",
    "FrozenWeights",
    "Generations",
    "HeadAblation",
    "HeadScores",
    "LogitAttribution",
    "LogitLens",
    "PatternChange",
    "RepeatLoss",
    "ResidualNorms",
    "SparseFeatures",
    "TargetScores",
    "TokenChange",
    "TokenLoss",
    "TopNeurons",
    "TrainedFeatures",
    "UpdateSparsity",
    "VirtualHeads",
    "fast",
]


def explaining() -> list[Instrument]:
    """Returns the instruments that show why a model continues one prompt as it does."""
    return [
        TargetScores(),
        AttentionPatterns(),
        LogitLens(every_token=True),
        LogitAttribution(),
        TopNeurons(),
        TokenLoss(),
    ]


def fast() -> list[Instrument]:
    """Returns the instruments that are cheap enough to run at every observation.

    They share one forward pass, or read weights alone. All of them are optional: a callback leaves
    out an instrument that has nothing to measure in the model (such as `AdapterSpectrum` without
    adapters) and prints a line about it. `PatternChange` is as cheap, but is not among them,
    because its pictures double what an observation writes.
    """
    instruments: list[Instrument] = [
        TargetScores(),
        AttentionPatterns(),
        HeadScores(),
        VirtualHeads(),
        TopNeurons(),
        LogitLens(),
        LogitAttribution(),
        TokenLoss(),
        RepeatLoss(),
        AttentionDrift(),
        ActivationDrift(),
        DifferenceLens(),
        ResidualNorms(),
        AdapterSpectrum(),
        UpdateSparsity(),
        FrozenWeights(),
    ]
    for instrument in instruments:
        object.__setattr__(instrument, "optional", True)  # they are frozen
    return instruments
