"""What each instrument of this package measures, in a sentence."""

import inspect
import re
from functools import lru_cache


@lru_cache
def meanings() -> dict[str, str]:
    """Instrument's usual name -> first sentence of its docstring; where docstrings are kept."""
    # They import what draws readings, this page too.
    from tlens_callback import instruments
    from tlens_callback.events import Watch

    there = [getattr(instruments, name) for name in instruments.__all__]
    return {
        one.name: sentence[0]
        for one in [*filter(inspect.isclass, there), Watch]
        if (sentence := re.match(r".+?\.(?=\s|$)", " ".join((one.__doc__ or "").split())))
    }
