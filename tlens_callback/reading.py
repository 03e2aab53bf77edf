"""`Reading`: one measured quantity. Instruments give readings to sinks, and nothing else."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tlens_callback.meaning import Description, Meaning

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


RESERVED = ("cost", "fidelity", "trainer", "checkpoint", "rollouts")
"""First segments of keys that only the observer may use."""

_NAMED_BY_OTHERS = "trainer"
"""The instrument whose measures have names of somebody else's, with any number of slashes."""

TOKEN_AXES = ("pos", "token", "query", "key")
"""Axes whose labels are tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """Holds one quantity at one observation, with everything needed to draw or store it.

    Attributes:
        key: `<instrument>/<measure>` or `<instrument>/<measure>/<probe>`; unique in an observation.
            `split_key` takes it apart.
        values: float32 array on the CPU, made read-only. Without axes it is a single number, which
            becomes a point of a curve.
        axes: one name per dimension, in TransformerLens's words: `("layer", "head")`,
            `("layer", "head", "query", "key")`, `("layer", "rank", "pos")`, ...
        unit: "nats", "probability", "logit", "count", "index", ...; never empty.
        labels: axis name -> one string per index (tokens, names). Axes without labels are numbered.
        limits: fixed range of the colour scale, so that step 100 can be compared with step 900.
            A value that is beyond it by no more than rounding is brought back to it.
        texts: one string per value, in an array of the values' shape, if each value stands for
            something with a name: a token id for its token. numpy's strings lose a NUL at their
            end.
        description: what the instrument says about itself; `observe` sets it.

    Half a surrogate pair in key, labels or texts cannot be written to a file; its escape is written
    instead.

    Raises:
        ValueError: if key, values, axes, labels and limits do not fit together.
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
                f"A reading's key must be '<instrument>/<measure>' or "
                f"'<instrument>/<measure>/<probe>', got {self.key!r}."
            )
        values = np.asarray(self.values, dtype=np.float32)
        # An array of its own that nobody may write needs no copy: attention patterns are large.
        if values.flags.writeable or values.base is not None:
            values = values.copy()
        if values.ndim != len(self.axes):
            raise ValueError(
                f"Reading {self.key!r} has values of shape {values.shape} but axes {self.axes}; "
                f"it needs one axis name for each dimension."
            )
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"Reading {self.key!r} names an axis twice: {self.axes}.")
        if not self.unit:
            raise ValueError(f"Reading {self.key!r} has no unit; give one, such as unit='nats'.")
        labels = {
            axis: tuple(_encodable(str(name)) for name in names)
            for axis, names in self.labels.items()
        }
        for axis, names in labels.items():
            if axis not in self.axes:
                raise ValueError(
                    f"Reading {self.key!r} has labels for axis {axis!r}, which is not one of its "
                    f"axes {self.axes}."
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
                    f"Reading {self.key!r}: limits must be (low, high) with low < high, "
                    f"got {self.limits}."
                )
            values = _cut_rounding(values, low, high)
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
        """The first segment of the key."""
        return split_key(self.key)[0]

    @property
    def measure(self) -> str:
        """The second segment of the key; in `trainer/<name>` the whole name."""
        return split_key(self.key)[1]

    @property
    def probe(self) -> str | None:
        """The rest of the key after its second slash; None if the reading is not of one probe."""
        return split_key(self.key)[2]

    @property
    def meaning(self) -> Meaning:
        """What the instrument says about this measure."""
        return self.description.meaning(self.measure)

    def described(self, description: Description) -> "Reading":
        """Returns the same reading with this description of its instrument."""
        same = copy(self)
        object.__setattr__(same, "description", description)
        return same

    def to_plotly(self, /, **at: int) -> "Figure":
        """Draws an interactive figure: a number, a line, bars, or a heat map of the last two axes
        with a slider over the axes before them.

        Args:
            at: an axis and an index of it, to draw only that part: `to_plotly(layer=5)`.

        Raises:
            ValueError: for an axis or index that does not exist, or more than a million values.
        """
        # Imports a higher room, late: users expect a reading to draw itself.
        from tlens_callback.render.figure import to_plotly

        return to_plotly(self, at)

    def _repr_html_(self) -> str:
        # Imports a higher room, late, as `to_plotly` does.
        from tlens_callback.render.snippet import snippet

        return snippet(self)


def split_key(key: str) -> tuple[str, str, str | None]:
    """Returns the instrument, the measure and the probe of a key.

    The names that a trainer logs have slashes of their own, as in
    `trainer/completions/mean_length`: there the measure is the whole name, and there is no probe.
    """
    instrument, _, rest = key.partition("/")
    if instrument == _NAMED_BY_OTHERS:
        return instrument, rest, None
    measure, slash, probe = rest.partition("/")
    return instrument, measure, probe if slash else None


def descriptions(readings: Iterable[Reading]) -> dict[str, Description]:
    """Returns instrument -> description, for the instruments that describe themselves."""
    said = {reading.instrument: reading.description for reading in readings}
    return {name: one for name, one in said.items() if one != Description()}


def _cut_rounding(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Brings values back that rounding has put beyond a limit, by up to 1e-5 of the range."""
    slack = 1e-5 * (high - low)
    largest = float(np.finfo(np.float32).max)
    if not np.isfinite(slack) or max(abs(low), abs(high)) > largest:
        return values
    # The nearest float32 may be beyond the limit too.
    top, bottom = np.float32(high), np.float32(low)
    top = np.nextafter(top, np.float32(-np.inf)) if float(top) > high else top
    bottom = np.nextafter(bottom, np.float32(np.inf)) if float(bottom) < low else bottom
    over, under = values > top, values < bottom
    if not (over.any() or under.any()):
        return values
    values = values.copy()
    for beyond, limit in ((over, top), (under, bottom)):
        here = values[beyond]
        near = np.abs(here.astype(np.float64) - float(limit)) <= slack
        values[beyond] = np.where(near, limit, here)
    return values


_BYTE = re.compile("<0x([0-9A-F]{2})>")


def legible(tokens: Sequence[str]) -> list[str]:
    """Returns what to write at each token, so that all of them read as a text.

    A character whose bytes are in several tokens, named `<0xE4>`, stands at the first of them, with
    the marks that are drawn on it; the others have "".
    """
    words, first = list(tokens), 0
    while first < len(tokens):
        end = first
        while end < len(tokens) and _BYTE.search(tokens[end]):
            end += 1
        for i, word in enumerate(_spread(tokens[first:end]), start=first):
            words[i] = word
        first = end + 1
    return words


def _spread(tokens: Sequence[str]) -> list[str]:
    """Returns the characters of neighbouring tokens with bytes, each at the token it begins in."""
    parts = [
        b"".join(
            bytes.fromhex(part) if i % 2 else part.encode()
            for i, part in enumerate(_BYTE.split(of))
        )
        for of in tokens
    ]
    owners = [i for i, part in enumerate(parts) for _ in part]
    words, owner, at, last = ["" for _ in tokens], None, 0, ""
    for char in b"".join(parts).decode(errors="surrogateescape"):
        whole = not "\udc80" <= char <= "\udcff"
        text = char if whole else f"<0x{ord(char) - 0xDC00:02X}>"
        drawn_on = unicodedata.category(char)[0] == "M" or char in _JOINED or last == _JOINER
        owner = owners[at] if owner is None or not drawn_on else owner
        words[owner] += text
        at, last = at + (len(char.encode()) if whole else 1), char
    return words


_JOINER = "\N{ZERO WIDTH JOINER}"
_JOINED = {_JOINER, *map(chr, range(0x1F3FB, 0x1F400))}
"""Characters that make one emoji with that before them: the joiner, and colours of skin."""


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
