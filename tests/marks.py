"""Marks on a part of a test's arguments."""

from collections.abc import Collection, Iterable, Sequence
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


def in_turns(names: Iterable[Any], ways: Sequence[Any]) -> list[Any]:
    """Parameters for each name and way; of each name all ways but one are marked as exhaustive."""
    found = []
    for i, name in enumerate(names):
        values, marks = getattr(name, "values", (name,)), getattr(name, "marks", ())
        for j, way in enumerate(ways):
            more = [pytest.mark.exhaustive] * (i % len(ways) != j)
            found.append(pytest.param(*values, way, marks=[*marks, *more]))
    return found
