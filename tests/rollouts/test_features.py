"""Features of instruments at sampled tokens, held against plain hidden states and numpy."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from tests.rollouts.test_planted import HEAD, LAYER, TOKEN, completions, counts, planted, seen
from tests.rollouts.test_tokens import adapted, batch_of, rollouts
from tests.rollouts.trained import watched
from tests.sae.by_hand import HOOK, identity, random_sae
from tests.training import CAPITAL
from tlens_callback import (
    Contrast,
    LocalSink,
    ProbeBatch,
    Reading,
    Shadow,
    SparseFeatures,
    TokenFeatures,
    observe,
    read_store,
)
from tlens_callback.events.contrasts import discoveries
from tlens_callback.rollouts import Look, Recorder, Rollouts
from tlens_callback.rollouts import features as module
from tlens_callback.rollouts.features import Features
from tlens_callback.rollouts.inside import inside, parts
from tlens_callback.sae import Autoencoder
from tlens_callback.sinks.rollouts import rollout_table

TEXTS: Any = {
    "having": ["The cat is red", "A dog sat on mat", [1, 20, 21], "Paris is in France then"],
    "without": ["What is three plus two", "one two three", " six", "seven eight nine"],
}


def read(shadow: Shadow, instruments: Any, few: Any) -> tuple[Features, np.ndarray, np.ndarray]:
    """The features, [rollout, feature] their means, and [token, feature], rollout by rollout."""
    features, means, order, sizes = Features.of(instruments, shadow), [], [], []
    for part in parts(few, batch_of(shadow), 64):
        means.append(features.means(inside(shadow, part, [], features.taps(part)).more))
        order += part.which
        sizes += part.sizes
    tokens = features.at_tokens(range(len(features.names))).T.split(sizes)
    back = np.argsort(order)
    return features, torch.cat(means)[back].numpy(), torch.cat([tokens[i] for i in back]).numpy()


@torch.no_grad()
def hidden(model: Any, one: Any, layer: int) -> np.ndarray:
    """[token, d_model], the residual stream before a layer at the sampled tokens, in float64."""
    ids = torch.tensor([[*one.prompt, *one.completion]])
    states = model(ids, output_hidden_states=True).hidden_states[layer][0]
    return states[len(one.prompt) :].double().numpy()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("n_features", [48, 7])
@pytest.mark.parametrize("chunk", [100, 2**23])
def test_features_are_those_of_the_hidden_states(family, n_features, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    whole = random_sae()
    sae = Autoencoder(
        whole.W_enc[:, :n_features],
        whole.b_enc[:n_features],
        whole.W_dec[:n_features],
        whole.b_dec,
        hook=HOOK,
    )
    model, few = adapted(family, target_modules="all-linear"), rollouts()
    features, means, tokens = read(Shadow.of(model), [SparseFeatures(sae)], few)
    assert features.names == [f"sparse_features {i}" for i in range(sae.n_features)]
    w, b = sae.W_enc.double().numpy(), sae.b_enc.double().numpy()
    wanted = [
        np.maximum((hidden(model, one, 1) - sae.b_dec.double().numpy()) @ w + b, 0) for one in few
    ]
    assert 0.1 < (np.concatenate(wanted) > 0).mean() < 0.9
    np.testing.assert_allclose(tokens, np.concatenate(wanted), rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(means, [f.mean(0) for f in wanted], rtol=1e-4, atol=2e-5)


def test_projections_are_on_the_first_direction_of_the_texts():
    model, few = adapted(), rollouts()
    shadow, contrast = Shadow.of(model), Contrast(**TEXTS, k=2)
    assert not Features.of([contrast], shadow).names, "nothing was fitted yet"
    observe(shadow, batch_of_texts(shadow), [contrast])
    (direction,) = contrast.baseline.values()
    with torch.no_grad():  # a later step, whose own direction is another
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1)
    shadow.sync()
    sae = SparseFeatures(random_sae())  # two instruments at hook points in common
    features, means, tokens = read(shadow, [contrast, sae], few)
    assert features.names[:2] == ["contrast L0", "contrast L1"]
    for layer, d in enumerate(direction.double().numpy()):
        wanted = [hidden_after(model, one, layer) @ d / np.linalg.norm(d) for one in few]
        np.testing.assert_allclose(tokens[:, layer], np.concatenate(wanted), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(means[:, layer], [p.mean() for p in wanted], atol=2e-5)


def batch_of_texts(shadow: Shadow) -> Any:
    about = {"vocab_size": shadow.vocab_size, "context": shadow.context}
    return ProbeBatch.encode([CAPITAL], tokenizer=tiny.tokenizer(), **about)


@torch.no_grad()
def hidden_after(model: Any, one: Any, layer: int) -> np.ndarray:
    kept: list[Any] = []
    block = model.get_base_model().model.layers[layer]
    handle = block.register_forward_hook(lambda _, __, out: kept.append(out))
    model(torch.tensor([[*one.prompt, *one.completion]]))
    handle.remove()
    return kept[0][0, len(one.prompt) :].double().numpy()


def reading_the_token() -> SparseFeatures:
    """Feature 3 of 5 fires where the residual stream says the rewarded token."""
    draw = torch.Generator().manual_seed(2)
    encoder = torch.randn(32, 5, generator=draw) / 6
    embedded = planted().model.embed_tokens.weight[TOKEN].detach()
    encoder[:, 3] = embedded / embedded.norm()
    sae = Autoencoder(encoder, torch.zeros(5), encoder.T, torch.zeros(32))
    return SparseFeatures(sae, hook="blocks.0.hook_resid_pre", features=[1])


def test_a_feature_that_reads_the_rewarded_token_is_found():
    found = seen(counts(), instruments=[reading_the_token()])
    names = found["contrast_feature"].texts
    assert names is not None and names[0] == "sparse_features 3"
    assert found["contrast_feature_q"].values[0] <= 0.05
    assert found["contrast_feature"].values[0] > 0
    told = discoveries([*found.values()], 100)
    assert told is not None
    assert any(
        str(one).startswith("sparse_features 3 has more of this feature") for one in told.surest
    )
    # At each token: it fires where the token stands, and nothing is said where there is none.
    each = found["feature/sparse_features 3"].values
    ids = completions()[1]
    written = np.array([[token == TOKEN for token in one] for one in ids])
    assert each[written].min() > each[~written].mean()
    np.testing.assert_allclose(
        found["mean_feature/sparse_features 3"].values, each.mean(1), rtol=1e-5
    )
    gain = found["advantage"].values
    wanted = (gain * each.mean(1)).sum() / np.abs(gain).sum()
    assert found["contrast_feature"].values[0] == pytest.approx(wanted, rel=1e-4)
    shown = [key for key in found if key.startswith("feature/")]
    assert shown[0] == "feature/sparse_features 1", "what the instrument was told to show"
    assert found["looked_at"].values == 5 * 8 + 2 + 2 + 2 * 48 + 5


def test_as_many_features_are_shown_as_asked_for():
    found = seen(counts(), instruments=[reading_the_token()], features=2)
    assert found["contrast_feature"].values.shape == (2,)
    assert sum(key.startswith("feature/") for key in found) == 2
    none = seen(counts(), instruments=[reading_the_token()], features=0)
    assert not any("feature" in key for key in none)
    assert none["looked_at"].values == 5 * 8 + 2 + 2 + 2 * 48, "they are not read either"


def test_without_winners_and_losers_those_of_largest_mean_are_shown():
    found = seen([1.0] * 32, instruments=[SparseFeatures(identity(), hook=HOOK)], features=64)
    means = {k: v.values.mean() for k, v in found.items() if k.startswith("mean_feature/")}
    few = seen([1.0] * 32, instruments=[SparseFeatures(identity(), hook=HOOK)], features=3)
    shown = [key for key in few if key.startswith("mean_feature/")]
    assert shown == sorted(means, key=lambda key: -means[key])[:3]


class Wrong:
    name = "own"

    def __init__(self, hook: str, width: int = 2) -> None:
        self.of = TokenFeatures(hook, lambda x: x[:, :width], ["one", "two"])

    def taps(self, shadow: Any, batch: Any) -> dict:
        return {}

    def read(self, taken: Any, shadow: Any, batch: Any) -> list[Reading]:
        return []

    def token_features(self, shadow: Any) -> list[TokenFeatures]:
        return [self.of]


def test_what_an_instrument_gets_wrong_is_said_early(tmp_path):
    with pytest.raises(ValueError, match=r"no hook point 'blocks\.9\.hook_resid_post'") as raised:
        watched(tmp_path, instruments=[Wrong("blocks.9.hook_resid_post")])
    assert raised.value.__notes__ == ["(raised for the features of the instrument 'own')"]
    with pytest.raises(ValueError, match=r"encode gave \(\d+, 3\) .* there are 2 names"):
        seen(counts(), instruments=[Wrong(HOOK, 3)])
    with pytest.raises(ValueError, match="a name for each"):
        TokenFeatures(HOOK, lambda x: x, ["one", "one"])
    for names in ([], [1, 2], ["", "two"]):
        with pytest.raises(ValueError, match="a name for each"):
            TokenFeatures(HOOK, lambda x: x, names)
    for shown in ([2], [-1]):
        with pytest.raises(ValueError, match="indices of its 2 names"):
            TokenFeatures(HOOK, lambda x: x, ["one", "two"], shown)
    with pytest.raises(ValueError, match=r"'own one' is there twice"):
        seen(counts(), instruments=[Wrong(HOOK), Wrong(HOOK)])
    with pytest.raises(ValueError, match=r"features are read from \[probe, pos"):
        seen(counts(), instruments=[Wrong("blocks.0.attn.hook_pattern")])
    with pytest.raises(ValueError, match="has a slash"):
        TokenFeatures(HOOK, lambda x: x, ["one/two"])


class Changing(SparseFeatures):
    """Its features may become others, as those that are trained."""

    def token_features(self, shadow: Any) -> Any:
        for one in super().token_features(shadow):
            yield dataclasses.replace(one, fixed=False)


def test_what_is_said_of_a_run_is_of_the_same_numbers():
    """Heads go on where the features are others; features that change are of no run."""
    shadow, recorder = Shadow.of(planted()), Recorder()
    each, sampled = completions()
    reward = recorder.reward(lambda completion_ids, **_: counts())
    args = SimpleNamespace(num_generations=8, scale_rewards="none", temperature=1.0)
    look, batch = Look(Rollouts(features=48), recorder), batch_of(shadow)
    some, others = [SparseFeatures(random_sae(seed=s, n=n)) for s, n in ((0, 48), (1, 40))]
    head, features = [], []
    for step, instruments in enumerate(([some], [some], [others], [], [Changing(random_sae())])):
        ids = [*sampled]
        reward(prompts=each, completions=ids, completion_ids=ids)
        found = look.before_update(shadow, batch, planted(), args, step, instruments)
        by = {one.key.removeprefix("rollouts/"): one.values for one in found}
        head.append(float(by["contrast_direct_run"][LAYER, HEAD]))
        features.append(by.get("contrast_feature_run"))
    z = head[0]
    assert head == [pytest.approx(z * n**0.5) for n in (1, 2, 3, 4, 5)]
    first, second, third, none, changing = features
    assert np.nanmax(np.abs(second)) == pytest.approx(2**0.5 * np.nanmax(np.abs(first)))
    assert 0 < np.nanmax(np.abs(third)) < 4 and none is None and np.isnan(changing).all()


def test_an_encoder_that_has_gradients_is_read_without_them():
    torch.manual_seed(0)
    instrument, layer = Wrong(HOOK), nn.Linear(32, 40)
    names = [str(i) for i in range(40)]
    instrument.of = TokenFeatures(HOOK, layer, names, shown=[7])
    found = seen(counts(), instruments=[instrument], features=3)
    each = found["feature/own 7"].values
    np.testing.assert_allclose(found["mean_feature/own 7"].values, each.mean(1), rtol=1e-5)


def test_a_training_shows_the_features_of_its_rollouts(tmp_path, capsys):
    own = [Wrong("blocks.0.attn.hook_z"), SparseFeatures(random_sae(), every=100)]
    sinks = [LocalSink(tmp_path / "tlens")]
    watched(tmp_path, instruments=own, sinks=sinks, rollouts={"features": 60})
    assert "50 features of instruments are read" in capsys.readouterr().out
    store = read_store(tmp_path / "tlens")
    for step in (0, 1, 2):
        wholes, tokens = store.rollouts(step)
        assert np.isfinite(tokens["feature/own one"]).all()
        assert np.isfinite(wholes["mean_feature/own one"]).all()
        mean = tokens.groupby("rollout", observed=True)["feature/own one"].mean()
        np.testing.assert_allclose(wholes["mean_feature/own one"], mean, rtol=1e-4)
    assert wholes.filter(like="mean_feature/sparse_features").shape[1] == 48
    shown = rollout_table(1, store.readings(1))
    assert not [name for name in shown if "feature" in name] and "advantage" in shown
