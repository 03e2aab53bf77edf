"""Look inside a language model while it is being fine-tuned."""

from tlens_callback.callback import TLensCallback as TLensCallback
from tlens_callback.fidelity import FidelityError as FidelityError
from tlens_callback.instruments import ActivationDrift as ActivationDrift
from tlens_callback.instruments import ActivationPatching as ActivationPatching
from tlens_callback.instruments import AdapterSpectrum as AdapterSpectrum
from tlens_callback.instruments import AttentionDrift as AttentionDrift
from tlens_callback.instruments import AttentionPatterns as AttentionPatterns
from tlens_callback.instruments import Composition as Composition
from tlens_callback.instruments import Contrast as Contrast
from tlens_callback.instruments import CopyingScores as CopyingScores
from tlens_callback.instruments import DifferenceLens as DifferenceLens
from tlens_callback.instruments import FrozenWeights as FrozenWeights
from tlens_callback.instruments import HeadAblation as HeadAblation
from tlens_callback.instruments import HeadScores as HeadScores
from tlens_callback.instruments import LogitAttribution as LogitAttribution
from tlens_callback.instruments import LogitLens as LogitLens
from tlens_callback.instruments import PatternChange as PatternChange
from tlens_callback.instruments import RepeatLoss as RepeatLoss
from tlens_callback.instruments import ResidualNorms as ResidualNorms
from tlens_callback.instruments import SparseFeatures as SparseFeatures
from tlens_callback.instruments import TargetScores as TargetScores
from tlens_callback.instruments import TokenLoss as TokenLoss
from tlens_callback.instruments import TopNeurons as TopNeurons
from tlens_callback.instruments import TrainedFeatures as TrainedFeatures
from tlens_callback.instruments import UpdateSparsity as UpdateSparsity
from tlens_callback.instruments import VirtualHeads as VirtualHeads
from tlens_callback.instruments import fast as fast
from tlens_callback.interfaces import Instrument as Instrument
from tlens_callback.interfaces import Sink as Sink
from tlens_callback.observe import observe as observe
from tlens_callback.probes import Probe as Probe
from tlens_callback.probes import ProbeBatch as ProbeBatch
from tlens_callback.reading import Reading as Reading
from tlens_callback.rules import Rule as Rule
from tlens_callback.sae import Autoencoder as Autoencoder
from tlens_callback.sae import load_sae as load_sae
from tlens_callback.shadow import Shadow as Shadow
from tlens_callback.sinks import LocalSink as LocalSink
from tlens_callback.sinks import MemorySink as MemorySink
from tlens_callback.sinks import Store as Store
from tlens_callback.sinks import WandbSink as WandbSink
from tlens_callback.sinks import read_store as read_store
from tlens_callback.watch import Watch as Watch

__version__ = "0.1.0"
