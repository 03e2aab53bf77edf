"""What a sink that hangs waits for."""

import threading

import pytest


@pytest.fixture
def gate():
    """Closed until the test opens it, or ends; then no thread of the test is left."""
    before, opened = set(threading.enumerate()), threading.Event()
    yield opened
    opened.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
