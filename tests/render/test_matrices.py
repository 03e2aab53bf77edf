"""The interactive figure: its numbers, its scales, and text that is no markup."""

import json

import numpy as np
import pytest

from tlens_callback.reading import Reading
from tlens_callback.render import score_figure

RNG = np.random.default_rng(0)


def scores(measure, values=None, instrument="head_scores", probe=None, **more):
    values = RNG.random((5, 3)).astype(np.float32) if values is None else values
    key = f"{instrument}/{measure}" + (f"/{probe}" if probe else "")
    more = {"unit": "probability", "limits": (0, 1), **more}
    return Reading(key=key, values=values, axes=("layer", "head"), **more)


def strict_json(figure):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(json.dumps(figure.to_plotly_json()), parse_constant=refuse)


def test_shows_every_value():
    readings = [scores(f"m{i}") for i in range(6)]
    figure = score_figure([*readings, Reading(key="head_scores/max", values=1.0, unit="x")])
    assert len(figure.data) == 6
    for panel, reading in zip(figure.data, readings, strict=True):
        assert (np.array(panel.z, np.float32) == reading.values).all()
        assert list(panel.x) == [0, 1, 2] and list(panel.y) == [0, 1, 2, 3, 4]
    assert [note.text for note in figure.layout.annotations] == [f"m{i}" for i in range(6)]
    # Six panels are two rows: the second row's domain lies below the first's.
    assert figure.layout.yaxis5.domain[1] < figure.layout.yaxis.domain[0]
    assert figure.layout.xaxis4.domain[0] > figure.layout.xaxis3.domain[1]
    assert all(figure.layout[f"yaxis{i or ''}"].autorange == "reversed" for i in (0, 2, 6))
    assert "bdata" not in json.dumps(strict_json(figure))


def test_hovering_names_head_measure_probe_and_spread():
    spread = scores("induction_spread", limits=(0, 0.5))
    alone = scores("lonely_spread")
    figure = score_figure([scores("induction"), spread, alone, scores("sink", probe="capital")])
    texts = [panel.hovertemplate.removesuffix("<extra></extra>") for panel in figure.data]
    assert texts == [
        "L%{y}H%{x} induction %{z:.3g} ± %{customdata:.2g}",
        "L%{y}H%{x} lonely_spread %{z:.3g}",
        "L%{y}H%{x} sink capital %{z:.3g}",
    ]
    assert (np.array(figure.data[0].customdata, np.float32) == spread.values).all()


def test_equal_limits_and_units_share_a_fixed_scale():
    figure = score_figure(
        [
            scores("a"),
            scores("b", limits=(0.0, 1.0)),
            scores("lag", unit="tokens", limits=(0, 24)),
            scores("change", unit="nats", limits=(-2, 2)),
        ]
    )
    assert [p.coloraxis for p in figure.data] == [
        "coloraxis",
        "coloraxis",
        "coloraxis2",
        "coloraxis3",
    ]
    axes = [figure.layout.coloraxis, figure.layout.coloraxis2, figure.layout.coloraxis3]
    assert [(a.cmin, a.cmax) for a in axes] == [(0, 1), (0, 24), (-2, 2)]
    assert [a.colorbar.title.text for a in axes] == ["probability", "tokens", "nats"]
    assert axes[0].colorscale == axes[1].colorscale != axes[2].colorscale
    bars = [(a.colorbar.y - a.colorbar.len, a.colorbar.y) for a in axes]
    assert bars[0][0] > bars[1][1] and bars[1][0] > bars[2][1]


def test_without_limits_the_scale_says_that_it_moves():
    first, second = np.full((2, 2), 1.0), np.array([[3.0, np.nan], [2.0, np.inf]])
    free = score_figure([scores(m, v, limits=None) for m, v in (("a", first), ("b", second))])
    axis = free.layout.coloraxis
    assert (axis.cmin, axis.cmax) == (1, 3) and "this step" in axis.colorbar.title.text
    signed = score_figure([scores("a", np.array([[-1.0, 4.0]]), limits=None)]).layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-4, 4)
    mixed = score_figure([scores("a", limits=(-1, 2.5))]).layout.coloraxis
    assert (mixed.cmin, mixed.cmax) == (-2.5, 2.5) and mixed.colorbar.title.text == "probability"
    half = score_figure([scores("b", second, limits=(0, np.inf))]).layout.coloraxis
    assert (half.cmin, half.cmax) == (0, 3) and "this step" in half.colorbar.title.text
    assert "this step" not in score_figure([scores("a")]).layout.coloraxis.colorbar.title.text


def test_what_is_not_finite_is_blank():
    values = np.array([[0.5, np.nan], [np.inf, -np.inf]])
    figure = score_figure([scores("a", values)])
    assert strict_json(figure)["data"][0]["z"] == [[0.5, None], [None, None]]
    all_blank = score_figure([scores("a", values * np.nan, limits=None)])
    assert strict_json(all_blank)["layout"]["coloraxis"]["cmin"] == 0


def test_a_selection_of_layers_and_experts_keep_their_names():
    chosen = score_figure([scores("a", RNG.random((2, 3)), labels={"layer": ["3", "11"]})])
    assert list(chosen.data[0].y) == ["3", "11"]
    assert chosen.layout.yaxis.type == "category" and chosen.layout.xaxis.type == "linear"
    key, axes = "top_neurons/load/capital", ("layer", "expert")
    experts = Reading(key=key, values=RNG.random((2, 8)), axes=axes, unit="probability")
    figure = score_figure([experts])
    assert figure.layout.xaxis.title.text == "expert"
    assert "expert %{x}" in figure.data[0].hovertemplate


def by_pos(measure, tokens, values=None, unit="fraction", **more):
    values = RNG.normal(size=(3, len(tokens))) if values is None else values
    labels = {"pos": tokens}
    key, axes = f"patching/{measure}/p", ("layer", "pos")
    return Reading(key=key, values=values, axes=axes, unit=unit, labels=labels, **more)


def test_tokens_have_a_column_each_and_short_ticks():
    """A token that occurs twice would be drawn on top of itself."""
    tokens = ["<s>", " the", "\n", " the", " internationalization", "7"]
    figure = score_figure([by_pos("resid", tokens)])
    (panel,) = figure.data
    assert len(set(panel.x)) == len(tokens)
    assert list(panel.x)[1:5] == ["1  the", "2 \\n", "3  the", "4  internationalization"]
    axis = figure.layout.xaxis
    assert axis.type == "category" and list(axis.tickvals) == list(panel.x)
    assert list(axis.ticktext)[3:] == ["3  the", "4  internat...", "5 7"]
    assert "L%{y} pos %{x} resid p" in panel.hovertemplate
    many = score_figure([by_pos("resid", [f"word{i}" for i in range(100)])])
    assert 8 < len(many.layout.xaxis.tickvals) <= 16
    assert many.data[0].x[99] == "99 word99"
    assert many.layout.xaxis.tickvals[1] == "7 word7" == many.layout.xaxis.ticktext[1]


def test_names_of_modules_are_ticks_with_room_below():
    names = ["q_proj", "k_proj", "v_proj", "down_proj"]
    of = dict(axes=("layer", "module"), unit="norm", labels={"module": names})
    readings = [Reading(key=f"spectrum/m{i}", values=RNG.random((5, 4)), **of) for i in range(6)]
    figure = score_figure(readings)
    assert list(figure.layout.xaxis.ticktext) == names == list(figure.data[0].x)
    assert figure.layout.xaxis.tickangle == 90
    numbered = score_figure([scores(f"m{i}") for i in range(6)])

    def between(drawn):
        height = drawn.layout.height or 450
        inner = height - drawn.layout.margin.t - drawn.layout.margin.b
        return (drawn.layout.yaxis.domain[0] - drawn.layout.yaxis5.domain[1]) * inner

    # Nine letters at six pixels more than numbers have, whose figure is as tall as its place.
    assert between(figure) == pytest.approx(52 + 54) and figure.layout.height
    assert between(numbered) < 60


def test_signed_values_are_centred_at_zero():
    signed = score_figure([by_pos("resid", ["a", "b"], [[-0.5, 2.0]])]).layout.coloraxis
    assert (signed.cmin, signed.cmax) == (-2, 2)
    middle = signed.colorscale[len(signed.colorscale) // 2]
    assert middle[0] == 0.5 and middle[1] == "rgb(247,247,247)"
    positive = score_figure([by_pos("resid", ["a", "b"], [[0.5, 2.0]])]).layout.coloraxis
    assert (positive.cmin, positive.cmax) == (0.5, 2)
    assert positive.colorscale != signed.colorscale


def test_token_ids_are_said_and_not_coloured():
    tokens = ["a", "b"]
    words = np.array([[" Paris", "</b>"]])
    said = by_pos("token", tokens, [[3, 9]], unit="index", texts=words)
    entropy = by_pos("entropy", tokens, [[0.5, 1]], unit="nats")
    figure = score_figure([said, entropy])
    (panel,) = figure.data
    assert "entropy" in panel.hovertemplate and "%{text}" in panel.hovertemplate
    assert list(panel.text[0]) == ["' Paris'", "'&lt;/b&gt;'"]
    # Alone, or beside what has another shape, it has a panel of its own.
    assert len(score_figure([said]).data) == 1
    assert len(score_figure([said, by_pos("entropy", list("abc"))]).data) == 2


def test_features_are_rows():
    values = RNG.random((2, 3))
    on = Reading(
        key="sae/on/p", values=values, axes=("feature", "pos"), unit="activation",
        labels={"feature": ["17", "4000"], "pos": ["a", "b", "c"]},
    )  # fmt: skip
    figure = score_figure([on])
    assert figure.data[0].hovertemplate.startswith("feature %{y} pos %{x} on p")
    assert list(figure.data[0].y) == ["17", "4000"]
    assert figure.layout.yaxis.title.text == "feature"


def test_names_are_no_markup():
    figure = score_figure([scores("a", probe="<b>x</b> %{z} </script>")])
    page = figure.to_html(include_plotlyjs=False)
    assert page.count("</script>") == score_figure([scores("a")]).to_html(
        include_plotlyjs=False
    ).count("</script>")
    assert "<b>" not in figure.layout.annotations[0].text
    assert "%{z} " not in figure.data[0].hovertemplate
    odd = Reading(key="a/b", values=[[1.0]], axes=("layer", "<b>%{z}"), unit="x")
    figure = score_figure([odd])
    assert "<b>" not in figure.data[0].hovertemplate + figure.layout.xaxis.title.text
    assert figure.data[0].hovertemplate.count("%{z") == 1


def test_refuses_what_is_no_figure():
    with pytest.raises(ValueError, match="layer"):
        score_figure([Reading(key="a/b", values=1.0, unit="x")])
    with pytest.raises(ValueError, match="one instrument"):
        score_figure([scores("a"), scores("a", instrument="other")])
