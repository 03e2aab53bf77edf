"""Rollouts: what a model samples while it is trained with rewards, and what happens inside it."""

from tlens_callback.rollouts.look import Look
from tlens_callback.rollouts.recorder import Recorder
from tlens_callback.rollouts.settings import Rollouts

__all__ = ["Look", "Recorder", "Rollouts"]
