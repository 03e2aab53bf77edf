"""Says when something happens in a run. Reads what was read; runs no model."""

from tlens_callback.events.rules import Rule as Rule
from tlens_callback.events.watch import Watch as Watch
