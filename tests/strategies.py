"""Readings of any kind, for the tests that try many of them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tlens_callback.reading import Reading

AXES = ("layer", "head", "pos", "rank", "key", "query", "step", "value", "text", "probe", "été x")

numbers = st.floats(width=32)
"""NaN, infinities, -0 and what is nearly zero among them."""

words = st.text(st.characters(), max_size=5)
"""Any letters, also halves of surrogate pairs."""

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)


@dataclass(frozen=True)
class Kind:
    """All of a reading but its key and its values."""

    axes: tuple[str, ...]
    shape: tuple[int, ...]
    causal: bool
    """Attention patterns within their limits, with nothing above the diagonal."""
    about: dict[str, Any]

    def values(self) -> st.SearchStrategy[np.ndarray]:
        """Of this shape."""
        if not self.causal:
            usual = npst.arrays(np.float32, self.shape, elements=st.floats(-9, 9, width=16))
            return usual | npst.arrays(np.float32, self.shape, elements=numbers)
        low, high = self.about["limits"]
        inside = st.floats(low, high, width=32) | st.just(np.nan)
        return npst.arrays(np.float32, self.shape, elements=inside).map(np.tril)

    def texts(self) -> st.SearchStrategy[np.ndarray | None]:
        """None, or one for each value."""
        # numpy's strings lose a NUL at their end.
        one = words.map(lambda text: text.rstrip("\0"))
        size = int(np.prod(self.shape, dtype=int))
        some = st.lists(one, min_size=size, max_size=size).map(
            lambda texts: np.array(texts, dtype=np.str_).reshape(self.shape)
        )
        return st.none() if self.causal or size > 12 else st.none() | some


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """Up to three axes of up to four indices, none among them; or patterns of heads."""
    causal = draw(st.booleans())
    if causal:
        n = draw(st.integers(0, 4))
        axes, shape = ("layer", "query", "key"), (draw(st.integers(1, 3)), n, n)
        limits: Any = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 0.5)]))
    else:
        axes = tuple(draw(st.lists(st.sampled_from(AXES), max_size=3, unique=True)))
        shape = tuple(draw(st.integers(0, 4)) for _ in axes)
        ends = st.lists(st.floats(allow_nan=False), min_size=2, max_size=2, unique=True)
        limits = draw(st.none() | ends.map(sorted).map(tuple))
    labels = {
        axis: draw(st.lists(words, min_size=size, max_size=size))
        for axis, size in zip(axes, shape, strict=True)
        if draw(st.booleans())
    }
    return Kind(axes, shape, causal, {"unit": draw(names), "limits": limits, "labels": labels})


keys = st.tuples(names, names, st.none() | words.filter(bool)).map(
    lambda parts: "/".join(part.replace("/", "|") for part in parts if part)
)


@st.composite
def runs(draw: st.DrawFn, *, most_steps: int = 4) -> list[list[Reading]]:
    """What one step after another reads: often the same key in the same kind, with other values."""
    known = draw(st.lists(kinds(), min_size=1, max_size=2))
    called = draw(st.lists(keys, min_size=1, max_size=3, unique=True))
    return [
        [
            Reading(key=key, values=draw(kind.values()), axes=kind.axes, texts=draw(kind.texts()),
                    **kind.about)
            for key in draw(st.lists(st.sampled_from(called), unique=True))
            for kind in [draw(st.sampled_from(known))]
        ]
        for _ in range(draw(st.integers(1, most_steps)))
    ]  # fmt: skip
