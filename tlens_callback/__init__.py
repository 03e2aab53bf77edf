"""Look inside a language model while it is being fine-tuned."""

from tlens_callback.callback import TLensCallback as TLensCallback
from tlens_callback.fidelity import FidelityError as FidelityError
from tlens_callback.instruments import AttentionPatterns as AttentionPatterns
from tlens_callback.instruments import HeadScores as HeadScores
from tlens_callback.instruments import TargetScores as TargetScores
from tlens_callback.instruments import TopNeurons as TopNeurons
from tlens_callback.instruments import fast as fast
from tlens_callback.interfaces import Instrument as Instrument
from tlens_callback.interfaces import Sink as Sink
from tlens_callback.observe import observe as observe
from tlens_callback.probes import Probe as Probe
from tlens_callback.probes import ProbeBatch as ProbeBatch
from tlens_callback.reading import Reading as Reading
from tlens_callback.shadow import Shadow as Shadow
from tlens_callback.sinks import LocalSink as LocalSink
from tlens_callback.sinks import MemorySink as MemorySink
from tlens_callback.sinks import Store as Store
from tlens_callback.sinks import WandbSink as WandbSink
from tlens_callback.sinks import read_store as read_store

__version__ = "0.1.0"
