"""Saved models for images and text are loaded whole, and looked at with text."""

import copy

import pytest
import torch
from click.testing import CliRunner

from tests import tiny, tiny_vision
from tests.shadow.test_shadow import lora
from tlens_callback import Shadow, read_store
from tlens_callback.checkpoints import Checkpoint, Loader
from tlens_callback.cli import main

TOKENS = torch.tensor([[1, 20, 21, 22, 23]])


@pytest.fixture(scope="module", params=["llava", pytest.param("gemma3", marks=pytest.mark.slow)])
def saved(request, tmp_path_factory):
    """A folder with a base and its adapter, and the logits of both."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_vision.model(request.param)
    model.save_pretrained(folder / "base")
    of = tiny_vision.processor() if request.param == "llava" else tiny.tokenizer()
    of.save_pretrained(folder / "base")
    adapted = lora(copy.deepcopy(model), target_modules=tiny_vision.LANGUAGE).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(folder / "base")
    adapted.save_pretrained(folder / "run" / "checkpoint-3")
    with torch.no_grad():
        return folder, [one(input_ids=TOKENS).logits for one in (model, adapted)]


def test_base_and_adapter_are_those_that_were_saved(saved):
    folder, logits = saved
    loader = Loader()
    for place, want in zip(("base", "run/checkpoint-3"), logits, strict=True):
        checkpoint = Checkpoint.of(folder / place)
        shadow = Shadow.of(loader.load(checkpoint))
        assert torch.allclose(shadow.logits(TOKENS), want, atol=1e-5)
        assert loader.tokenizer(checkpoint).chat_template
    assert not torch.allclose(*logits, atol=0.1)
    before = loader.untrained(Checkpoint.of(folder / "run/checkpoint-3"))
    assert torch.allclose(Shadow.of(loader.load(before)).logits(TOKENS), logits[0], atol=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        ["analyze", "run/checkpoint-3", "--chat", "--prompt", "what is the capital of Italy"],
        ["replay", "run", "--prompt", "the capital of France is"],
        ["ask", "run/checkpoint-3", "what is the capital of Italy", "--chat"],
    ],
    ids=lambda command: command[0],
)
def test_commands(saved, command, tmp_path):
    folder, _ = saved
    name, place, *rest = command
    args = [name, str(folder / place), *rest, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    if name != "ask":
        keys = read_store(tmp_path / "out").keys
        assert any(key.startswith("attention_patterns/") for key in keys)
