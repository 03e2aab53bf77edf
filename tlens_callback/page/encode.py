"""Encodes readings for the page's script: small integers, differences, byte planes, deflate.

A step is a list of blobs, each compressed with raw deflate. The first, inflated, is: the length of
a JSON text (uint32, little-endian), the text, zeros up to a multiple of 4, and payloads, each
filled up to a multiple of 4. The text is a list of entries, one for each reading, in order; an
entry's payload begins at byte `at` after the text, or it is the whole of large blob number `blob`.

- `type` "f32" and "f16" are the bits of the numbers, "bf16" the upper half of those of "f32".
  "u8" is for attention patterns with limits (0, scale) or, `signed`, (-scale, scale): 255 is "not
  a number", else v = scale * (q / 254)**2 or, with x = (q - 127) / 127, v = scale * sign(x) * x**2.
- `tril`: the payload holds `values[..., rows, columns]` of `numpy.tril_indices(n)`; the rest is 0.
- `select`: it holds only these heads, as flat indices over the leading axes.
- `delta`: it holds the difference, modulo 2**bits, to the previous step that has the key. With more
  than one byte a number, 0, -1, 1, -2, 2, ... are written as 0, 1, 2, 3, 4, ..., so that the upper
  bytes of small differences are 0 whatever their sign.
- A payload is cut into byte planes: the lowest byte of every number, then the next, ...
- `same`: all except `delta`, `at` and `blob` is as in the previous step that has the key.
"""

import base64
import json
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from tlens_callback.page.heads import HEAD_AXES
from tlens_callback.reading import Reading
from tlens_callback.store.triangle import is_pattern, lower_triangle

LARGE = 20_000
"""A payload of more numbers has a blob of its own, which the page inflates when it is shown."""

_KEY_FRAME_EVERY = 20
_HALF_FROM = 4_000
_LARGEST_HALF = 65504.0
_LARGEST_ROUNDED = 3e38


@dataclass(frozen=True)
class Code:
    """Holds an encoded reading: its description for the page, and uint8, uint16 or uint32
    [number]."""

    about: dict[str, Any]
    payload: np.ndarray

    @property
    def key(self) -> str:
        return self.about["key"]


@dataclass(frozen=True)
class Part:
    """Holds a reading within a step: its entry and its bytes, compressed if they are a `blob`."""

    entry: dict[str, Any]
    content: bytes
    blob: bool

    @property
    def size(self) -> float:
        """About how many characters of the page it takes."""
        content = len(self.content if self.blob else _deflate(self.content, 6))
        return (content + len(_deflate(_json(self.entry), 6))) * 4 / 3 + 20


def code(reading: Reading, select: Sequence[int] | None = None, *, rounded: bool = False) -> Code:
    """Encodes a reading as integers; `select` keeps only some heads' patterns, by flat index
    (layer * heads + head); `rounded` keeps 8 binary digits of a matrix of heads.

    An attention pattern within its limits (0, x) or (-x, x) is off by at most half a code: x / 254
    for values near x, or x / 127 with limits (-x, x), and less for smaller values. A reading of
    more than 4,000 values that is no index, and whose largest magnitude is 2**-10 to 65504, is off
    by at most 2**-11 of a value, or 2**-25 if that is more. A matrix of heads, axes ending in
    "layer", "head", that is `rounded` is off by at most 2**-8 of a value, 0.4%. Everything else is
    exact.
    """
    lower = lower_triangle(reading.values, reading.axes)
    about = {
        "key": reading.key,
        "axes": list(reading.axes),
        "unit": reading.unit,
        "shape": list(reading.values.shape),
        "limits": _limits(reading.limits),
        "labels": {axis: list(names) for axis, names in reading.labels.items()},
    }
    if reading.texts is not None:
        about["texts"] = reading.texts.ravel().tolist()
    values, tril = (reading.values, False) if lower is None else (lower, True)
    return _code(about, values, tril, select, rounded=rounded)


def code_lower(
    key: str, stored: Mapping[str, Any], lower: np.ndarray, select: Sequence[int] | None = None
) -> Code:
    """Encodes a stored pattern from what `Store.about` says of it and its lower triangles."""
    about = {
        "key": key,
        "axes": list(stored["axes"]),
        "unit": stored["unit"],
        "shape": list(stored["shape"]),
        "limits": _limits(stored["limits"]),
        "labels": {axis: list(names) for axis, names in stored["labels"].items()},
    }
    return _code(about, lower, True, select)


def _code(
    about: dict[str, Any],
    values: np.ndarray,
    tril: bool,
    select: Sequence[int] | None,
    *,
    rounded: bool = False,
) -> Code:
    if select is not None:
        assert is_pattern(about["axes"])
        each = values.shape[-1] if tril else values.shape[-1] * values.shape[-2]
        values = values.reshape(-1, each)[list(select)]
    values = values.astype(np.float32, copy=False).ravel()
    about |= {"type": "f32", "tril": tril}
    if select is not None:
        about["select"] = [int(place) for place in select]
    low, high = _range(values)
    scale = _scale(about, low, high)
    if scale is not None:
        signed = about["limits"][0] != 0
        about |= {"type": "u8", "scale": scale, "signed": signed}
        payload = _to_bytes(values, scale, signed)
    elif rounded and _can_be_rounded(about, low, high):
        about["type"] = "bf16"
        payload = torch.from_numpy(np.array(values)).bfloat16().view(torch.int16).numpy()
        payload = payload.view(np.uint16)
    elif _fits_half(about, values, low, high):
        about["type"] = "f16"
        # numpy converts what is below 2**-14 in software, ten times slower than torch.
        payload = torch.from_numpy(np.array(values)).half().numpy().view(np.uint16)
    else:
        payload = np.ascontiguousarray(values).view(np.uint32)
    return Code(about, payload)


def _range(values: np.ndarray) -> tuple[float, float]:
    """Returns the smallest and the largest value that is not NaN; 0 if there is none."""
    if not values.size:
        return 0.0, 0.0
    low, high = float(values.min()), float(values.max())
    if math.isnan(low):
        numbers = values[~np.isnan(values)]
        return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)
    return low, high


def _limits(limits: Sequence[float] | None) -> list[float | None] | None:
    return None if limits is None else [float(x) if math.isfinite(x) else None for x in limits]


def _scale(about: Mapping[str, Any], low: float, high: float) -> float | None:
    """Returns the scale of a pattern if it can be encoded in one byte per number; else None."""
    if not is_pattern(about["axes"]) or about["limits"] is None:
        return None
    least, most = about["limits"]
    if least is None or most is None or most <= 0 or least not in (0, -most):
        return None
    # Limits are for colours: values may be beyond them, and one byte could not hold those.
    room = most * 1e-3
    return most if least - room <= low and high <= most + room else None


def _to_bytes(values: np.ndarray, scale: float, signed: bool) -> UInt8[np.ndarray, " n"]:
    x = np.abs(values)
    x *= np.float32(1 / scale)
    np.sqrt(x, out=x)
    np.minimum(x, 1, out=x)
    if signed:
        np.copysign(x, values, out=x)
        x *= 127
        x += 127.5
    else:
        x *= 254
        x += 0.5
    unknown = np.isnan(x)
    if unknown.any():
        x[unknown] = 255
    return x.astype(np.uint8)


def _fits_half(about: Mapping[str, Any], values: np.ndarray, low: float, high: float) -> bool:
    if values.size <= _HALF_FROM or about["unit"] == "index":
        return False
    largest = max(-low, high)
    if math.isinf(largest):
        finite = np.abs(values[np.isfinite(values)])
        largest = float(finite.max(initial=0))
    # float16 keeps 2**-24 and no less: small numbers, as of a new adapter, would become 0.
    return largest == 0 or 2**-10 <= largest < _LARGEST_HALF


def _can_be_rounded(about: Mapping[str, Any], low: float, high: float) -> bool:
    """Whether a reading is a matrix of heads; not if it has numbers that would become infinite."""
    is_matrix = tuple(about["axes"][-2:]) == HEAD_AXES and about["unit"] != "index"
    return is_matrix and not any(_LARGEST_ROUNDED < abs(x) < math.inf for x in (low, high))


class Track:
    """Turns the codes of successive steps into parts, as differences to the step before.

    With `deltas` False each step is encoded by itself.
    """

    def __init__(self, *, deltas: bool = True) -> None:
        self._deltas = deltas
        self._before: dict[str, tuple[Code, int]] = {}

    def part(self, coded: Code, *, blob: bool | None = None) -> Part:
        """Returns the part of this reading.

        `blob`: whether it has a blob of its own; by default a large payload has. Every twentieth
        blob of a key is not a difference, so that a jump to any step inflates at most twenty.
        """
        if blob is None:
            blob = coded.payload.size > LARGE
        about, payload = coded.about, coded.payload
        before, since = self._before.get(coded.key, (None, 0))
        same = before is not None and before.about == about
        delta = same and not (blob and since + 1 == _KEY_FRAME_EVERY)
        if self._deltas:
            self._before[coded.key] = (coded, since + 1 if delta else 0)
        entry = {"key": coded.key, "same": True} if same else dict(about)
        entry["delta"] = delta
        if delta:
            assert before is not None
            payload = _signs_last(payload - before.payload)
        content = _planes(payload)
        return Part(entry, _deflate_noise(content) if blob else content, blob)


def _signs_last(differences: np.ndarray) -> np.ndarray:
    """Writes differences modulo 2**bits as 0, -1, 1, -2, 2, ... are counted."""
    bits = 8 * differences.dtype.itemsize
    if bits == 8:  # there is no upper byte
        return differences
    signs = differences.view(f"i{bits // 8}") >> (bits - 1)
    return (differences << 1) ^ signs.view(differences.dtype)


def _planes(payload: np.ndarray) -> bytes:
    width = payload.dtype.itemsize
    little = payload.astype(payload.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(-1, width).T.tobytes()


def _deflate_noise(content: bytes) -> bytes:
    """Deflates without searching for repetitions, since attention repeats only in runs.

    It is fifteen times faster than level 6, and smaller for differences.
    """
    sizes = [_deflate(content, 6, how) for how in (zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE)]
    return min(sizes, key=len)


def _deflate(content: bytes, level: int, how: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    stream = zlib.compressobj(level, zlib.DEFLATED, -15, 9, how)
    return stream.compress(content) + stream.flush()


def blobs(parts: Iterable[Part]) -> list[str]:
    """Returns a step in base64: first the blob with the entries and the small payloads, then the
    large blobs."""
    entries, payloads, large, at = [], [], [], 0
    for part in parts:
        if part.blob:
            entries.append({**part.entry, "blob": len(large)})
            large.append(part.content)
        else:
            entries.append({**part.entry, "at": at})
            filled = part.content + bytes(-len(part.content) % 4)
            payloads.append(filled)
            at += len(filled)
    text = _json(entries)
    head = struct.pack("<I", len(text)) + text
    small = _deflate(b"".join([head, bytes(-len(head) % 4), *payloads]), 6)
    return [base64.b64encode(blob).decode("ascii") for blob in (small, *large)]


def _json(entries: Any) -> bytes:
    return json.dumps(entries, separators=(",", ":"), allow_nan=False).encode("ascii")
