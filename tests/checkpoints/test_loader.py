"""One saved model in memory: whole or not at all, as it was saved, and without a trace."""

import json
import random
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.adapters import logits, randomise
from tests.processes import python
from tlens_callback.checkpoints import Checkpoint, Loader

pytestmark = pytest.mark.usefixtures("one_thread")

LINEAR = ["q_proj", "v_proj", "down_proj"]


def write(folder: Path, family: str = "llama", dtype=torch.float32, **config) -> Path:
    tiny.model(family, **config).to(dtype).save_pretrained(folder)
    return folder


def adapt(base: Path, folder: Path, *, vocab: int | None = None, **settings):
    """A trained adapter, saved; and the live model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if vocab is not None:
        model.resize_token_embeddings(vocab)
    live = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": LINEAR, **settings}))
    randomise(live, only_trainable=True)
    live.save_pretrained(folder)
    return live.eval()


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def change(file: Path, **renamed) -> None:
    """Rewrites a file of weights: under another name, or (None) without them."""
    weights = load_file(file)
    for old, new in renamed.items():
        for name in [n for n in weights if old in n]:
            tensor = weights.pop(name)
            if new is not None:
                weights[name.replace(old, new)] = tensor
    save_file(weights, file, metadata={"format": "pt"})


def loaded(model, adapter=None, *, base=None, **settings):
    return Loader(device="cpu", **settings).load(Checkpoint.of(model, adapter, base=base))


def refused(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        loaded(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family, config", [("llama", {}), ("gpt2", {}), ("qwen2", {"tie": True})])
def test_a_full_model(tmp_path, family, config):
    config = {"tie_word_embeddings": True} if config else {}
    base = write(tmp_path / "base", family, **config)
    model = loaded(base)
    assert torch.equal(logits(model), logits(tiny.model(family, **config)))
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_precision(tmp_path):
    base = write(tmp_path / "base", dtype=torch.bfloat16)
    live = adapt(base, tmp_path / "adapter", modules_to_save=["lm_head"])

    def dtypes(model):
        return {(p.dtype, p.requires_grad) for p in model.parameters()}

    assert dtypes(loaded(base)) == {(torch.bfloat16, True)}
    assert dtypes(loaded(base, dtype=torch.float32)) == {(torch.float32, True)}
    model = loaded(tmp_path / "adapter", base=base)
    assert {n: (p.dtype, p.requires_grad) for n, p in model.named_parameters()} == {
        n: (p.dtype, p.requires_grad) for n, p in live.named_parameters()
    }
    both = {(torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, True)}
    assert dtypes(model) == both, "lm_head is trained in the precision of the base"
    wide = loaded(tmp_path / "adapter", base=base, dtype=torch.float32)
    assert dtypes(wide) == {(torch.float32, False), (torch.float32, True)}
    assert float((logits(wide) - logits(live.float())).abs().max()) == 0


def test_no_such_device():
    for device in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=device):
            Loader(device=device)


def test_missing_weights_are_not_made_up(tmp_path):
    base = write(tmp_path / "base")
    change(base / "model.safetensors", **{"model.norm": None})
    said = refused(base)
    assert "lacks 1 of the weights" in said and "model.norm.weight" in said
    change(base / "model.safetensors", **{"layers.1.mlp": "layers.7.mlp"})
    assert "lacks 4 of the weights" in refused(base)
    base = write(tmp_path / "other")
    rewrite(base / "config.json", hidden_size=64)
    assert str(base) in refused(base)


def test_no_causal_language_model(tmp_path):
    base = write(tmp_path / "base")
    rewrite(base / "config.json", model_type="no_such_model")
    assert "no_such_model" in refused(base)
    rewrite(base / "config.json", model_type="vit")
    said = refused(base)
    assert "ViTConfig" in said and len(said) < 600, "transformers lists every class there is"


def test_an_adapter_of_another_base(tmp_path):
    base, folder = write(tmp_path / "base"), tmp_path / "adapter"
    adapt(base, folder)
    assert loaded(folder), "control"
    others = {
        "narrow": ({"intermediate_size": 24}, "size mismatch"),
        "shallow": ({"num_hidden_layers": 1}, "no place there, such as .*layers.1"),
        "deep": ({"num_hidden_layers": 3}, "no tensor for .* places, such as .*layers.2"),
        "gpt2": ({"family": "gpt2"}, "q_proj"),
    }
    for name, (config, why) in others.items():
        family = config.pop("family", "llama")
        other = write(tmp_path / name, family, **config)
        with pytest.raises(ValueError, match=f"(?s)adapter.*{why}.*--base"):
            loaded(folder, base=other)


def test_every_tensor_has_a_place_and_every_place_a_tensor(tmp_path):
    base = write(tmp_path / "base")
    changes = {
        "lacks": ({"layers.0.self_attn.q_proj.lora_B": None}, "no tensor for 1 places"),
        "other": ({"layers.0.self_attn.q_proj": "layers.0.self_attn.k_proj"}, "no place there"),
        "saved": ({"lm_head": None}, "lm_head"),
    }
    for name, (renamed, why) in changes.items():
        adapt(base, tmp_path / name, modules_to_save=["lm_head"])
        assert loaded(tmp_path / name), "control"
        change(tmp_path / name / "adapter_model.safetensors", **renamed)
        assert why in refused(tmp_path / name)
    # PEFT itself takes the first with a warning, and what is too much without a word.
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lacks")
    adapt(base, tmp_path / "more")
    file = tmp_path / "more" / "adapter_model.safetensors"
    weights = load_file(file)
    weights["base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"] = torch.ones(4, 32)
    save_file(weights, file, metadata={"format": "pt"})
    assert "layers.9" in refused(tmp_path / "more")
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "more")


def test_a_config_that_peft_does_not_know(tmp_path):
    base = write(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / "adapter_config.json", peft_type="LATER")
    assert "LATER" in refused(tmp_path / "adapter")


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore:.init_lora_weights. is")
def test_adapters_whose_base_is_lost_are_refused(tmp_path, init):
    base = write(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=init)
    assert init in refused(tmp_path / "adapter")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_without_a_weight_are_refused_with_the_reason(tmp_path, kind):
    base = write(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3)).save_pretrained(
        tmp_path / "adapter"
    )
    said = refused(tmp_path / "adapter")
    assert "learned vectors" in said and "--base" not in said


@pytest.mark.parametrize("init", ["eva", "gaussian", "orthogonal"])
@pytest.mark.filterwarnings("ignore")
def test_ways_to_begin_that_the_base_survives(tmp_path, init):
    base = write(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    rewrite(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=init)
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    loader, checkpoint = Loader(device="cpu"), Checkpoint.of(tmp_path / "adapter")
    first = loader.untrained(checkpoint)
    assert first is not None
    begun = logits(loader.load(first))
    assert torch.allclose(begun, logits(tiny.model("llama")), atol=1e-5)
    assert torch.equal(logits(loader.load(checkpoint)), logits(expected))


def test_nothing_is_drawn_and_nothing_is_printed(tmp_path, capsys):
    base = write(tmp_path / "base")
    tiny.tokenizer().save_pretrained(base)
    adapt(base, tmp_path / "adapter")
    capsys.readouterr()

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())

    firsts = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = states()
        loader = Loader(device="cpu")
        checkpoint = Checkpoint.of(tmp_path / "adapter")
        model = loader.load(checkpoint.before_training)
        firsts.append({n: p.clone() for n, p in model.named_parameters() if "lora_" in n})
        loader.load(checkpoint)
        loader.load(Checkpoint.of(base))
        loader.load(checkpoint)
        loader.tokenizer(checkpoint)
        assert states() == before
    assert all(torch.equal(firsts[0][n], firsts[1][n]) for n in firsts[0])
    assert any(tensor.any() for tensor in firsts[0].values())
    out, err = capsys.readouterr()
    assert out == "" and "%|" not in err


def test_names_on_the_hub(tmp_path, monkeypatch):
    """From the Hub's cache, at a revision."""
    base = write(tmp_path / "base")
    live = adapt(base, tmp_path / "adapter")
    for variable in ("constants.HF_HUB_CACHE", "file_download.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(f"huggingface_hub.{variable}", str(tmp_path))
    for name in ("base", "adapter"):
        repository = tmp_path / f"models--crew--{name}"
        shutil.copytree(tmp_path / name, repository / "snapshots" / "0123")
        (repository / "refs").mkdir()
        (repository / "refs" / "v2").write_text("0123")
    with pytest.raises(ValueError, match=r"crew/adapter|revision|Hub"):
        Checkpoint.of("crew/adapter")
    model = loaded("crew/base@v2", "crew/adapter@v2")
    assert torch.equal(logits(model), logits(live))


FAR = """
import sys
import torch
from tests.instruments.pretend_device import DEVICE, Machine
from tlens_callback.checkpoints import Checkpoint, Loader

tokens = torch.arange(1, 9)[None]
checkpoint = Checkpoint.of(sys.argv[1])
near = Loader(device="cpu").load(checkpoint)(input_ids=tokens).logits
with Machine():
    loader = Loader(device=DEVICE)
    loader.load(loader.untrained(checkpoint))
    far = loader.load(checkpoint)
    tensors = [*far.parameters(), *far.buffers()]
    assert {tensor.device for tensor in tensors} == {DEVICE}
    assert not any(hasattr(module, "_hf_hook") for module in far.modules())
    found = far(input_ids=tokens.to(DEVICE)).logits.cpu()
assert float((found - near).abs().max()) < 1e-5
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this PyTorch has no devices written in Python",
)
def test_on_another_device(tmp_path):
    """A pretend one, in a process of its own."""
    base = write(tmp_path / "base")
    adapt(base, tmp_path / "adapter")
    command = [*python(), "-c", FAR, str(tmp_path / "adapter")]
    home = Path(__file__).parent.parent.parent
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_the_base_is_on_the_gpu_once(tmp_path):
    base = write(tmp_path / "base", hidden_size=1024, intermediate_size=4096)
    adapt(base, tmp_path / "adapter")
    loader, checkpoint = Loader(), Checkpoint.of(tmp_path / "adapter")
    state = torch.cuda.get_rng_state()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = loader.load(loader.untrained(checkpoint))
    loader.load(checkpoint)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before < 1.3 * held
    assert torch.equal(torch.cuda.get_rng_state(), state)
