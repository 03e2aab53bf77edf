"""The picture of all heads, decoded again and compared with the numbers it was made of."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from tlens_callback.palette import LEVELS, MASKED, NOT_A_NUMBER, ZERO, slots
from tlens_callback.reading import Reading
from tlens_callback.render import mosaic
from tlens_callback.render.text import drawable

ODD = ["<s>", " Paris", "\n", "", "\x00", "\u200b", "中文", "é", "😀", "\ud83d", "</script>", "%"]


def reading(values, probe="capital", **more):
    axes = ("layer", "head", "query", "key")
    key = f"attention_patterns/pattern/{probe}"
    return Reading(key=key, values=values, axes=axes, unit="probability", **more)


def causal(layers, heads, n, seed=0):
    """[layer, head, query, key]: rows of random attention, nothing above the diagonal."""
    scores = np.random.default_rng(seed).normal(0, 2, (layers, heads, n, n))
    p = np.tril(np.exp(scores))
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


def decode(png):
    """[y, x]: palette slots, and [slot, rgb]."""
    image = Image.open(io.BytesIO(png))
    assert image.mode == "P"
    return np.asarray(image), np.array(image.getpalette()).reshape(-1, 3)


def cells_of(png, layers, heads, n):
    """[layer, head, query, key]: slots, found by looking for the grey triangles alone.

    The first cell's first row has n - 1 grey squares; they give the side of a square and the
    corner of the grid. The last grey pixel to the right gives the distance between cells.
    """
    pixels, _ = decode(png)
    ys, xs = np.nonzero(pixels == MASKED)
    top, first = ys.min(), xs[ys == ys.min()].min()
    row = pixels[top, first:]
    side, rest = divmod(int(np.argmax(row != MASKED)), n - 1)
    assert rest == 0
    left = first - side
    gap = (xs.max() + 1 - left - heads * n * side) // max(1, heads - 1)
    out = np.zeros((layers, heads, n, n), int)
    for layer, head, query, key in np.ndindex(out.shape):
        y = top + layer * (n * side + gap) + query * side
        x = left + head * (n * side + gap) + key * side
        square = pixels[y : y + side, x : x + side]
        assert (square == square[0, 0]).all()
        out[layer, head, query, key] = square[0, 0]
    return out


def test_shows_the_attention_that_hugging_face_computes():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.5)
        attentions = model(torch.arange(11)[None] * 4, output_attentions=True).attentions
    values = torch.cat(attentions).numpy()
    shown = cells_of(mosaic(reading(values, limits=(0, 1)), step=7), 3, 4, 11)
    lower = np.tri(11, dtype=bool)
    assert (shown[:, :, ~lower] == MASKED).all()
    error = np.abs(shown[:, :, lower] / (LEVELS - 1) - np.sqrt(values[:, :, lower]))
    assert error.max() <= 0.5 / (LEVELS - 1) + 1e-6
    # The heads differ, so that one of them in another's place would be seen.
    assert np.abs(values[0, 0] - values[0, 1]).max() > 0.1


def test_colours_are_viridis_of_the_square_root():
    values = np.zeros((1, 1, 2, 2), np.float32)
    for p, colour in [(0, (68, 1, 84)), (0.25, (33, 145, 140)), (1, (253, 231, 37))]:
        values[0, 0, 1, 0] = p
        png = mosaic(reading(values))
        slot = cells_of(png, 1, 1, 2)[0, 0, 1, 0]
        assert slot == round(np.sqrt(p) * (LEVELS - 1)) == slots(np.float32([p]))[0]
        assert np.abs(decode(png)[1][slot] - colour).max() <= 3
    grey = decode(png)[1][MASKED]
    assert grey.max() - grey.min() < 10


def change(layers, heads, n):
    """The difference of two patterns, masked where both are."""
    return causal(layers, heads, n, seed=1) - causal(layers, heads, n)


@pytest.mark.parametrize("limit", [1, 0.25])
def test_a_change_diverges_from_a_neutral_zero(limit):
    values = change(2, 3, 9) * limit
    shown = cells_of(mosaic(reading(values, limits=(-limit, limit))), 2, 3, 9)
    lower = np.tri(9, dtype=bool)
    assert (shown[:, :, ~lower] == MASKED).all()
    x = values[:, :, lower] / limit
    error = np.abs((shown[:, :, lower] - ZERO) / ZERO - np.sign(x) * np.sqrt(np.abs(x)))
    assert error.max() <= 0.5 / ZERO + 1e-6
    assert x.min() < -0.3 and x.max() > 0.3

    def colour(x):
        one = np.zeros((1, 1, 2, 2), np.float32)
        one[0, 0, 1, 0] = x * limit
        png = mosaic(reading(one, limits=(-limit, limit)))
        return decode(png)[1][cells_of(png, 1, 1, 2)[0, 0, 1, 0]]

    zero = colour(0)
    assert zero.min() > 240 and zero.max() - zero.min() < 5
    assert (colour(1e-9) == zero).all()
    for x in (0.05, 0.4, 0.9, 1, 3):
        (red, _, blue), (fall_red, _, fall_blue) = colour(x), colour(-x)
        assert red > blue + 20 and fall_blue > fall_red + 20
    assert (colour(1) == (0x67, 0x00, 0x1F)).all() and (colour(-1) == (0x05, 0x30, 0x61)).all()


def test_what_is_not_a_number_is_no_colour_of_the_diverging_scale():
    values = change(1, 2, 5)
    values[0, 1, 3, 1], values[0, 0, 4, 2] = np.nan, -np.inf
    png = mosaic(reading(values, limits=(-1, 1)))
    shown = cells_of(png, 1, 2, 5)
    assert np.argwhere(shown == NOT_A_NUMBER).tolist() == [[0, 0, 4, 2], [0, 1, 3, 1]]
    colours = decode(png)[1].astype(int)
    distances = np.abs(colours[: 2 * ZERO + 1] - colours[NOT_A_NUMBER]).sum(1)
    assert distances.min() > 100


def test_no_change_at_all_is_drawn_with_its_triangle():
    png = mosaic(reading(np.zeros((2, 2, 6, 6)), limits=(-1, 1)))
    shown = cells_of(png, 2, 2, 6)
    assert set(np.unique(shown)) == {ZERO, MASKED}


def test_a_pattern_that_looks_ahead_is_drawn_whole():
    values = causal(2, 2, 6)
    triangles = (decode(mosaic(reading(values)))[0] == MASKED).sum()
    assert triangles > 0
    values[1, 1, 2, 3] = 0.5
    assert (decode(mosaic(reading(values)))[0] == MASKED).sum() == 0


def test_shows_the_probes_tokens_and_no_padding():
    values = causal(2, 3, 7)
    assert cells_of(mosaic(reading(values)), 2, 3, 7).shape == (2, 3, 7, 7)
    padded = np.zeros((2, 3, 9, 9), np.float32)
    padded[:, :, :7, :7] = values
    with pytest.raises(AssertionError):
        cells_of(mosaic(reading(padded)), 2, 3, 7)


def test_what_is_not_a_number_is_red():
    values = causal(1, 2, 5)
    assert (decode(mosaic(reading(values)))[0] == NOT_A_NUMBER).sum() == 0
    values[0, 1, 3, 1] = np.nan
    values[0, 1, 4, 1] = np.inf
    png = mosaic(reading(values))
    shown = cells_of(png, 1, 2, 5)
    assert np.argwhere(shown == NOT_A_NUMBER).tolist() == [[0, 1, 3, 1], [0, 1, 4, 1]]
    red, green, blue = decode(png)[1][NOT_A_NUMBER]
    assert red > 200 > 100 > max(green, blue)


def test_title_names_and_tokens():
    values = causal(2, 2, 4)
    plain = decode(mosaic(reading(values)))[0]
    again = decode(mosaic(reading(values), step=3))[0]
    assert (plain[:26] != again[:26]).any() and (plain[26:] == again[26:]).all()

    def left(labels):
        return decode(mosaic(reading(values, labels=labels)))[0][60:, :30]

    assert (left({"layer": ["0", "1"]}) == left({})).all()
    assert (left({"layer": ["3", "7"]}) != left({})).any()
    with_tokens = decode(mosaic(reading(values, labels={"key": list("abcd")})))[0]
    others = decode(mosaic(reading(values, labels={"key": list("abce")})))[0]
    assert with_tokens.shape[0] > plain.shape[0]
    assert (with_tokens != others).any()


def test_odd_tokens_and_names_do_not_disturb():
    n = len(ODD)
    odd = reading(causal(1, 1, n), probe="ö</b> %{x} 中\n" * 9, labels={"key": ODD, "query": ODD})
    plain = cells_of(mosaic(reading(causal(1, 1, n))), 1, 1, n)
    assert (cells_of(mosaic(odd, step=10**9), 1, 1, n) == plain).all()
    assert [drawable(t) for t in ODD[1:7]] == [
        "·Paris",
        "\\n",
        "",
        "\\x00",
        "\\u200b",
        "\\u4e2d\\u6587",
    ]
    assert drawable("abc</b>") == "abc</b>"


def test_many_values_are_pooled_by_their_largest():
    n = 1301
    values = np.zeros((2, 2, n, n), np.float32)
    values[..., 0] = 0.25
    values[1, 0, 1000, 501] = 1
    pixels, _ = decode(mosaic(reading(values)))
    assert max(pixels.shape) < 1.2 * n + 200
    ys, xs = np.nonzero(pixels == MASKED)
    top, left = ys.min(), xs.min() - 1
    small = (n + 1) // 2
    cell = pixels[top + small + 2 :, left:]
    assert cell[500, 250] == LEVELS - 1
    assert (cell[:small, 0] == round(0.5 * (LEVELS - 1))).all()
    assert (cell[499, 1:500] == 0).all()


def test_many_changes_are_pooled_by_the_one_farthest_from_zero():
    n = 1301
    values = np.zeros((2, 2, n, n), np.float32)
    values[..., 0] = -0.25
    values[1, 0, 1000, 500:502] = 0.5, -1
    values[1, 0, 1001, 601] = 0.25
    values[1, 0, 1101, 601] = np.nan
    pixels, _ = decode(mosaic(reading(values, limits=(-1, 1))))
    ys, xs = np.nonzero(pixels == MASKED)
    top, left = ys.min(), xs.min() - 1
    small = (n + 1) // 2
    cell = pixels[top + small + 2 :, left:]
    assert cell[500, 250] == 0
    assert cell[500, 300] == ZERO + round(0.5 * ZERO)
    assert cell[550, 300] == NOT_A_NUMBER
    assert (cell[:small, 0] == ZERO - int(0.5 * ZERO)).all()
    assert (cell[499, 1:499] == ZERO).all()


def test_refuses_what_it_cannot_show():
    values = causal(1, 1, 3)
    axes = ("layer", "head", "key", "query")
    with pytest.raises(ValueError, match="'query', 'key'"):
        mosaic(Reading(key="a/b", values=values, axes=axes, unit="probability"))
    with pytest.raises(ValueError, match="limits"):
        mosaic(reading(values, limits=(-1, 2)))
    with pytest.raises(ValueError, match="limits"):
        mosaic(reading(values, limits=(-np.inf, np.inf)))
    with pytest.raises(ValueError, match="shape"):
        mosaic(reading(values[:0]))


def test_a_whole_model_is_one_small_file():
    values = reading(causal(30, 9, 48), labels={"key": [f" t{i}" for i in range(48)]})
    png = mosaic(values, step=0)
    assert len(png) < 1_000_000
