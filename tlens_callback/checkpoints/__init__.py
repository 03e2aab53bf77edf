"""Finds out what a directory or a hub name holds, and loads saved models one after another."""

from tlens_callback.checkpoints.checkpoint import Checkpoint as Checkpoint
from tlens_callback.checkpoints.checkpoint import checkpoints_in as checkpoints_in
from tlens_callback.checkpoints.checkpoint import survey as survey
from tlens_callback.checkpoints.loader import Loader as Loader
