"""Marks on a part of a test's arguments."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def exhaustive(values: Iterable[Any], these: Collection[Any]) -> list[Any]:
    """Parameters of a test, in this order; `these` are marked as exhaustive."""
    found = []
    for value in values:
        own, marks = getattr(value, "values", (value,)), getattr(value, "marks", ())
        seldom = own[0] in these
        found.append(pytest.param(*own, marks=[*marks, *[pytest.mark.exhaustive] * seldom]))
    return found
