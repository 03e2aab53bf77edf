"""Colours are read back from the picture and compared with the values."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.sinks.samples import small
from tlens_callback.palette import colour_table
from tlens_callback.reading import Reading
from tlens_callback.render.score_panels import curves_as_rows, score_panels
from tlens_callback.render.scores_png import score_picture

GREY = (204, 204, 204)


def matrix(values, measure="induction", axes=("layer", "head"), **more):
    about = {"unit": "probability", "limits": (0, 1)} | more
    return Reading(key=f"head_scores/{measure}", values=values, axes=axes, **about)


def pixels(readings, **more):
    return np.asarray(Image.open(io.BytesIO(score_picture(readings, **more))).convert("RGB"))


def blocks(picture, colour):
    """Centre (x, y) and width of the widest run of a colour, or None where no run is 5 wide.

    A colour bar, finer than this, is none.
    """
    mask = (picture == colour).all(-1)
    wide = mask[:, 4:] & mask[:, :-4] & mask[:, 2:-2]
    if not wide.any():
        return None
    y, x = np.nonzero(wide)
    return x.mean() + 2, y.mean(), x.max() - x.min() + 5


def test_every_cell_has_the_colour_of_its_value_at_its_place():
    # Three slots apart, so that no two cells share a colour, and too many for numbers in them.
    slots = 2 + 2 * np.arange(10 * 9).reshape(10, 9)
    picture = pixels([matrix(slots / 239)], step=3)
    places = np.array([[blocks(picture, colour_table()[slot]) for slot in row] for row in slots])
    x, y, width = np.moveaxis(places, -1, 0)
    assert (np.diff(x, axis=1) == 27).all(), "heads go to the right"
    assert (np.ptp(x, axis=0) == 0).all()
    assert (np.diff(y, axis=0) > 10).all(), "layers go down"
    assert (np.ptp(y, axis=1) == 0).all()
    assert (width == 27).all()


def test_names_stand_beside_the_rows_and_columns_that_they_name():
    """Read from how far the letters of each reach: the later a name, the longer it is."""
    values = (2 + 2 * np.arange(4 * 9)).reshape(4, 9) / 239
    layers, tokens = ["1" * (1 + 2 * i) for i in range(4)], ["o" * (1 + i) for i in range(9)]
    labels = {"layer": layers, "pos": tokens}
    picture = pixels([matrix(values, axes=("layer", "pos"), labels=labels)])
    ink = (picture.astype(int).sum(-1) < 450) & (np.ptp(picture, axis=-1) < 20)
    slots = (values * 239).round().astype(int)
    places = np.array(
        [[blocks(picture, colour_table()[slot])[:2] for slot in row] for row in slots]
    )
    left, under = int(places[0, 0, 0]) - 16, int(places[-1, 0, 1]) + 10
    beside = [ink[int(y) - 8 : int(y) + 8, :left] for y in places[:, 0, 1]]
    reach = [left - np.flatnonzero(rows.any(0)).min() for rows in beside]
    assert (np.diff(reach) > 8).all(), "two digits more each"
    # Nine letters reach as far down, and the colour bar begins below them.
    below = [ink[under : under + 66, int(x) - 8 : int(x) + 8] for x in places[0, :, 0]]
    deep = [np.flatnonzero(columns.any(1)).max() for columns in below]
    assert (np.diff(deep) > 4).all(), "a letter more each"
    for x in places[0, :, 0]:
        across = np.flatnonzero(ink[under : under + 66, int(x) - 13 : int(x) + 13].any(0))
        assert abs((across.min() + across.max()) / 2 - 13) <= 3, "each below the middle of its own"


def test_signed_values_diverge_from_white():
    values = np.linspace(-3, 3, 9)[None].repeat(9, 0)
    picture = pixels([matrix(values, limits=None, unit="logit")])
    colours = colour_table(diverging=True)
    at = [blocks(picture, colours[slot]) for slot in (0, 119, 238)]
    assert all(at)
    assert at[0][0] < at[1][0] < at[2][0]


def test_what_is_no_number_is_grey():
    values = np.full((9, 9), 0.5)
    before = pixels([matrix(values)])
    values[4, 4] = np.nan
    values[8, 8] = np.inf
    picture = pixels([matrix(values)])
    # In both there are a few at the rims of letters.
    grey = [(each == GREY).all(-1).sum() for each in (before, picture)]
    assert grey[1] - grey[0] == 2 * 27 * 18
    assert blocks(before, GREY) is None
    assert blocks(pixels([matrix(np.full((9, 9), np.nan), limits=None)]), GREY)


def test_panels_of_one_unit_share_a_range():
    low, high = np.zeros((9, 9)), np.full((9, 9), 2.0)
    alone = pixels([matrix(high, limits=(0, np.inf), unit="nats")])
    yellow = colour_table()[239]
    assert blocks(alone, yellow)
    both = [matrix(v, m, limits=(0, np.inf), unit="nats") for v, m in ((low, "a"), (high, "b"))]
    picture = pixels(both)
    assert blocks(picture, colour_table()[0])[0] < blocks(picture, yellow)[0]
    other = [both[1], matrix(high / 2, "c", limits=(0, np.inf), unit="bits")]
    one = (pixels(other) == yellow).all(-1).sum()
    assert one > 1.9 * 81 * 27 * 18, "each unit has a range of its own"


def test_numbers_stand_in_wide_cells_alone():
    few, many = np.full((2, 8), 0.5), np.full((2, 9), 0.5)
    colour = colour_table()[120]

    def filled(values, cell):
        return (pixels([matrix(values)]) == colour).all(-1).sum() / (values.size * cell)

    assert filled(few, 32 * 18) < 0.95
    assert filled(many, 27 * 18) >= 1


def test_numbers_are_light_on_dark_cells_and_dark_on_light_ones():
    picture = pixels([matrix(np.array([[0.0, 1.0]]))]).astype(int)
    for slot, told in ((0, 255), (239, 0)):
        x, y, _ = blocks(picture, colour_table()[slot])
        cell = picture[int(y) - 7 : int(y) + 7, int(x) - 14 : int(x) + 14]
        assert np.abs(cell - told).max(-1).min() < 40


def test_spreads_and_ids_are_left_out():
    values = np.ones((2, 3))
    ids = matrix(values, "token", unit="index", texts=np.full((2, 3), "x"))
    induction, spread = matrix(values), matrix(values, "induction_spread")
    (panel,) = score_panels([induction, spread, ids], with_ids=False)
    assert panel.reading is induction
    (panel,) = score_panels([spread], with_ids=False)
    assert panel.reading is spread, "there is nothing that it is the spread of"


def test_curves_become_a_row_for_each_probe():
    def curve(probe, values, measure="kl", unit="nats"):
        key = f"logit_lens/{measure}/{probe}"
        return Reading(key=key, values=values, axes=("layer",), unit=unit)

    kl, rank = curves_as_rows(
        [curve("a", [1, 2]), curve("b", [3, 4]), curve("a", [5, 6], "rank", "rank")]
    )
    assert (kl.key, kl.axes, kl.labels["probe"]) == (
        "logit_lens/kl",
        ("probe", "layer"),
        ("a", "b"),
    )
    assert kl.values.tolist() == [[1, 2], [3, 4]]
    assert (rank.key, rank.values.tolist()) == ("logit_lens/rank", [[5, 6]])
    assert score_picture([kl, rank])


@pytest.mark.parametrize("shape", [(1, 1), (48, 64), (4, 3000), (900, 2)])
def test_a_picture_has_a_size_that_a_page_can_show(shape):
    axes = ("layer", "expert")
    width, height = Image.open(
        io.BytesIO(score_picture([matrix(np.ones(shape), axes=axes)] * 2))
    ).size
    assert width <= max(1240, shape[1] + 120)
    assert height <= 2 * max(600, shape[0] + 150)


def test_names_of_any_kind_are_drawn():
    names = ["", "\n", "中文", "😀", "a" * 100, "<b>"]
    reading = matrix(np.ones((2, 6)), axes=("layer", "pos"), labels={"pos": names})
    plain = matrix(np.ones((2, 6)), axes=("layer", "pos"))
    assert score_picture([reading]) != score_picture([plain])


def test_the_step_is_in_the_title():
    reading = matrix(np.ones((2, 2)))
    pictures = [pixels([reading], step=step) for step in (1, 2)]
    assert (pictures[0][:34] != pictures[1][:34]).any()
    assert (pictures[0][34:] == pictures[1][34:]).all()


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="two axes"):
        score_picture([r for r in small() if r.axes == ()])
    other = Reading(key="x/y", values=np.ones((2, 2)), axes=("layer", "head"), unit="1")
    with pytest.raises(ValueError, match="one instrument"):
        score_picture([matrix(np.ones((2, 2))), other])
