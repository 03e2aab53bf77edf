"""Where readings go. A sink writes; it never computes a measure."""

from tlens_callback.sinks.local import LocalSink as LocalSink
from tlens_callback.sinks.memory import MemorySink as MemorySink
from tlens_callback.sinks.tensorboard import TensorBoardSink as TensorBoardSink
from tlens_callback.sinks.trackio import TrackioSink as TrackioSink
from tlens_callback.sinks.wandb import WandbSink as WandbSink
from tlens_callback.store import Store as Store
from tlens_callback.store import read_store as read_store
