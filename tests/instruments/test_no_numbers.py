"""Models whose training has diverged: a reading says NaN, and never points at what is not measured.

Each model is looked at as it was, then broken and looked at again, with all instruments at once.
"""

from functools import cache

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.instruments.common import MIXED_MOE, PROBES, TEXTS, encoded
from tests.instruments.test_contract import EXPORTED, first
from tlens_callback import Reading, Shadow, observe
from tlens_callback.instruments import CopyingScores, LogitAttribution, LogitLens, TopNeurons

OF_WEIGHTS = {
    "adapter_spectrum",
    "composition",
    "copying_scores",
    "frozen_weights",
    "update_sparsity",
}
OF_BLOCKS = {"head_scores", "virtual_heads", "repeat_loss"}
OF_ITS_OWN = {"contrast"}
"""Forward passes of texts of its own."""

TRUE_ALL_THE_SAME = {
    # None of those that are numbers is massive.
    "sparse_features/massive",
    "trained_features/massive",
    # Of the autoencoder itself, which goes on with the activations that it has seen.
    "trained_features/cosine",
    "trained_features/dead",
    "trained_features/resampled",
}
BROKEN_HEAD = 1


def adapted(family: str, **overrides):
    model = tiny.model(family, **overrides)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return peft


def token_of_story() -> int:
    """A token of the probe "story" that no other probe has."""
    batch = encoded()
    row = [probe.name for probe in PROBES].index("story")
    others = {i for j, ids in enumerate(batch.tokens.tolist()) if j != row for i in ids}
    return next(i for i in batch.tokens[row].tolist() if i not in others)


@torch.no_grad()
def break_it(peft, how: str) -> None:
    model = peft.get_base_model()
    layers, embeddings = model.model.layers, model.model.embed_tokens.weight
    if how == "everything":
        embeddings[1] = np.nan  # <bos>, which all probes begin with
    elif how == "one probe":
        embeddings[token_of_story()] = np.nan
    elif how == "one head":
        layers[1].self_attn.q_proj.base_layer.weight[8 * BROKEN_HEAD :][:8] = np.nan
    elif how == "infinite activations":
        weight = layers[0].mlp.down_proj.base_layer.weight
        weight.copy_(3e38 * weight.sign())
    elif how == "infinite logits":
        # Of one token, of either sign: the stream's fourth number, made large, decides.
        model.model.norm.weight[3] = 50
        model.lm_head.weight[:, 3] = 0
        model.lm_head.weight[encoded().targets[0]] = 0
        model.lm_head.weight[encoded().targets[0], 3] = 3e38
    elif how == "one entry of an adapter":
        layers[1].self_attn.q_proj.lora_B["default"].weight[0, 0] = np.nan
    else:
        raise AssertionError(how)


@cache
def looks(how: str) -> tuple[dict[str, Reading], dict[str, Reading]]:
    """Before and after."""
    peft = adapted("llama")
    made = [
        *(first(exported) for exported in EXPORTED),
        LogitAttribution(neurons=3, name="with_neurons"),
        LogitLens(every_token=True, name="every_token"),
    ]
    shadow, batch = Shadow.of(peft), encoded()
    before = observe(shadow, batch, made)
    break_it(peft, how)
    shadow.sync()
    after = observe(shadow, batch, made)
    assert [r.key for r in after] == [r.key for r in before]
    return {r.key: r for r in before}, {r.key: r for r in after}


def said(reading: Reading) -> bool:
    """Whether it says that nothing of it is known."""
    quiet = reading.texts is None or set(reading.texts.ravel().tolist()) <= {""}
    return bool(np.isnan(reading.values).all()) and quiet


def same(one: Reading, other: Reading) -> bool:
    return np.allclose(one.values, other.values, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_nothing_is_known_of_a_model_of_nan():
    _, after = looks("everything")
    known = set()
    for key, reading in after.items():
        if reading.instrument in OF_WEIGHTS or said(reading):
            continue
        if reading.measure == "activation" and reading.axes == ("feature", "pos"):
            # The first token does not count, whatever it has.
            assert (reading.values[:, 0] == 0).all() and np.isnan(reading.values[:, 1:]).all()
            continue
        known.add(key)
    assert known == TRUE_ALL_THE_SAME


def test_other_probes_are_what_they_were():
    before, after = looks("one probe")
    at = encoded().tokens[PROBES.index(TEXTS[1])].tolist().index(token_of_story())
    for key, reading in after.items():
        if reading.instrument in OF_WEIGHTS:
            continue
        if reading.instrument in OF_BLOCKS | OF_ITS_OWN or (
            reading.probe not in (None, "story") and reading.instrument != "head_ablation"
        ):
            # All heads are replaced by their mean over the probes, which is not known.
            if reading.instrument == "trained_features":
                # Its autoencoder was trained on what is left: another one.
                assert np.isfinite(reading.values).all(), key
            else:
                assert same(reading, before[key]), key
        elif reading.probe == "story" and {"pos", "query", "token"} & set(reading.axes):
            (axis,) = {"pos", "query", "token"} & set(reading.axes)
            by_token = np.moveaxis(reading.values, reading.axes.index(axis), 0)
            begin = at - (axis == "token")
            assert np.isnan(by_token[begin:]).any(tuple(range(1, by_token.ndim)) or ()).all(), key
        elif "prompt" in reading.axes:
            for row, name in enumerate(reading.labels["prompt"]):
                one, was = reading.values[row], before[key].values[row]
                assert np.isnan(one).all() if name == "story" else (one == was).all(), key
        elif key not in TRUE_ALL_THE_SAME:
            # The training of the autoencoder leaves out what is no number.
            assert said(reading) or key == "trained_features/fvu_before" or (
                reading.measure == "loss_zero"
            ), key  # fmt: skip


def test_one_head_of_nan_leaves_the_others():
    before, after = looks("one head")
    for key, reading in after.items():
        if reading.instrument != "head_scores" and reading.measure != "pattern":
            continue
        if reading.axes == ():
            other = {"max_previous", "min_entropy", "mean_entropy", "sink_share"}
            assert said(reading) or not (other & {reading.measure}), key
            continue
        layer = reading.axes.index("layer")
        per_head = np.moveaxis(reading.values, [layer, layer + 1], [0, 1])
        was = np.moveaxis(before[key].values, [layer, layer + 1], [0, 1])
        broken = np.zeros(per_head.shape[:2], bool)
        broken[1, BROKEN_HEAD] = True
        looked = np.tril(np.ones(per_head.shape[2:])) > 0 if reading.measure == "pattern" else ...
        assert np.isnan(per_head[broken][0][looked]).all(), key
        np.testing.assert_allclose(per_head[~broken], was[~broken], atol=1e-5, err_msg=key)
    assert all(said(r) for r in after.values() if r.instrument == "target_scores")
    pairs = after["virtual_heads/induction_pair"]
    unknown = np.isnan(pairs.values)
    assert unknown.any() and (np.array(pairs.texts == "") == unknown).all()
    assert unknown.tolist() == np.isnan(after["virtual_heads/induction"].values).tolist()


def test_a_pair_without_a_score_has_no_name():
    _, after = looks("one head")
    strongest = after["composition/strongest"]
    unknown = np.isnan(strongest.values)
    assert unknown.any() and not unknown.all()
    assert ((strongest.texts == "") == unknown).all()
    q = after["composition/q"].values
    assert np.isnan(q[1, 0]) and (q[0] == 0).all() and q[1, 1] == 0


def test_infinite_activations_raise_nothing_and_name_nothing_behind_them():
    _, after = looks("infinite activations")
    for key, reading in after.items():
        if reading.instrument in OF_WEIGHTS or key in TRUE_ALL_THE_SAME:
            continue
        if "layer" in reading.axes and reading.axes[-2:] != ("query", "key"):
            behind = reading.values.take(1, reading.axes.index("layer"))
            assert not np.isfinite(behind).any() or reading.measure == "mlp", key
        elif reading.instrument in ("target_scores", "token_loss", "repeat_loss"):
            assert said(reading), key
    drift = after["activation_drift/relative"].values
    assert not (drift[1] == 0).any(), "what is no number has not stayed where it was"


def test_infinite_logits_are_no_answer():
    """Minus infinity is one that a model may give on purpose: a token that never comes."""
    _, after = looks("infinite logits")
    batch, peft = encoded(), adapted("llama")
    break_it(peft, "infinite logits")
    signs = set()
    for row, probe in enumerate(PROBES):
        if probe.block is not None:
            continue
        with torch.no_grad():
            logits = peft(batch.tokens[row : row + 1, : batch.lengths[row]]).logits[0, -1]
        of_it = float(logits[batch.targets[0]])
        assert np.isinf(of_it) and logits.isinf().sum() == 1
        signs.add(of_it)
        for name in ("logit_lens", "every_token"):
            token, top = (after[f"{name}/{measure}/{probe.name}"] for measure in ("token", "top"))
            if of_it > 0:
                assert np.isnan(token.values[-1]).all() and np.isnan(top.values[-1]).all()
                assert set(token.texts[-1].tolist()) == {""}
            else:
                assert batch.targets[0] not in token.values[-1]
                assert np.isfinite(top.values[-1]).all() and "" not in token.texts[-1].tolist()
        if probe.target is not None:
            loss = after[f"target_scores/loss/{probe.name}"].values
            assert not np.isfinite(loss)
            assert not after[f"target_scores/probability/{probe.name}"].values > 0
            assert not after[f"target_scores/rank/{probe.name}"].values == 0
    assert signs == {np.inf, -np.inf}
    for key, reading in after.items():
        if reading.instrument == "activation_patching" and reading.axes:
            assert said(reading), key


def test_an_adapter_of_nan_is_told_from_the_others():
    before, after = looks("one entry of an adapter")
    for key, reading in after.items():
        if reading.instrument == "adapter_spectrum" and reading.measure != "rotation":
            modules = list(reading.labels["module"])
            broken = np.zeros(reading.values.shape[:2], bool)
            broken[1, modules.index("q_proj")] = True
            assert np.isnan(reading.values[broken]).all(), key
            np.testing.assert_allclose(reading.values[~broken], before[key].values[~broken])
    assert np.isnan(after["adapter_spectrum/rotation"].values).sum() == 1


def test_a_router_of_nan_sends_tokens_nowhere():
    model = tiny.model("qwen3_moe", **MIXED_MOE)
    shadow, batch = Shadow.of(model), encoded(TEXTS)
    before = {r.key: r for r in observe(shadow, batch, [TopNeurons()])}
    with torch.no_grad():
        model.model.layers[2].mlp.gate.weight[0] = np.nan
    after = {r.key: r for r in observe(shadow, batch, [TopNeurons()])}
    for probe in TEXTS:
        share = after[f"top_neurons/expert_share/{probe.name}"]
        assert share.labels["layer"] == ("0", "2")
        assert np.isnan(share.values[1]).all()
        assert (share.values[0] == before[share.key].values[0]).all()


@pytest.mark.parametrize("what", ["column", "row"])
def test_a_token_that_cannot_be_compared_is_in_no_list_of_five(what):
    model = tiny.model("llama")
    shadow, batch = Shadow.of(model), encoded(TEXTS)
    with torch.no_grad():
        weight = model.lm_head.weight
        (weight if what == "column" else weight.T)[20] = np.nan
    got = {r.measure: r for r in observe(shadow, batch, [CopyingScores()])}
    for measure in ("eigenvalue", "top5", "eigenvalue_permuted", "top5_permuted"):
        assert np.isnan(got[measure].values).all(), measure
