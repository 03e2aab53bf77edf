"""The page's data back to numbers, number by number: slow, and nothing of the package's."""

import base64
import html.parser
import itertools
import json
import math
import struct
import zlib

import numpy as np


def inflate(text):
    return zlib.decompress(base64.b64decode(text, validate=True), wbits=-15)


class Decoder:
    """Steps in, one after another; readings out."""

    def __init__(self):
        self.before = {}

    def step(self, blobs):
        """Key -> entry with "values", the whole array; nan where nothing is told."""
        small, *large = blobs
        content = inflate(small)
        (length,) = struct.unpack_from("<I", content)
        entries = json.loads(content[4 : 4 + length].decode())
        begin = math.ceil((4 + length) / 4) * 4
        assert set(content[4 + length : begin]) <= {0}
        out = {}
        for given in entries:
            key = given["key"]
            assert key not in out and ("at" in given) != ("blob" in given)
            entry = dict(given)
            if given.get("same"):
                assert set(given) <= {"key", "same", "delta", "at", "blob"}
                entry = {**self.before[key][0], **given}
            if "blob" in given:
                raw = inflate(large[given["blob"]])
            else:
                assert given["at"] % 4 == 0
                raw = content[begin + given["at"] :]
            codes = integers(entry, raw)
            if given["delta"]:
                bits = WIDTH[entry["type"]] * 8
                was = self.before[key][1]
                if bits > 8:
                    codes = [code // 2 if code % 2 == 0 else -(code + 1) // 2 for code in codes]
                codes = [(a + b) % 2**bits for a, b in zip(codes, was, strict=True)]
            self.before[key] = (
                {k: v for k, v in entry.items() if k not in ("same", "delta", "at", "blob")},
                codes,
            )
            out[key] = {**entry, **{k: given[k] for k in ("delta", "at", "blob") if k in given}}
            out[key]["values"] = whole(entry, [number(entry, code) for code in codes])
        named = sorted(entry["blob"] for entry in entries if "blob" in entry)
        assert named == list(range(len(large)))
        return out


WIDTH = {"u8": 1, "f16": 2, "bf16": 2, "f32": 4}


def places(entry):
    """The index of each number of the payload in the whole array."""
    shape = entry["shape"]
    leads = list(itertools.product(*map(range, shape[:-2])))
    if "select" in entry:
        leads = [leads[i] for i in entry["select"]]
    if entry["tril"]:
        n = shape[-1]
        ends = [(row, column) for row in range(n) for column in range(row + 1)]
    elif "select" in entry:
        ends = list(itertools.product(*map(range, shape[-2:])))
    else:
        return list(itertools.product(*map(range, shape)))
    return [(*lead, *end) for lead in leads for end in ends]


def integers(entry, raw):
    count, width = len(places(entry)), WIDTH[entry["type"]]
    return [
        sum(raw[plane * count + i] << (8 * plane) for plane in range(width)) for i in range(count)
    ]


def number(entry, code):
    if entry["type"] == "f32":
        return struct.unpack("<f", struct.pack("<I", code))[0]
    if entry["type"] == "f16":
        return struct.unpack("<e", struct.pack("<H", code))[0]
    if entry["type"] == "bf16":
        return struct.unpack("<f", struct.pack("<HH", 0, code))[0]
    if code == 255:
        return math.nan
    if not entry["signed"]:
        return (code / 254) ** 2 * entry["scale"]
    x = (code - 127) / 127
    return math.copysign(x * x, x) * entry["scale"]


def whole(entry, numbers):
    values = np.full(entry["shape"], math.nan)
    if entry["tril"]:
        selected = entry.get("select", range(math.prod(entry["shape"][:-2])))
        for flat in selected:
            values[np.unravel_index(flat, entry["shape"][:-2])] = 0
    for place, value in zip(places(entry), numbers, strict=True):
        values[place] = value
    return values


class Page(html.parser.HTMLParser):
    """What a browser takes a page apart into, as far as these tests ask."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.steps, self.about, self._in = [], {}, None, None
        self.feed(text)
        self.close()
        decoder = Decoder()
        self.readings = {step: decoder.step(blobs) for step, blobs in self.steps.items()}

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._in = dict(attrs) if tag == "script" else None

    def handle_endtag(self, tag):
        self._in = None

    def handle_data(self, data):
        if self._in is None:
            return
        if self._in.get("id") == "about":
            self.about = json.loads(data)
        if self._in.get("class") == "step":
            self.steps[int(self._in["data-step"])] = data.split("\n")

    @property
    def notes(self):
        return self.about["notes"]


def near(entry, reading, *, more=0.0):
    """Whether an entry says all that the reading says, and its numbers within what is promised, and
    `more` where they are codes."""
    said = {
        "axes": list(reading.axes),
        "unit": reading.unit,
        "shape": list(reading.values.shape),
        "labels": {axis: list(names) for axis, names in reading.labels.items()},
        "texts": None if reading.texts is None else reading.texts.ravel().tolist(),
        "limits": None
        if reading.limits is None
        else [x if math.isfinite(x) else None for x in reading.limits],
    }
    same = all(entry.get(name) == value for name, value in said.items())
    values, got = reading.values.astype(np.float64), entry["values"]
    if entry["type"] == "f32":
        return same and np.array_equal(got, values, equal_nan=True)
    finite = np.isfinite(values)
    if not np.array_equal(got[~finite], values[~finite], equal_nan=True):
        return False
    if entry["type"] == "f16":
        allowed = np.maximum(np.abs(values) * 2**-11, 2**-25)
    elif entry["type"] == "bf16":
        # Below the smallest normal number there are fewer digits.
        allowed = np.maximum(np.abs(values) * 2**-8, 2**-134)
    elif entry["signed"]:
        allowed = 0.0079 * entry["scale"] + more
    else:
        allowed = 0.0040 * entry["scale"] + more
    off = np.abs(got[finite] - values[finite])
    return same and bool((off <= np.broadcast_to(allowed, values.shape)[finite]).all())
