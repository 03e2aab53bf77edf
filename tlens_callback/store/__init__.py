"""The files of a run, written and read back."""

from tlens_callback.store.store import Store as Store
from tlens_callback.store.store import read_store as read_store
