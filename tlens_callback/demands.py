"""Checks the numbers that a dataclass is given, by the types of its fields."""

import math
from collections.abc import Sequence
from dataclasses import fields
from numbers import Real
from operator import index
from typing import Any, get_args


def demand_numbers(thing: Any, **least: int) -> None:
    """Checks the fields of a dataclass that are numbers or switches.

    Whole numbers of other packages (numpy's) become Python's. Comparing with `<` alone would let
    2.5 and NaN pass, and they would fail later, where nobody sees why.

    Args:
        least: field -> its smallest value.

    Raises:
        ValueError: for a whole number that is none, another number that is none, NaN, a switch that
            is neither True nor False, or a value below its smallest.
    """
    for field in fields(thing):
        kinds = get_args(field.type) or (field.type,)
        if {int, float, bool}.isdisjoint(kinds) or not field.init:
            continue
        value = getattr(thing, field.name)
        given = f"{type(thing).__name__}({field.name}={value!r})"
        if value is None and type(None) in kinds:
            continue
        if bool in kinds or isinstance(value, bool):
            if bool not in kinds or not isinstance(value, bool):
                wanted = "True or False" if bool in kinds else "a number"
                raise ValueError(f"{given}: give {wanted}.")
        elif float in kinds:
            if not isinstance(value, Real) or math.isnan(value):
                raise ValueError(f"{given}: give a number.")
        elif (whole := _whole(value)) is not None:
            if abs(whole) >= 2**31:
                raise ValueError(f"{given}: that is too large; give a number below 2**31.")
            object.__setattr__(thing, field.name, whole)
            if whole < least.get(field.name, whole):
                raise ValueError(f"{given}: give {field.name} >= {least[field.name]}.")
        elif set(kinds) <= {int, type(None)} or not isinstance(value, Sequence):
            raise ValueError(f"{given}: give a whole number.")


def _whole(value: Any) -> int | None:
    """Returns a whole number of Python or of another package; None for anything else."""
    try:
        return index(value)
    except TypeError:
        return None
