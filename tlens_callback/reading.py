"""`Reading`: one measured quantity, the only thing that travels from instruments to sinks."""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tlens_callback.meaning import Description, Meaning

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


RESERVED = ("cost", "fidelity", "trainer", "checkpoint")
"""First segments of keys that no instrument makes: they are the observer's own."""

TOKEN_AXES = ("pos", "token", "query", "key")
"""Axes whose labels are tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """One quantity at one observation, with everything needed to draw or store it.

    Attributes:
        key: `<instrument>/<measure>` or `<instrument>/<measure>/<probe>`; unique in an observation.
        values: float32 array on the CPU, made read-only. No axes: a number, a point of a curve.
        axes: one name per dimension, in TransformerLens's words: `("layer", "head")`,
            `("layer", "head", "query", "key")`, `("layer", "rank", "pos")`, ...
        unit: "nats", "probability", "logit", "count", "index", ... never empty.
        labels: axis name -> one string per index (tokens, names). Axes without labels are numbered.
        limits: fixed range of the colour scale, so that step 100 compares with step 900.
        texts: one string per value, in an array of the values' shape, where a value stands for
            something with a name: the tokens that a lens reads, behind their ids. numpy's strings
            lose a NUL at their end.
        description: what the instrument says about itself; `observe` puts it there.

    Half a surrogate pair in key, labels or texts, which no file can hold, becomes its escape.

    Raises:
        ValueError: where key, values, axes, labels and limits do not fit together.
    """

    key: str
    values: np.ndarray
    axes: tuple[str, ...] = ()
    unit: str
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    limits: tuple[float, float] | None = None
    texts: np.ndarray | None = None
    description: Description = field(default=Description(), repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", _encodable(self.key))
        parts = self.key.split("/", 2)
        if len(parts) < 2 or not all(parts):
            raise ValueError(
                f"A reading's key is '<instrument>/<measure>' or '<instrument>/<measure>/<probe>', "
                f"got {self.key!r}."
            )
        values = np.array(np.asarray(self.values), dtype=np.float32)
        if values.ndim != len(self.axes):
            raise ValueError(
                f"Reading {self.key!r} has values of shape {values.shape} but axes {self.axes}: "
                f"name each dimension once."
            )
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"Reading {self.key!r} names an axis twice: {self.axes}.")
        if not self.unit:
            raise ValueError(f"Reading {self.key!r} has no unit; say what one unit of it is.")
        labels = {
            axis: tuple(_encodable(str(name)) for name in names)
            for axis, names in self.labels.items()
        }
        for axis, names in labels.items():
            if axis not in self.axes:
                raise ValueError(
                    f"Reading {self.key!r} labels axis {axis!r}, which is not one of {self.axes}."
                )
            size = values.shape[self.axes.index(axis)]
            if len(names) != size:
                raise ValueError(
                    f"Reading {self.key!r}: axis {axis!r} has {size} indices "
                    f"but {len(names)} labels."
                )
        if self.limits is not None:
            low, high = self.limits
            if not low < high:
                raise ValueError(
                    f"Reading {self.key!r}: limits are (low, high) with low < high, "
                    f"got {self.limits}."
                )
        if self.texts is not None:
            texts = np.array(self.texts, dtype=np.str_)
            flat = [_encodable(text) for text in texts.ravel().tolist()]
            texts = np.array(flat, dtype=np.str_).reshape(texts.shape)
            if texts.shape != values.shape:
                raise ValueError(
                    f"Reading {self.key!r} has values of shape {values.shape} but texts of shape "
                    f"{texts.shape}: give one text per value."
                )
            texts.setflags(write=False)
            object.__setattr__(self, "texts", texts)
        values.setflags(write=False)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "axes", tuple(self.axes))
        object.__setattr__(self, "labels", labels)

    @property
    def instrument(self) -> str:
        """First segment of the key."""
        return self.key.split("/", 2)[0]

    @property
    def measure(self) -> str:
        """Second segment of the key."""
        return self.key.split("/", 2)[1]

    @property
    def probe(self) -> str | None:
        """What follows the second slash, or None for a reading that belongs to no single probe."""
        parts = self.key.split("/", 2)
        return parts[2] if len(parts) == 3 else None

    @property
    def meaning(self) -> Meaning:
        """What the instrument says of this measure."""
        return self.description.meaning(self.measure)

    def described(self, description: Description) -> "Reading":
        """The same reading with what its instrument says about itself."""
        same = copy(self)
        object.__setattr__(same, "description", description)
        return same

    def to_plotly(self, /, **at: int) -> "Figure":
        """An interactive figure: a number, a line or bars, a heat map of the last two axes with a
        slider over the axes before them.

        Args:
            at: the index of an axis, to show only what is there: `to_plotly(layer=5)`.

        Raises:
            ValueError: for an axis or index that is not there, or more than a million values.
        """
        # Looks up, late: drawing is above a reading, and users ask a reading to be drawn.
        from tlens_callback.render.figure import to_plotly

        return to_plotly(self, at)

    def _repr_html_(self) -> str:
        # Looks up, late: as `to_plotly` does.
        from tlens_callback.render.snippet import snippet

        return snippet(self)


def descriptions(readings: Iterable[Reading]) -> dict[str, Description]:
    """Instrument -> what it says about itself, of the instruments that say something."""
    said = {reading.instrument: reading.description for reading in readings}
    return {name: one for name, one in said.items() if one != Description()}


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
