"""Writes the files of a run and reads them back."""

from tlens_callback.store.store import Store as Store
from tlens_callback.store.store import read_store as read_store
