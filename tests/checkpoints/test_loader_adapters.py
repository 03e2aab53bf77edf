"""One adapter after another into the same model: each time as if it had been loaded afresh."""

import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tests.adapters import CONFIGS, llama, logits, lora, mostly_slow, plain, randomise
from tests.marks import exhaustive
from tlens_callback import Shadow
from tlens_callback.checkpoints import Checkpoint, Loader, checkpoints_in

# PEFT warns about many of the configurations; none of the warnings is ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

KINDS = (
    "lora",
    "lora rslora",
    "lora bias=lora_only",
    "lora bias=all",
    "lora rank and alpha patterns",
    "lora embed_tokens",
    "lora layer_replication",
    "lora target_parameters 2-D",
    "dora",
    "pissa",
    "olora",
    "kasa",
    "modules_to_save of many kinds",
    "modules_to_save around adapted modules",
    "trainable_token_indices",
    "trainable_tokens",
    "adalora",
    "loha",
    "oft",
    "ia3",
    "ln_tuning",
    "vera",
    "fourierft",
    "vblora",
    "shira",
    "osf",
    "tinylora",
)
ALIKE = {"lora rslora", "loha", "oft", "ia3", "vera", "shira", "osf", "tinylora"}
"""Whose adapter is some tensors of each layer, as plain LoRA's is."""
STARTS = {"fourierft": False, "vblora": False, "kasa": "changed", "lora layer_replication": "more"}
"""Whose untrained state is not the base: unknown, or known all the same."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    llama(bias=True).save_pretrained(folder)
    return folder


def fresh(base: Path):
    return AutoModelForCausalLM.from_pretrained(base)


def weights(model) -> dict[str, torch.Tensor]:
    """The plain model's, adapters merged."""
    return {name: p.detach().clone() for name, p in plain(model).named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def run(base: Path, folder: Path, config, steps=(1, 2, 3)):
    """An adapter saved as it moves; its weights at each step, 0 being the start."""
    torch.manual_seed(3)
    live = get_peft_model(fresh(base), config()).eval()
    known = {0: weights(live)}
    for step in steps:
        randomise(live, only_trainable=True)
        live.save_pretrained(folder / f"checkpoint-{step}")
        known[step] = weights(live)
    return live, known


@pytest.mark.slow
@pytest.mark.parametrize("name", exhaustive(mostly_slow(KINDS), ALIKE))
def test_in_any_order_nothing_stays_of_the_one_before(base, tmp_path, name):
    live, known = run(base, tmp_path, CONFIGS[name])
    checkpoints = {one.step: one for one in checkpoints_in(tmp_path)}
    loader = Loader(device="cpu")
    first = loader.untrained(checkpoints[1])
    start = STARTS.get(name, True)
    assert (first is not None) == bool(start)
    shadow = None
    if first is not None:
        model = loader.load(first)
        begun, plainly = weights(model), weights(fresh(base))
        close = all(torch.allclose(begun[n], known[0][n], atol=1e-6) for n in known[0])
        assert close and begun.keys() == known[0].keys()
        if start is True:
            assert all(torch.allclose(begun[n], plainly[n], atol=1e-6) for n in plainly)
        shadow = Shadow.of(model)
    order = [3, 1, 2, 1]
    random.Random(name).shuffle(order)
    for i, step in enumerate(order):
        assert loader.fits(checkpoints[step]) == (i > 0 or first is not None)
        model = loader.load(checkpoints[step])
        found = weights(model)
        again = PeftModel.from_pretrained(fresh(base), checkpoints[step].adapter, is_trainable=True)
        assert same(found, weights(again.eval()))
        assert same(found, known[step])
        assert not same(found, known[step % 3 + 1]), "control: another step is another model"
        if shadow is None:
            shadow = Shadow.of(model)
        shadow.sync()
        assert shadow.builds == 1
        for weight in shadow.mirror.weights():
            with shadow.layer(weight.layer):
                assert torch.equal(weight.value, found[weight.name])
    assert {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()} == {
        n: (p.requires_grad, p.dtype) for n, p in live.named_parameters()
    }
    assert not any(module.training for module in model.modules())


def rewrite(checkpoint: Checkpoint, **fields) -> None:
    file = Path(checkpoint.path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_may_differ_within_a_run(base, tmp_path):
    run(base, tmp_path, CONFIGS["lora"])
    one, two, three = checkpoints_in(tmp_path)
    loader = Loader(device="cpu")
    assert not loader.fits(one), "nothing is loaded"
    loader.load(one)
    targets = json.loads((Path(two.path) / "adapter_config.json").read_text())["target_modules"]
    rewrite(
        two,
        inference_mode=True,
        revision="main",
        peft_version="0.18",
        target_modules=targets[::-1],
        base_model_name_or_path=str(base / ".." / base.name),
    )
    assert loader.fits(Checkpoint.of(two.path))
    # A field that PEFT has since been given: its default.
    config = json.loads((Path(two.path) / "adapter_config.json").read_text())
    (Path(two.path) / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key != "use_dora"})
    )
    assert loader.fits(two)
    for other in ({"lora_alpha": 3}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}):
        shutil.copytree(three.path, tmp_path / "other")
        changed = Checkpoint.of(tmp_path / "other")
        assert loader.fits(changed), "control"
        rewrite(changed, **other)
        assert not loader.fits(changed)
        shutil.rmtree(tmp_path / "other")
    shutil.copytree(base, tmp_path / "other base")
    assert not loader.fits(Checkpoint.of(one.path, base=tmp_path / "other base"))
    assert not loader.fits(Checkpoint.of(base))
    loader.load(Checkpoint.of(base))
    assert not loader.fits(one) and not loader.fits(Checkpoint.of(base))


def test_ranks_that_shrink_begin_anew(base, tmp_path):
    """AdaLoRA drops ranks; its next checkpoint has other tensors."""
    run(base, tmp_path / "a", lora(r=4), steps=[1])
    run(base, tmp_path / "b", lora(r=2), steps=[2])
    (one,), (two,) = checkpoints_in(tmp_path / "a"), checkpoints_in(tmp_path / "b")
    rewrite(two, r=4)
    loader = Loader(device="cpu")
    loader.load(one)
    assert not loader.fits(two), "the configs are equal, the files are not"
    rewrite(two, r=2)
    assert not loader.fits(two)
    expected = weights(PeftModel.from_pretrained(fresh(base), two.adapter))
    assert same(weights(loader.load(two)), expected)


def test_a_failure_leaves_no_half_filled_model(base, tmp_path):
    _, known = run(base, tmp_path, CONFIGS["lora"])
    one, two, three = checkpoints_in(tmp_path)
    loader = Loader(device="cpu")
    loader.load(one)
    file = Path(two.path) / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is incomplete"):
        loader.load(two)
    assert same(weights(loader.load(three)), known[3])
    file.write_bytes(whole)
    assert same(weights(loader.load(two)), known[2])


def test_the_base_is_read_once(base, tmp_path, monkeypatch):
    run(base, tmp_path, CONFIGS["lora"])
    loader, reads = Loader(device="cpu"), []
    full = loader._load_full
    monkeypatch.setattr(loader, "_load_full", lambda place: reads.append(place) or full(place))
    checkpoints = checkpoints_in(tmp_path)
    model = loader.load(loader.untrained(checkpoints[0]))
    assert all(loader.load(one) is model for one in checkpoints)
    assert reads == [str(base)]


@pytest.mark.parametrize(
    "name, known", [("lora", True), ("vblora", False), ("lora init=False", False)]
)
def test_the_start_is_the_base_or_unknown(base, tmp_path, caplog, name, known):
    run(base, tmp_path, CONFIGS.get(name) or lora(init_lora_weights=False), steps=[1])
    (checkpoint,) = checkpoints_in(tmp_path)
    loader = Loader(device="cpu")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        first = loader.untrained(checkpoint)
    if known:
        assert torch.equal(logits(loader.load(first)), logits(fresh(base)))
        assert not caplog.messages
    else:
        assert first is None and "the model before training is not known" in caplog.text
        with pytest.raises(ValueError, match="random values that were not saved"):
            loader.load(checkpoint.before_training)
    assert loader.load(checkpoint) is not None
    assert loader.untrained(Checkpoint.of(base)) is None


def test_what_peft_does_not_save_is_said(tmp_path, caplog):
    for dtype, said in ((torch.float32, 0), (torch.bfloat16, 1)):
        base, folder = tmp_path / f"{dtype} base", tmp_path / str(dtype)
        llama(bias=True).to(dtype).save_pretrained(base)
        run(base, folder, CONFIGS["adalora"], steps=[1])
        caplog.clear()
        with caplog.at_level(logging.WARNING, "tlens_callback"):
            Loader(device="cpu").load(checkpoints_in(folder)[0])
        assert len([line for line in caplog.messages if "ranknum" in line]) == said
