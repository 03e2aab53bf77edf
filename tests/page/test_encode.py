"""What the page is told of a reading, read back by arithmetic of the tests' own."""

import json
import time

import numpy as np
import pytest

from tests.page.decode import Decoder, near
from tests.sinks.samples import ODD, everything, pattern
from tlens_callback.page.encode import Track, _signs_last, blobs, code, code_lower
from tlens_callback.reading import Reading
from tlens_callback.store.triangle import lower_triangle


def one(reading, select=None):
    """The entry of a reading by itself."""
    (entry,) = Decoder().step(blobs([Track().part(code(reading, select))])).values()
    return entry


def attention(values, limits=(0, 1), **more):
    axes = ("layer", "head", "query", "key")
    return Reading(key="a/b", values=values, axes=axes, unit="x", limits=limits, **more)


def vector(values, unit="x"):
    return Reading(key="a/b", values=values, axes=("rank",), unit=unit)


def test_readings_of_every_shape_come_back():
    decoder, track = Decoder(), Track()
    kinds = set()
    for step in (0, 10, 20):
        put = [*everything(step), vector(np.linspace(step + 1, step + 2, 5000))]
        got = decoder.step(blobs([track.part(code(reading)) for reading in put]))
        assert list(got) == [reading.key for reading in put]
        for reading, entry in zip(put, got.values(), strict=True):
            assert near(entry, reading)
            kinds.add((entry["type"], entry["tril"], bool(entry.get("same")), entry["delta"]))
            if reading.values.size and np.isfinite(reading.values).any():
                off = Reading(**{**vars(reading), "values": reading.values + 0.02})
                assert not near(entry, off)
            assert not near(entry, Reading(**{**vars(reading), "unit": "other"}))
    assert {kind[0] for kind in kinds} == {"u8", "f16", "f32"}
    assert ("u8", True, False, False) in kinds and ("u8", True, True, True) in kinds


def test_texts_and_labels_are_kept_letter_by_letter():
    odd = [*ODD, "</script><script>", "<!--", "\u2029", "\x7f"]
    reading = Reading(
        key="</script>/<!--/\u2028",
        values=np.zeros(len(odd)),
        axes=("rank",),
        unit="</script>",
        labels={"rank": odd},
        texts=odd[::-1],
    )
    entry = one(reading)
    assert entry["texts"] == odd[::-1] and entry["labels"]["rank"] == odd and near(entry, reading)


def test_a_code_is_off_by_half_a_code_at_most():
    for scale in (1, 0.25, 7.5):
        x = np.linspace(0, 1, 300 * 300, dtype=np.float32).reshape(1, 1, 300, 300) * scale
        for signed in (False, True):
            values = np.where(np.indices(x.shape).sum(0) % 2, x, -x) if signed else x
            reading = attention(values, (-scale if signed else 0, scale))
            entry = one(reading)
            assert (entry["type"], entry["signed"], entry["scale"]) == ("u8", signed, scale)
            assert near(entry, reading) and "blob" in entry
            worst = np.abs(entry["values"] - reading.values).max() / scale
            assert worst == pytest.approx(1 / (127 if signed else 254), rel=0.02)
            # The ends and zero are exact.
            assert entry["values"].max() == scale and np.abs(entry["values"]).min() == 0


def test_bytes_are_for_attention_within_its_limits_only():
    values = pattern().values
    assert one(attention(values))["type"] == "u8"
    assert one(attention(-values, (-1, 1)))["type"] == "u8"
    assert one(attention(values * 1.0005))["type"] == "u8"  # rounding
    for other in (
        attention(values * 1.5),
        attention(-values),
        attention(values, None),
        attention(values, (0, float("inf"))),
        attention(values, (-1, 2)),
        attention(values, (0.5, 1)),
        Reading(**{**vars(attention(values)), "axes": ("layer", "head", "query", "pos")}),
    ):
        entry = one(other)
        assert entry["type"] != "u8" and near(entry, other)


def test_what_is_no_number_stays_so():
    for limits in ((0, 1), (-1, 1)):
        values = pattern().values.copy()
        values[0, 1, 3] = np.nan
        entry = one(attention(values, limits))
        assert (
            entry["type"] == "u8" and not entry["tril"] and near(entry, attention(values, limits))
        )
        assert np.isnan(entry["values"]).sum() == np.isnan(values).sum()
        values[0, 1, 3, 1] = np.inf
        entry = one(attention(values, limits))
        assert entry["type"] != "u8" and near(entry, attention(values, limits))
    odd = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38, 1 / 3])
    for many, kind in ((1, "f32"), (20, "f32")):
        assert one(vector(np.tile(odd, many)))["type"] == kind
        assert near(one(vector(np.tile(odd, many))), vector(np.tile(odd, many)))
    halves = np.tile([np.nan, np.inf, -np.inf, -0.0, 2**-24, 65503.0, 1 / 3], 800)
    entry = one(vector(halves))
    assert entry["type"] == "f16" and near(entry, vector(halves))
    assert np.signbit(entry["values"][3])


@pytest.mark.parametrize(
    ("values", "unit", "kind"),
    [
        (np.full(4000, 0.1), "x", "f32"),
        (np.full(4001, 0.1), "x", "f16"),
        (np.arange(4001), "index", "f32"),
        (np.full(4001, 65504.0), "x", "f32"),
        (np.full(4001, -7e4), "x", "f32"),
        # What float16 would lose: an adapter that has just begun.
        (np.full(4001, 3e-8), "x", "f32"),
        (np.full(4001, 2**-10), "x", "f16"),
        (np.zeros(4001), "x", "f16"),
        (np.full(4001, np.nan), "x", "f16"),
        (np.zeros(0), "x", "f32"),
    ],
)
def test_halves_are_for_many_numbers_that_they_hold(values, unit, kind):
    entry = one(vector(values, unit))
    assert entry["type"] == kind and near(entry, vector(values, unit))


def matrix(values, unit="probability", axes=("layer", "head")):
    return Reading(key="a/matrix", values=values, axes=axes, unit=unit)


def rounded(reading):
    (entry,) = Decoder().step(blobs([Track().part(code(reading, rounded=True))])).values()
    return entry


def test_a_rounded_matrix_is_off_by_a_256th_of_each_value():
    rng = np.random.default_rng(0)
    values = rng.normal(0, 1, (40, 30)) * 10.0 ** rng.integers(-30, 30, (40, 30))
    values[0, :4] = np.nan, np.inf, -np.inf, -0.0
    entry = rounded(matrix(values, "logit"))
    assert entry["type"] == "bf16" and near(entry, matrix(values, "logit"))
    known = np.isfinite(values) & (values != 0)
    off = np.abs(entry["values"][known] / values.astype(np.float32)[known] - 1)
    # As much as is promised, and not much less.
    assert 0.9 * 2**-8 < off.max() <= 2**-8
    assert np.signbit(entry["values"][0, 3])
    # Numbers with few digits are exact.
    few = np.arange(30 * 40).reshape(30, 40) % 256
    assert (rounded(matrix(few, "tokens"))["values"] == few).all()


def test_only_matrices_of_heads_are_rounded():
    values = np.random.default_rng(0).random((3, 4, 5))
    assert rounded(matrix(values, axes=("block", "layer", "head")))["type"] == "bf16"
    for other in (
        matrix(values, axes=("layer", "head", "pos")),
        matrix(values[0], axes=("layer", "rank")),
        matrix(values[0], unit="index"),
        matrix(values[0] + 3.395e38),
        vector(values[0, 0]),
    ):
        entry = rounded(other)
        assert entry["type"] == "f32" and near(entry, other)
    assert rounded(pattern())["type"] == one(pattern())["type"] == "u8"
    assert one(matrix(values[0]))["type"] == "f32"


@pytest.mark.parametrize("bits", [16, 32])
def test_small_differences_have_zeros_above_whatever_their_sign(bits):
    """Their upper bytes take no room; and every difference comes back."""
    one_step = np.array([0, 1, -1, 2, -2, 127, -128, 2 ** (bits - 1) - 1, -(2 ** (bits - 1))])
    kind = np.dtype(f"u{bits // 8}")
    got = _signs_last(one_step.astype(f"i{bits // 8}").view(kind))
    assert got.dtype == kind
    assert got.tolist() == [2 * x if x >= 0 else -2 * x - 1 for x in one_step.tolist()]
    assert (got[:7] < 256).all()


def test_the_triangle_is_for_what_looks_at_nothing_ahead():
    values = pattern().values.copy()
    assert one(attention(values))["tril"]
    values[0, 0, 2, 3] = 1e-30
    assert not one(attention(values))["tril"]
    assert not one(attention(values[..., :4]))["tril"]
    assert near(one(attention(values[..., :4])), attention(values[..., :4]))


def test_chosen_heads_are_the_right_ones():
    values = np.concatenate([pattern(step, heads=4).values for step in (0, 1)])[:3]
    ahead = values.copy()
    ahead[..., 0, 1] = 0.5
    for put, tril in ((values, True), (ahead, False)):
        entry = one(attention(put), [1, 6, 11])
        assert entry["select"] == [1, 6, 11] and entry["tril"] == tril
        assert entry["shape"] == [3, 4, 9, 9]
        told = ~np.isnan(entry["values"]).all((-1, -2))
        assert [tuple(at) for at in np.argwhere(told)] == [(0, 1), (1, 2), (2, 3)]
        assert np.abs(entry["values"] - put)[told].max() <= 0.004
    assert np.isnan(one(attention(values), [])["values"]).all()


def test_a_store_gives_the_same_codes():
    reading = pattern()
    lower = lower_triangle(reading.values, reading.axes)
    stored = json.loads(
        json.dumps({**vars(reading), "shape": reading.values.shape}, default=lambda _: None)
    )
    for select in (None, [0, 5]):
        whole, given = code(reading, select), code_lower(reading.key, stored, lower, select)
        assert given.about == whole.about and (given.payload == whole.payload).all()


def test_differences_begin_anew_where_the_description_changes():
    decoder, track = Decoder(), Track()

    def step(values, limits=(0, 1), **more):
        reading = attention(values, limits, **more)
        (entry,) = decoder.step(blobs([track.part(code(reading))])).values()
        assert near(entry, reading)
        return entry.get("same", False), entry["delta"]

    values = pattern().values
    assert step(values) == (False, False)
    assert step(values[..., ::-1, ::-1]) == (False, False)  # no triangle
    assert step(values[..., ::-1, ::-1] / 2) == (True, True)
    assert step(values) == (False, False)
    assert step(values, (0, 2)) == (False, False)
    assert step(values, (0, 2), labels={"query": list("abcdefghi")}) == (False, False)
    assert step(values[:, :2], (0, 2)) == (False, False)
    # A step without the key is passed over.
    other = Reading(key="a/other", values=np.zeros(3), axes=("rank",), unit="x")
    assert list(decoder.step(blobs([track.part(code(other))]))) == ["a/other"]
    assert step(values[:, :2], (0, 2)) == (True, True)


def test_every_twentieth_large_one_is_whole():
    decoder, track = Decoder(), Track()
    rng = np.random.default_rng(0)
    at = []
    for step in range(45):
        large = Reading(key="a/large", values=rng.random(20_001), axes=("neuron",), unit="x")
        limit = Reading(key="a/limit", values=rng.random(20_000), axes=("neuron",), unit="x")
        parts = [track.part(code(reading)) for reading in (large, limit)]
        got = decoder.step(blobs(parts)) if step < 3 else {}
        assert all(near(got[r.key], r) for r in (large, limit) if got)
        assert [part.blob for part in parts] == [True, False]
        at.append([part.entry["delta"] for part in parts])
    whole, small = np.array(at).T
    assert np.flatnonzero(~whole).tolist() == [0, 20, 40]
    assert np.flatnonzero(~small).tolist() == [0]


def test_without_deltas_each_step_stands_by_itself():
    track = Track(deltas=False)
    for step in (0, 10):
        got = Decoder().step(blobs([track.part(code(reading)) for reading in everything(step)]))
        assert all(near(got[reading.key], reading) for reading in everything(step))
        assert not any(entry["delta"] or "same" in entry for entry in got.values())


def test_a_step_of_a_small_model_takes_no_time():
    """3 probes x 270 heads x 48 tokens; 60 ms is what a step may take, several times that here."""
    n = 48
    rng = np.random.default_rng(0)
    p = np.tril(np.exp(rng.normal(0, 2, (30, 9, n, n))).astype(np.float32))
    reading = attention(p / p.sum(-1, keepdims=True))
    track, took = Track(), []
    for _ in range(3):
        began = time.process_time()
        blobs([track.part(code(Reading(**{**vars(reading), "key": f"a/{i}"}))) for i in range(3)])
        took.append(time.process_time() - began)
    assert min(took) < 0.3
