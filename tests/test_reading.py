"""A reading checks itself when it is made."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.byte_names import CASES
from tlens_callback import Reading
from tlens_callback.reading import legible, split_key


def test_key_parts_and_values():
    reading = Reading(
        key="head_scores/induction/a/b",
        values=torch.arange(6.0).reshape(2, 3),
        axes=("layer", "head"),
        unit="probability",
        labels={"head": ["x", "y", "z"]},
        limits=(0, 1),
    )
    assert (reading.instrument, reading.measure, reading.probe) == (
        "head_scores",
        "induction",
        "a/b",
    )
    assert Reading(key="a/b", values=1, unit="nats").probe is None
    assert reading.values.dtype == np.float32 and reading.labels == {"head": ("x", "y", "z")}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a/b", ("a", "b", None)),
        ("a/b/c/d", ("a", "b", "c/d")),
        ("trainer/loss", ("trainer", "loss", None)),
        ("trainer/rewards/f/mean", ("trainer", "rewards/f/mean", None)),
        ("trainers/rewards/f/mean", ("trainers", "rewards", "f/mean")),
    ],
)
def test_the_names_of_a_trainer_are_no_probes(key, expected):
    assert split_key(key) == expected
    reading = Reading(key=key, values=1, unit="as logged")
    assert (reading.instrument, reading.measure, reading.probe) == expected


def test_values_are_a_copy_that_cannot_be_written():
    source = np.zeros(3, dtype=np.float32)
    reading = Reading(key="a/b", values=source, axes=("pos",), unit="nats")
    source[0] = 5
    assert reading.values[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        reading.values[0] = 1


def test_texts_are_a_copy_beside_the_values():
    source = np.array([["Paris", ""], ["中", "\n"]])
    reading = Reading(key="a/b", values=np.eye(2), axes=("x", "y"), unit="index", texts=source)
    source[0, 0] = "Rome"
    assert reading.texts is not None and reading.texts.tolist() == [["Paris", ""], ["中", "\n"]]
    with pytest.raises(ValueError, match="read-only"):
        reading.texts[0, 0] = "Rome"
    plain = Reading(key="a/b", values=1, unit="index", texts=np.array(" Paris"))
    assert plain.texts is not None and plain.texts.item() == " Paris"
    assert Reading(key="a/b", values=1, unit="index").texts is None


@pytest.mark.parametrize(
    "change, text",
    [
        ({"key": "alone"}, "'<instrument>/<measure>'"),
        ({"key": "a//b"}, "'<instrument>/<measure>'"),
        ({"axes": ("layer",)}, r"shape \(2, 3\) but axes \('layer',\)"),
        ({"axes": ("layer", "layer")}, "names an axis twice"),
        ({"unit": ""}, "has no unit"),
        ({"labels": {"pos": ["a"]}}, "'pos', which is not one of"),
        ({"labels": {"head": ["a"]}}, "3 indices but 1 labels"),
        ({"limits": (1.0, 1.0)}, "low < high"),
        ({"texts": np.array(["a", "b"])}, r"texts of shape \(2,\)"),
    ],
)
def test_what_does_not_fit_raises(change, text):
    good = {"key": "a/b", "values": np.ones((2, 3)), "axes": ("layer", "head"), "unit": "nats"}
    Reading(**good)
    with pytest.raises(ValueError, match=text):
        Reading(**{**good, **change})


def test_what_no_file_can_hold_becomes_its_escape():
    half = "\ud83d"
    reading = Reading(
        key=f"lens/token/{half}", values=[1.0, 2.0], axes=("rank",), unit="index",
        labels={"rank": [half, "😀"]}, texts=np.array([half, "😀"]),
    )  # fmt: skip
    assert reading.key == "lens/token/\\ud83d"
    assert reading.labels["rank"] == ("\\ud83d", "😀")
    assert reading.texts is not None and reading.texts.tolist() == ["\\ud83d", "😀"]


def test_shows_itself_in_a_notebook():
    reading = Reading(
        key="a/b", values=[[1.25, 2]], axes=("layer", "head"), unit="nats", labels={"head": "<i"}
    )
    html = reading._repr_html_()
    assert "<b" in html and ">1.25<" in html and "&lt;" in html and "<i" not in html
    figure = reading.to_plotly()
    assert np.array_equal(figure.data[0].z, [[1.25, 2]])
    assert np.array_equal(reading.to_plotly(head=1).data[0].y, [2])


@pytest.mark.slow
def test_a_reading_loads_no_plotting_package():
    """Nor does the picture in a notebook need plotly."""
    code = (
        "import sys\n"
        "from tlens_callback.reading import Reading\n"
        "r = Reading(key='a/b', values=[1, 2], axes=('layer',), unit='nats')\n"
        "assert 'svg' in r._repr_html_() and 'plotly' not in sys.modules, 'plotly'\n"
        "r.to_plotly()\n"
        "assert 'plotly' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_rounding_beyond_a_limit_is_cut_off_and_more_is_not():
    over = [1 + 2e-7, 1.0, 0.5, -1e-7, 1.1, -0.5, np.nan]
    reading = Reading(key="a/b", values=over, axes=("x",), unit="fraction", limits=(0, 1))
    expected = np.array([1, 1, 0.5, 0, 1.1, -0.5, np.nan], dtype=np.float32)
    np.testing.assert_array_equal(reading.values, expected)


def test_a_limit_that_float32_rounds_up_holds_too():
    """Of a uniform distribution over 32 tokens the entropy is ln 32."""
    top = float(np.log(32))
    assert float(np.float32(top)) > top
    values = torch.full((32,), 1 / 32).double().log().neg().mean()
    reading = Reading(key="a/b", values=values, unit="nats", limits=(0.0, top))
    assert top - 1e-6 < float(reading.values) <= top


def test_values_are_copied_unless_nobody_else_may_write_them():
    free = np.zeros(3, np.float32)
    assert not np.shares_memory(Reading(key="a/b", values=free, axes=("x",), unit="1").values, free)
    view = free[:2]
    view.setflags(write=False)
    assert not np.shares_memory(Reading(key="a/b", values=view, axes=("x",), unit="1").values, view)
    sealed = np.zeros(3, np.float32)
    sealed.setflags(write=False)
    assert Reading(key="a/b", values=sealed, axes=("x",), unit="1").values is sealed


@pytest.mark.parametrize("case", CASES)
def test_neighbouring_bytes_are_joined_for_reading(case):
    tokens, words = CASES[case]
    assert legible(tokens) == words
    assert "".join(words).encode() == "".join(legible(["".join(tokens)])).encode()
