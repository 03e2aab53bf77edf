"""Writes to Weights & Biases: the sink, what it shows, and the saved view of its panels."""

from tlens_callback.sinks.wandb.sink import WandbSink as WandbSink
