"""Contrast equals scikit-learn's AUROC and plain means of Hugging Face's activations."""

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from sklearn.metrics import roc_auc_score

from tests import tiny
from tests.instruments.common import MIXED_MOE, encoded, hugging_face, readings, shadow
from tests.instruments.test_drift import layers_of
from tlens_callback import Contrast, Probe, Shadow, observe
from tlens_callback.instruments import contrast
from tlens_callback.instruments.parts.auroc import auroc

HAVING = (
    "The capital of France is Paris",
    "John and Mary went to the store",
    [1, 40, 41, 42],
    "A cat sat on a mat and a dog sat on the red book",
    " then Mary gave John a drink",
    "The book is in the store.",
)
WITHOUT = (
    "one two three four",
    " five plus six equals seven",
    "eight minus two = six",
    [1, 60, 61],
    [{"role": "user", "content": " nine plus one"}],
)
HELD = {"having": [1, 3, 5], "without": [1, 3]}
"""Of six and of five texts, a half; by hand."""


def made(**more: Any) -> Contrast:
    return Contrast(having=HAVING, without=WITHOUT, **{"k": 5, **more})


@torch.no_grad()
def of_hugging_face(family: str, seed: int = 0) -> dict[str, Any]:
    """Per set and text: [layer, d_model] mean residual stream, [layer] mean norm, neurons."""
    model, seen, handles = hugging_face(family, seed), defaultdict(list), []

    def resid(module, args, output):
        h = output[0] if isinstance(output, tuple) else output
        h = h.reshape(-1, h.shape[-1])[1:].double().numpy()
        seen["resid"].append(h.mean(0))
        seen["norm"].append(np.mean([np.linalg.norm(row) for row in h]))

    def neurons(module, args):
        seen["neuron"].append(args[0].reshape(-1, args[0].shape[-1])[1:].double().numpy().mean(0))

    for layer in layers_of(model):
        handles.append(layer.register_forward_hook(resid))
        down = (
            layer.mlp.down_proj
            if hasattr(layer, "mlp") and hasattr(layer.mlp, "down_proj")
            else getattr(getattr(layer, "mlp", None), "c_proj", None)
        )
        if down is not None:
            handles.append(down.register_forward_pre_hook(neurons))
    n, out = model.config.num_hidden_layers, {}
    tokenizer = tiny.tokenizer()
    for which, texts in (("having", HAVING), ("without", WITHOUT)):
        seen.clear()
        for text in texts:
            if isinstance(text, str):
                text = tokenizer(text)["input_ids"]
            elif isinstance(text[0], dict):
                text = tokenizer.apply_chat_template(
                    text, add_generation_prompt=True, return_dict=True
                )["input_ids"]
            model(torch.tensor([text]), use_cache=False)
        for what, values in seen.items():
            rows = np.array(values)
            out[which, what] = rows.reshape(len(texts), n, *rows.shape[1:])
    for handle in handles:
        handle.remove()
    return out


def split(values: np.ndarray, which: str) -> tuple[np.ndarray, np.ndarray]:
    """What fits, and what is held out."""
    held = HELD[which]
    return np.delete(values, held, 0), values[held]


def direction(hf: dict[str, Any]) -> np.ndarray:
    """[layer, d_model]"""
    return split(hf["having", "resid"], "having")[0].mean(0) - split(
        hf["without", "resid"], "without"
    )[0].mean(0)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_equals_hugging_face_and_scikit_learn(family):
    instrument = made()
    first = readings(instrument, shadow(family))
    got = readings(instrument, shadow(family, seed=1))
    hf = of_hugging_face(family, seed=1)
    d, d0 = direction(hf), direction(of_hugging_face(family))
    assert (first["contrast/cosine"].values == 1).all()
    cosine = (d * d0).sum(1) / np.linalg.norm(d, axis=1) / np.linalg.norm(d0, axis=1)
    np.testing.assert_allclose(got["contrast/cosine"].values, cosine, atol=1e-5)
    norms = [split(hf[which, "norm"], which)[0].mean(0) for which in ("having", "without")]
    expected = np.linalg.norm(d, axis=1) / np.mean(norms, axis=0)
    np.testing.assert_allclose(got["contrast/norm"].values, expected, rtol=1e-4)
    held = np.concatenate([split(hf[w, "resid"], w)[1] for w in ("having", "without")])
    for layer in range(2):
        area = roc_auc_score([1, 1, 1, 0, 0], held[:, layer] @ d[layer])
        assert got["contrast/auroc"].values[layer] == pytest.approx(area)
    assert got["contrast/best"].values == got["contrast/auroc"].values.max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen2"])
def test_neurons_are_hugging_faces(family):
    got = readings(made(), shadow(family))
    hf = of_hugging_face(family)
    fit, held = (
        split(hf["having", "neuron"], "having")[part].mean(0)
        - split(hf["without", "neuron"], "without")[part].mean(0)
        for part in (0, 1)
    )
    for layer in range(2):
        index = got["contrast/neuron"].values[layer].astype(int)
        assert list(index) == list(np.argsort(-np.abs(fit[layer]))[:5])
        for key, values in (("difference", fit), ("held_out_difference", held)):
            np.testing.assert_allclose(
                got[f"contrast/{key}"].values[layer], values[layer, index], atol=1e-5
            )
    assert got["contrast/difference"].values.min() < 0 < got["contrast/difference"].values.max()


def test_layers_of_experts_have_directions_and_no_neurons():
    assert "contrast/neuron" not in readings(made(), shadow("mixtral"))
    mixed = readings(made(), shadow("qwen3_moe", mixed=True))
    assert mixed["contrast/auroc"].values.shape == (MIXED_MOE["num_hidden_layers"],)
    assert mixed["contrast/neuron"].labels["layer"] == ("1",)


def test_auroc_with_ties_equals_scikit_learn():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (3, 11)).astype(float)
    labels = np.stack([rng.permutation(np.arange(11) < 4) for _ in range(6)])
    got = auroc(scores, labels)
    for layer, labelling in np.ndindex(3, 6):
        area = roc_auc_score(labels[labelling], scores[layer])
        assert got[layer, labelling] == pytest.approx(area, abs=1e-12)
    assert auroc(np.zeros((1, 11)), labels).tolist() == [[0.5] * 6]
    assert len(np.unique(got)) > 6


def test_chance_is_that_of_all_labellings():
    """Against every labelling there is, for one layer and for the best of all."""
    having = [[1, i, i + 1, i + 2] for i in range(10, 22)]
    without = [[1, i, i + 1, i + 2] for i in range(50, 62)]
    instrument = Contrast(having=having, without=without, k=1)
    of = Shadow.of(tiny.model("llama", num_hidden_layers=4))
    got = readings(instrument, of)
    taken: dict[str, np.ndarray] = {}
    batch = encoded([Probe(str(i), ids) for i, ids in enumerate([*having, *without])])

    def mean(h):
        return h[:, 1:].float().mean(1)

    for name, value in of.run(batch, [{f"blocks.{i}.hook_resid_post": mean for i in range(4)}])[
        0
    ].items():
        taken[name] = value.double().numpy()  # type: ignore[union-attr]
    scores = []
    for h in taken.values():
        d = h[0:12:2].mean(0) - h[12::2].mean(0)
        scores.append(np.concatenate([h[1:12:2], h[13::2]]) @ d)
    # By rank sums: the area is (sum of the six's ranks - 21) / 36.
    ranks = np.array([rankdata(layer) for layer in scores])
    chosen = np.array(list(itertools.combinations(range(12), 6)))
    areas = (ranks[:, chosen].sum(2) - 21) / 36
    assert got["contrast/chance"].values == pytest.approx(np.quantile(areas, 0.95, 1), abs=0.04)
    best = np.quantile(areas.max(0), 0.95)
    assert got["contrast/best_chance"].values == pytest.approx(best, abs=0.04)
    assert best > np.quantile(areas, 0.95, 1).max() + 0.02


def planted(strength: float) -> dict[str, Any]:
    """Texts of random words; in the one set some words are exchanged for signs of a feature."""
    rng = np.random.default_rng(0)
    words = rng.integers(20, 80, (40, 12))
    words[:20][rng.random((20, 12)) < strength] = 9
    rows = [[1, *row] for row in words.tolist()]
    got = readings(Contrast(having=rows[:20], without=rows[20:]), shadow("llama"))
    return {key.partition("/")[2]: reading.values for key, reading in got.items()}


def test_a_feature_is_found_and_no_feature_is_not():
    found, nothing = planted(0.5), planted(0.0)
    assert (found["auroc"] > found["chance"]).all() and found["best"] > 0.95
    assert (nothing["auroc"] <= nothing["chance"]).all()
    assert nothing["best"] <= nothing["best_chance"]
    assert 0.6 < nothing["chance"].min() and nothing["chance"].max() < 0.85
    # What was chosen for being large is less so on other texts, and nothing without a feature.
    agree = [
        (np.sign(got["difference"]) == np.sign(got["held_out_difference"])).mean()
        for got in (found, nothing)
    ]
    assert agree[0] >= 0.9 > 0.75 > agree[1]
    ratio = np.abs(nothing["held_out_difference"]).mean() / np.abs(nothing["difference"]).mean()
    assert ratio < 0.75
    assert found["norm"].min() > nothing["norm"].max()


def test_parts_do_not_matter(monkeypatch):
    """One forward pass for all texts, or one for each, of lengths that differ."""
    together = readings(made(), shadow("mistral"))
    monkeypatch.setattr(contrast, "TOKENS", 1)
    passes = []
    of, run = shadow("mistral"), shadow("mistral").run

    def counted(batch, taps, **more):
        passes.append(len(batch.probes))
        return run(batch, taps, **more)

    monkeypatch.setattr(of, "run", counted, raising=False)
    alone = readings(made(), of)
    assert passes.count(1) == len(HAVING) + len(WITHOUT)
    for key, reading in together.items():
        np.testing.assert_allclose(reading.values, alone[key].values, atol=1e-5)


@pytest.mark.parametrize("share, held", [(0.2, [4, 9]), (0.5, [1, 3, 5, 7, 9]), (0.7, range(10))])
def test_held_out_texts_are_spread_evenly(share, held):
    texts = [[[1, i, j] for j in range(20, 30)] for i in (40, 41)]
    which = np.flatnonzero(Contrast(*texts, held_out=share)._held_out(10))
    assert len(which) == round(10 * share)
    assert set(which) <= set(held)
    assert np.diff(which).max() - np.diff(which).min() <= 1


def test_remembers_the_first_direction_of_the_same_texts_only():
    one = made()
    readings(one, shadow("llama"))
    same, other = made(), made(held_out=0.4)
    for resumed in (same, other):
        resumed.baseline.update({key: kept.clone() for key, kept in one.baseline.items()})
    moved = readings(same, shadow("llama", seed=1))["contrast/cosine"].values
    assert np.abs(moved).max() < 0.9
    assert (readings(other, shadow("llama", seed=1))["contrast/cosine"].values == 1).all()


def test_no_global_random_number_is_drawn():
    state = torch.random.get_rng_state()
    readings(made(), shadow("llama"))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"having": HAVING[:3]}, "3 texts in 'having'"),
        ({"without": WITHOUT[:0]}, "0 texts in 'without'"),
        ({"held_out": 0.2}, "to test it on"),
        ({"held_out": 1.0}, "to fit"),
        ({"held_out": -0.5}, "to test it on"),
        ({"having": "The capital of France"}, "is one text"),
        ({"without": [*WITHOUT, HAVING[0]]}, "twice"),
        ({"having": [*HAVING, HAVING[2]]}, "twice"),
        ({"having": [*HAVING, ""]}, r"having\[6\].* is empty"),
        ({"k": 0}, "k >= 1"),
        ({"every": 0}, "every >= 1"),
    ],
)
def test_refuses(changed, message):
    with pytest.raises(ValueError, match=message):
        Contrast(**{"having": HAVING, "without": WITHOUT, **changed})


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"k": 49}, "layer 0 has 48 neurons"),
        ({"having": [*HAVING, [5]]}, r"having\[6\] has no other"),
        ({"without": [*WITHOUT, list(range(70))]}, r"'without\[5\]' is 70 tokens long"),
    ],
)
def test_refuses_what_the_model_cannot_take(changed, message):
    instrument = Contrast(**{"having": HAVING, "without": WITHOUT, **changed})
    with pytest.raises(ValueError, match=message):
        observe(shadow("llama"), encoded(), [instrument])
