"""ActivationPatching equals activations replaced in Hugging Face's model, one at a time."""

from functools import partial

import numpy as np
import pytest
import torch

from tests import tiny
from tests.instruments.common import PROBES, TEXTS, encoded, hugging_face, ids, readings, shadow
from tests.instruments.surgery import kept, replaced
from tests.marks import in_turns
from tlens_callback import ActivationPatching, Probe, Shadow, observe, read_probes
from tlens_callback.shadow.interventions import Variants, captured, edited, effects

CLEAN = TEXTS[0]
CORRUPT = Probe("rome", "The capital of Italy is", target=" Rome")
WORDY = Probe("wordy", "What capital of Italy and")
PARTS = ("resid", "attn", "mlp", "head")
LAYERS, HEADS = 2, 4
TARGET, FOIL = (
    tiny.tokenizer().convert_tokens_to_ids(word) for word in ("\u0120Paris", "\u0120London")
)


def by_hand(
    family: str, corrupt: Probe, clean_probe: Probe = CLEAN, answers: tuple = (TARGET, FOIL)
) -> tuple[dict[str, np.ndarray], float, float]:
    """The fractions, and the two logit differences, one forward pass for each number."""

    def difference(logits) -> float:
        return float(logits[-1, answers[0]] - logits[-1, answers[1]])

    model = hugging_face(family)
    logits, source = kept(family, model, ids(clean_probe), ["resid", "attn", "mlp", "z"])
    clean = difference(logits)
    base = difference(kept(family, model, ids(corrupt), [])[0])
    n, d_head = ids(corrupt).shape[1], source["z", 0].shape[1] // HEADS

    def patched(key, at) -> float:
        def edit(value):
            value = value.clone()
            value[at] = source[key][at]
            return value

        with torch.no_grad(), replaced(family, model, {key: edit}):
            got = difference(model(ids(corrupt), use_cache=False).logits[0])
        return (got - base) / (clean - base)

    fractions = {
        part: np.array([[patched((part, i), pos) for pos in range(n)] for i in range(LAYERS)])
        for part in PARTS[:3]
    }
    slices = [(slice(None), slice(h * d_head, (h + 1) * d_head)) for h in range(HEADS)]
    fractions["head"] = np.array([[patched(("z", i), at) for at in slices] for i in range(LAYERS)])
    return fractions, clean, base


@pytest.mark.parametrize(
    ("family", "corrupt"),
    in_turns(tiny.FAMILIES, [CORRUPT, WORDY]),
    ids=lambda given: getattr(given, "name", given),
)
def test_equals_one_patch_at_a_time(family, corrupt):
    got = readings(ActivationPatching("capital", corrupt), shadow(family))
    expected, clean, base = by_hand(family, corrupt)
    assert len(got) == 6
    assert got["activation_patching/clean/capital"].values == pytest.approx(clean, abs=1e-4)
    assert got["activation_patching/corrupt/capital"].values == pytest.approx(base, abs=1e-4)
    tolerance = 2e-4 / abs(clean - base)
    for part, fractions in expected.items():
        shown = got[f"activation_patching/{part}/capital"].values
        np.testing.assert_allclose(shown, fractions, atol=tolerance, err_msg=part)
        assert np.abs(fractions).max() > 100 * tolerance, part
        # No two layers, positions or heads are mistaken for each other.
        for axis in (0, 1):
            assert np.abs(shown - np.roll(fractions, 1, axis)).max() > 50 * tolerance


MEN = Probe("men", "John and Mary gave a book to", target=" Mary")
MEN_CORRUPT = Probe("men-corrupt", "Mary and John gave a book to", target=" John")
PAIRS = [Probe("capital-corrupt", "The capital of Italy is"), MEN, *PROBES, MEN_CORRUPT]
"""Two pairs of two lengths among others, a corrupt probe first; one foil is a corrupt target."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_pair_among_the_probes_equals_one_patch_at_a_time(family):
    got = readings(ActivationPatching(), shadow(family), PAIRS)
    assert [key.split("/")[2] for key in got] == ["men"] * 6 + ["capital"] * 6
    mary, john = (tiny.tokenizer().convert_tokens_to_ids(f"\u0120{n}") for n in ("Mary", "John"))
    for clean_probe, corrupt, answers in (
        (CLEAN, PAIRS[0], (TARGET, FOIL)),
        (MEN, MEN_CORRUPT, (mary, john)),
    ):
        expected, clean, base = by_hand(family, corrupt, clean_probe, answers)
        for measure, value in (("clean", clean), ("corrupt", base)):
            shown = got[f"activation_patching/{measure}/{clean_probe.name}"].values
            assert shown == pytest.approx(value, abs=1e-4)
        tolerance = 2e-4 / abs(clean - base)
        for part, fractions in expected.items():
            reading = got[f"activation_patching/{part}/{clean_probe.name}"]
            np.testing.assert_allclose(reading.values, fractions, atol=tolerance, err_msg=part)
            assert np.abs(fractions).max() > 100 * tolerance, part
            if "pos" in reading.axes:
                assert reading.labels["pos"] == encoded([clean_probe]).labels[0]


def test_the_pairs_of_a_file(tmp_path):
    path = tmp_path / "probes.yaml"
    path.write_text(
        "- {name: capital, text: The capital of France is, target: ' Paris', foil: ' London',\n"
        "   corrupt: The capital of Italy is}\n"
        "- {name: men, text: John and Mary gave a book to, target: ' Mary',\n"
        "   corrupt: {text: Mary and John gave a book to, target: ' John'}}\n"
    )
    filed = readings(ActivationPatching(), shadow("llama"), read_probes(path))
    made = readings(ActivationPatching(), shadow("llama"), PAIRS)
    assert set(filed) == set(made) and len(filed) == 12
    for key, reading in filed.items():
        np.testing.assert_allclose(reading.values, made[key].values, atol=1e-4)


def test_one_pair_by_the_name_of_its_clean_probe():
    one = readings(ActivationPatching("men"), shadow("llama"), PAIRS)
    both = readings(ActivationPatching(), shadow("llama"), PAIRS)
    assert {key.split("/")[2] for key in one} == {"men"}
    for key, reading in one.items():
        np.testing.assert_array_equal(reading.values, both[key].values)
    with pytest.raises(ValueError, match="no probe 'story-corrupt'"):
        readings(ActivationPatching("story"), shadow("llama"), PAIRS)


def test_no_pair_to_take():
    with pytest.raises(ValueError, match=r"a pair of probes, 'x' and 'x-corrupt'.*corrupt: makes"):
        ActivationPatching().taps(shadow("llama"), encoded())
    with pytest.raises(ValueError, match="name the clean probe too"):
        ActivationPatching(corrupt="rome")


def test_of_several_pairs_the_one_that_does_not_match_is_named():
    longer = [*PAIRS[:-1], Probe("men-corrupt", "Mary and John gave a red book to", target=" John")]
    with pytest.raises(ValueError, match="'men' and 'men-corrupt' have 8 and 9 tokens"):
        ActivationPatching().taps(shadow("llama"), encoded(longer))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_adds_up_is_what_is_patched(family):
    """The hook points of attention and MLP hold what enters the residual stream, post-norm too."""
    of = shadow(family)
    tokens = ids(CLEAN)[0]
    for i in range(LAYERS):
        names = [f"blocks.{i}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out")]
        _, got = captured(of, tokens, [*names, f"blocks.{i}.hook_resid_post"])
        *parts, total = got.values()
        torch.testing.assert_close(sum(parts), total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_identities(family):
    of = shadow(family)
    batch = encoded([CLEAN, CORRUPT])
    clean_tokens, corrupt_tokens = batch.tokens
    names = [f"blocks.{i}.hook_resid_pre" for i in range(LAYERS)]
    clean, source = captured(of, clean_tokens, [*names, "blocks.1.hook_resid_post"])
    corrupt = of.logits(corrupt_tokens[None])
    assert (clean - corrupt).abs().max() > 0.1

    def everywhere(hook, value, which):
        value[:] = source[hook]

    def nowhere(value, which):
        pass

    # The whole residual stream of any layer is the clean run; none of it, the corrupt one.
    one = torch.tensor([0])
    whole = [Variants(i, name, one, partial(everywhere, name)) for i, name in enumerate(names)]
    none = [Variants(i, name, one, nowhere) for i, name in enumerate(names)]
    _, moved = effects(of, corrupt_tokens, [*whole, *none], lambda logits: logits, rows=64)
    for difference in moved[:LAYERS]:
        torch.testing.assert_close(difference, clean - corrupt, rtol=1e-4, atol=1e-5)
    for difference in moved[LAYERS:]:
        assert difference.abs().max() < 1e-5

    # Behind the last layer, the last position alone is the answer.
    def last(value):
        value = value.clone()
        value[:, -1] = source["blocks.1.hook_resid_post"][:, -1]
        return value

    with edited(of, {"blocks.1.hook_resid_post": last}):
        logits = of.logits(corrupt_tokens[None])
    torch.testing.assert_close(logits[:, -1], clean[:, -1], rtol=1e-4, atol=1e-5)

    got = readings(ActivationPatching("capital", "rome"), of, [CLEAN, CORRUPT])
    values = {part: got[f"activation_patching/{part}/capital"].values for part in PARTS}
    differs = (clean_tokens != corrupt_tokens).nonzero().flatten().tolist()
    assert len(differs) == 1
    gap = abs(
        float(got["activation_patching/clean/capital"].values)
        - float(got["activation_patching/corrupt/capital"].values)
    )
    # One token differs: its embedding is all that does.
    assert values["resid"][0, differs[0]] == pytest.approx(1, abs=1e-4 / gap)
    assert np.abs(values["resid"][0, differs[0] + 1 :]).max() < 1e-4 / gap
    for part in ("attn", "mlp"):
        # The last layer's writes to other positions reach no answer.
        assert np.abs(values[part][-1, :-1]).max() < 1e-4 / gap
        assert abs(values[part][-1, -1]) > 1e-3
    for part in PARTS[:3]:
        assert (values[part][:, : differs[0]] == 0).all()


def test_the_position_that_differs_is_found():
    """The zeros above are not everywhere: another first difference, other zeros."""
    got = readings(ActivationPatching("capital", WORDY), shadow("llama"))
    resid = got["activation_patching/resid/capital"].values
    assert (resid[:, 0] == 0).all()
    assert (np.abs(resid[1, [1, 4, 5]]) > 1e-3).all()
    assert got["activation_patching/resid/capital"].labels["pos"] == encoded([CLEAN]).labels[0]


def test_a_probe_of_its_own_is_the_same_as_one_of_the_run():
    named = readings(ActivationPatching("capital", "rome"), shadow("gpt2"), [*PROBES, CORRUPT])
    own = readings(ActivationPatching("capital", CORRUPT), shadow("gpt2"))
    assert list(named) == list(own)
    for key, reading in named.items():
        np.testing.assert_allclose(reading.values, own[key].values, atol=1e-5)


def test_the_foil_may_be_the_corrupt_target():
    unfoiled = Probe("capital", CLEAN.content, target=" Paris")
    foiled = Probe("capital", CLEAN.content, target=" Paris", foil=" Rome")
    one, other = (
        readings(ActivationPatching("capital", CORRUPT), shadow("llama"), [probe])
        for probe in (unfoiled, foiled)
    )
    london = readings(ActivationPatching("capital", CORRUPT), shadow("llama"), [CLEAN])
    for key, reading in one.items():
        np.testing.assert_array_equal(reading.values, other[key].values)
    key = "activation_patching/resid/capital"
    assert np.abs(one[key].values - london[key].values).max() > 1e-3


def test_the_other_way_round():
    """The pair exchanged: what breaks, from what an own pass says."""
    probes = [Probe("a", CLEAN.content, target=" Paris", foil=" Rome")]
    probes.append(Probe("b", CORRUPT.content, target=" Rome", foil=" Paris"))
    of = shadow("opt")
    forth = readings(ActivationPatching("a", "b"), of, probes)
    back = readings(ActivationPatching("b", "a"), of, probes)
    for one, other in (("clean", "corrupt"), ("corrupt", "clean")):
        assert forth[f"activation_patching/{one}/a"].values == pytest.approx(
            -back[f"activation_patching/{other}/b"].values, abs=1e-5
        )
    # Embeddings exchanged, whichever way: the whole difference.
    for got, name in ((forth, "a"), (back, "b")):
        assert got[f"activation_patching/resid/{name}"].values[0, 4] == pytest.approx(1, abs=1e-3)
    assert not np.allclose(
        forth["activation_patching/head/a"].values, back["activation_patching/head/b"].values
    )


@pytest.mark.parametrize("rows", [1, 7])
def test_how_many_side_by_side_does_not_matter(rows):
    wide, narrow = (
        readings(ActivationPatching("capital", CORRUPT, rows=r), shadow("gptj")) for r in (64, rows)
    )
    for key, reading in wide.items():
        np.testing.assert_allclose(reading.values, narrow[key].values, atol=1e-4)


def test_some_parts():
    all_parts = readings(ActivationPatching("capital", CORRUPT), shadow("llama"))
    some = readings(ActivationPatching("capital", CORRUPT, parts=["head", "mlp"]), shadow("llama"))
    assert {key.split("/")[1] for key in some} == {"head", "mlp", "clean", "corrupt"}
    for key, reading in some.items():
        np.testing.assert_allclose(reading.values, all_parts[key].values, atol=1e-5)


def test_no_difference_to_divide_by():
    """Refused at the first look; later, which may come in training, a number is not made up."""
    france, italy = (
        tiny.tokenizer().convert_tokens_to_ids(word) for word in ("\u0120France", "\u0120Italy")
    )
    live = tiny.model("llama")
    of, batch = Shadow.of(live), encoded()
    embedding: torch.Tensor = live.get_input_embeddings().weight.data  # type: ignore[assignment]
    patching = ActivationPatching("capital", CORRUPT)
    assert all(np.isfinite(r.values).all() for r in observe(of, batch, [patching]))
    embedding[italy] = embedding[france]
    later = {r.key: r.values for r in observe(of, batch, [patching])}
    assert np.isnan(later["activation_patching/resid/capital"][:, 4:]).all()
    assert np.isfinite(later["activation_patching/clean/capital"])
    with pytest.raises(ValueError, match="the same to rounding"):
        observe(of, batch, [ActivationPatching("capital", CORRUPT)])


def test_no_difference_to_divide_by_in_one_of_two_pairs():
    """What was seen of one pair says nothing of the other."""
    france, italy = (
        tiny.tokenizer().convert_tokens_to_ids(word) for word in ("\u0120France", "\u0120Italy")
    )
    live = tiny.model("llama")
    of, batch = Shadow.of(live), encoded(PAIRS)
    embedding: torch.Tensor = live.get_input_embeddings().weight.data  # type: ignore[assignment]
    patching, half = ActivationPatching(), ActivationPatching()
    observe(of, batch, [patching])
    assert set(patching.baseline) == {"gap/capital", "gap/men"}
    half.baseline["gap/men"] = patching.baseline["gap/men"]
    embedding[italy] = embedding[france]
    later = {r.key: r.values for r in observe(of, batch, [patching])}
    assert np.isnan(later["activation_patching/head/capital"]).all()
    assert np.isfinite(later["activation_patching/head/men"]).all()
    with pytest.raises(ValueError, match=r"probe 'capital'.*the same to rounding"):
        observe(of, batch, [half])


def test_a_pair_asked_for_by_name_is_remembered_as_in_older_checkpoints():
    patching = ActivationPatching("capital", CORRUPT)
    readings(patching, shadow("llama"))
    assert set(patching.baseline) == {"gap"}


@pytest.mark.parametrize(
    ("corrupt", "says"),
    [
        (Probe("short", "The capital of Italy"), "6 and 5 tokens.*' Italy'"),
        (Probe("same", CLEAN.content), "the same tokens"),
        ("nobody", "no probe 'nobody'"),
    ],
)
def test_a_pair_that_does_not_match_is_shown(corrupt, says):
    with pytest.raises(ValueError, match=says):
        ActivationPatching("capital", corrupt).taps(shadow("llama"), encoded())


def test_a_pair_without_two_answers_is_named():
    unfoiled = Probe("story", TEXTS[1].content, target=" Mary")
    corrupt = Probe("other", str(TEXTS[1].content).replace("John gave", "Mary gave"))
    with pytest.raises(ValueError, match="a foil that is another token"):
        ActivationPatching("story", corrupt).taps(shadow("llama"), encoded([unfoiled]))
    with pytest.raises(ValueError, match="give the clean one a target"):
        ActivationPatching("bare", Probe("x", " red blue red")).taps(shadow("llama"), encoded())


@pytest.mark.parametrize(
    "wrong", [{"parts": ["query"]}, {"parts": "resid"}, {"parts": []}, {"rows": 0}, {"every": 0}]
)
def test_a_wrong_argument_is_named(wrong):
    # Where types are checked, the checker is first.
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        ActivationPatching("capital", CORRUPT, **wrong)


def test_no_trace():
    of, batch = shadow("gemma2"), encoded()
    before = of.logits(batch.tokens)
    readings(ActivationPatching("capital", CORRUPT), of)
    assert torch.equal(of.logits(batch.tokens), before)
    assert not any(getattr(point, "fwd_hooks", []) for point in of.hooks.values())
