"""Two saved models against each other."""

import json

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.offline.two_models import DOG, adapter, asked, fine_tune, save
from tests.training import CAPITAL
from tlens_callback import LocalSink, Probe, fast, read_store
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.instruments import AdapterSpectrum, FrozenWeights, UpdateSparsity
from tlens_callback.offline.compare import Pair, compare_models, differences
from tlens_callback.probes import ProbeBatch
from tlens_callback.run.observe import observe
from tlens_callback.shadow import Shadow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """base, two fine-tunes a and b, and adapters over the base."""
    folder = tmp_path_factory.mktemp("models")
    base = save(tiny.model("llama"), folder / "base")
    found = {"base": base}
    found |= {name: fine_tune(folder / name, seed) for name, seed in (("a", 1), ("b", 2))}
    found |= {name: adapter(folder / name, base, seed) for name, seed in (("x", 3), ("y", 4))}
    found["z"] = adapter(folder / "z", base, 5, r=8)
    found["random"] = adapter(folder / "random", base, 6, init_lora_weights=False)
    return found


def compared(saved, a, b, **given):
    pair = compare_models(
        Checkpoint.of(saved[a]), Checkpoint.of(saved[b]), Loader(), asked(**given)
    )
    return [{reading.key: reading for reading in side} for side in (pair.first, pair.last)]


def own_forward(folder, probe):
    """Attention and the loss of each token, by Hugging Face alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ids = torch.tensor([tiny.tokenizer()(probe.content)["input_ids"]])
    with torch.no_grad():
        out = model(ids, output_attentions=True)
    losses = F.cross_entropy(out.logits[0, :-1], ids[0, 1:], reduction="none")
    return torch.stack(out.attentions)[:, 0].double().numpy(), losses.numpy()


def test_drift_and_loss_are_of_b_against_a(saved):
    first, last = compared(saved, "a", "b")
    for probe in (CAPITAL, DOG):
        (p, loss_a), (q, loss_b) = (own_forward(saved[name], probe) for name in "ab")
        js = jensenshannon(p[:, :, 1:], q[:, :, 1:], axis=-1, base=2) ** 2
        key = f"attention_drift/js/{probe.name}"
        assert np.abs(last[key].values - js.mean(-1)).max() < 1e-6 < js.mean(-1).max()
        assert (first[key].values == 0).all()
        change = last[f"token_loss/change/{probe.name}"].values
        assert np.abs(change - (loss_b - loss_a)).max() < 1e-5 < np.abs(change).max()


@pytest.mark.parametrize(
    ("a", "b", "without"),
    [
        ("base", "x", ()),
        ("x", "y", ()),
        ("x", "z", ()),
        ("a", "b", ("adapter_spectrum",)),
        ("a", "a", ("adapter_spectrum",)),
        ("x", "a", ("adapter_spectrum", "update_sparsity")),
        ("base", "random", ("adapter_spectrum", "update_sparsity")),
    ],
)
@pytest.mark.slow
def test_each_side_is_what_one_look_at_it_shows(saved, a, b, without):
    first, last = compared(saved, a, b)
    for name, side in ((a, first), (b, last)):
        model = Loader().load(Checkpoint.of(saved[name]))
        shadow = Shadow(model)
        batch = ProbeBatch.encode(
            asked().completed([CAPITAL, DOG], shadow), tiny.tokenizer(), vocab_size=tiny.VOCAB
        )
        instruments = [one for one in fast() if not isinstance(one, AdapterSpectrum)]
        alone = {one.key: one for one in observe(shadow, batch, instruments)}
        shadow.release()
        instruments = {key.split("/")[0] for key in side}
        assert instruments.isdisjoint({"frozen_weights", *without})
        kept = {"adapter_spectrum", "update_sparsity", "activation_drift"} - {*without}
        assert kept <= instruments
        own = ("head_scores", "logit_attribution/head/", "logit_lens/kl", "token_loss/loss")
        for key in (key for key in alone if key.startswith(own)):
            assert np.allclose(side[key].values, alone[key].values, atol=2e-5), (name, key)
    moved = "logit_attribution/head_change/capital"
    other = "logit_attribution/head/capital"
    assert np.array_equal(last[moved].values, last[other].values - first[other].values)


def test_the_base_of_an_adapter_is_loaded_once(saved, monkeypatch):
    loads = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(name, *args, **kwargs):
        loads.append(str(name))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    compared(saved, "base", "x")
    assert loads == [str(saved["base"])]
    compared(saved, "a", "x")  # another base: each its own
    assert loads[1:] == [str(saved["a"]), str(saved["base"])]


def test_a_model_against_itself_differs_in_nothing(saved, tmp_path):
    pair = compare_models(Checkpoint.of(saved["a"]), Checkpoint.of(saved["a"]), Loader(), asked())
    pair.write(sink := LocalSink(tmp_path / "same", page=False))
    last = {reading.key: reading for reading in pair.last}
    assert last["attention_drift/max"].values == 0
    text = differences(read_store(sink.path))
    assert text == "Nothing differs: all numbers of A and B are the same."


def test_two_precisions_are_said(saved, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(saved["a"], dtype=torch.bfloat16)
    models = {**saved, "rounded": save(model, tmp_path / "rounded")}
    for dtype, said in ((None, True), (torch.float32, False)):
        caplog.clear()
        a, b = (Checkpoint.of(models[name]) for name in ("a", "rounded"))
        compare_models(a, b, Loader(dtype=dtype), asked([CAPITAL], repeats=False))
        assert ("A was computed in float32 and B in bfloat16" in caplog.text) == said


def test_what_was_asked_for_by_name_is_not_left_out(saved):
    first, _ = compared(saved, "x", "y", instruments=[FrozenWeights(), UpdateSparsity()])
    assert {"frozen_weights/changed", "update_sparsity/all"} <= set(first)


def test_models_of_another_shape(saved, tmp_path):
    other = save(tiny.model("llama", num_hidden_layers=3), tmp_path / "deeper")
    with pytest.raises(ValueError, match="different shapes and cannot be compared head by head"):
        compared({**saved, "other": other}, "a", "other")


def test_the_tokens_of_the_probes_have_to_be_the_same(saved, tmp_path):
    tokenizer = tiny.tokenizer()
    ids = tokenizer.convert_tokens_to_ids
    one, other = ids("Ġcat"), ids("Ġdog")
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    about["model"]["vocab"] |= {"Ġcat": other, "Ġdog": one}
    swapped = tiny.tokenizer()
    swapped._tokenizer = Tokenizer.from_str(json.dumps(about))
    assert swapped.convert_tokens_to_ids("Ġcat") == other != one
    model = AutoModelForCausalLM.from_pretrained(saved["b"])
    models = {**saved, "swapped": save(model, tmp_path / "swapped", swapped)}
    compared(models, "a", "swapped", probes=[CAPITAL])  # its tokens are the same in both
    with pytest.raises(ValueError, match=r"different tokenizers: token .*cat"):
        compared(models, "a", "swapped", probes=[DOG])


def test_the_text_says_the_numbers(saved, tmp_path):
    first, last = compared(saved, "a", "b", probes=[CAPITAL])
    Pair(("a", "b"), [*first.values()], [*last.values()]).write(sink := LocalSink(tmp_path / "s"))
    text = differences(read_store(sink.path))
    flat = text.replace("\n  ", " ")
    js = last["attention_drift/js"].values
    layer, head = np.unravel_index(js.argmax(), js.shape)
    assert f"Attention moved most: L{layer}H{head} {js.max():.3g}" in text
    chance = [side["target_scores/probability/capital"].values for side in (first, last)]
    rank = [int(side["target_scores/rank/capital"].values) for side in (first, last)]
    assert f"P(target) capital {chance[0]:.3f} -> {chance[1]:.3f}" in text
    assert f"rank {rank[0]} -> {rank[1]}" in text
    mean = [side["token_loss/loss/capital"].values.mean() for side in (first, last)]
    assert f"Loss of capital, nats a token: {mean[0]:.2f} -> {mean[1]:.2f}; differs most: " in flat
    change = last["token_loss/change/capital"]
    at = int(np.abs(change.values).argmax())
    assert f"differs most: {change.labels['token'][at]!r} {change.values[at]:+.2f}" in flat
    changes = {m: last[f"logit_attribution/{m}_change/capital"].values for m in ("head", "mlp")}
    parts = {f"L{i}H{j}": value for (i, j), value in np.ndenumerate(changes["head"])}
    parts |= {f"L{i} MLP": value for (i,), value in np.ndenumerate(changes["mlp"])}
    most = max(parts, key=lambda name: abs(parts[name]))
    assert f"capital, B - A: {most} {parts[most]:+.3g}" in flat
    assert max(map(len, text.splitlines())) <= 72 and "\u00a0" not in text


def test_repeated_blocks_are_enough(saved):
    _, last = compared(saved, "a", "b", probes=[])
    assert "attention_drift/js" in last and "target_scores/rank/capital" not in last
    ids = Probe("ids", [1, 5, 6, 7])
    assert "token_loss/change/ids" in compared(saved, "a", "b", probes=[ids])[1]
