"""Finds events in the readings of a run: `Watch` and `Rule`. No model is run here."""

from tlens_callback.events.rules import Rule as Rule
from tlens_callback.events.watch import Watch as Watch
