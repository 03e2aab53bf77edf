"""What a user may name, what is found there, and what is said where nothing is."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny
from tlens_callback.checkpoints import Checkpoint, checkpoints_in, survey

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A base, an adapter over it, and a run of three adapters; read only."""
    home = tmp_path_factory.mktemp("saved")
    tiny.model("llama").save_pretrained(home / "base")
    live = get_peft_model(tiny.model("llama"), LoraConfig(target_modules=TARGETS))
    live.peft_config["default"].base_model_name_or_path = str(home / "base")
    live.save_pretrained(home / "adapter")
    for step in (100, 9, 20):
        shutil.copytree(home / "adapter", home / "run" / f"checkpoint-{step}")
        state = {"global_step": step, "log_history": [{"loss": step / 10, "step": step}]}
        (home / "run" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    return home


@pytest.fixture
def home(saved, tmp_path) -> Path:
    """A copy to break."""
    shutil.copytree(saved, tmp_path / "home")
    for config in (tmp_path / "home").rglob("adapter_config.json"):
        rewrite(config, base_model_name_or_path=str(tmp_path / "home" / "base"))
    return tmp_path / "home"


def rewrite(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(file: Path) -> None:
    """As an interrupted save leaves it."""
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def refused(*args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        Checkpoint.of(*args, **kwargs)
    return str(caught.value)


def test_a_model_an_adapter_and_both(saved):
    base, adapter = str(saved / "base"), str(saved / "adapter")
    assert Checkpoint.of(base) == Checkpoint(base)
    assert Checkpoint.of(adapter) == Checkpoint(base, adapter)
    assert Checkpoint.of(Path(base), Path(adapter)) == Checkpoint(base, adapter)
    assert Checkpoint.of(adapter, base=saved / "base") == Checkpoint(base, adapter)
    assert Checkpoint.of(adapter).path == adapter
    assert Checkpoint.of(base).path == base
    first = Checkpoint.of(adapter).before_training
    assert (first.model, first.adapter, first.trained) == (base, adapter, False)
    assert base in refused(base, adapter, base=base)


def test_home_is_spelled_with_a_tilde(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    assert Checkpoint.of("~/base").model == str(saved / "base")


def test_a_sharded_model(tmp_path):
    tiny.model("llama").save_pretrained(tmp_path / "m", max_shard_size="20KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 1
    assert Checkpoint.of(tmp_path / "m").model == str(tmp_path / "m")
    kept = shards[1].read_bytes()
    cut(shards[1])
    assert str(shards[1]) in refused(tmp_path / "m")
    shards[1].unlink()
    said = refused(tmp_path / "m")
    assert "model.safetensors.index.json" in said and shards[1].name in said
    shards[1].write_bytes(kept)
    assert Checkpoint.of(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json" in refused(tmp_path / "m")


def test_what_is_there_is_said(home):
    run = home / "run"
    said = refused(run)
    assert f"tlens-callback replay {run}" in said
    assert "checkpoint-9, checkpoint-20, checkpoint-100" in said
    (home / "empty").mkdir()
    assert "It is empty" in refused(home / "empty")
    (home / "empty" / "notes.txt").write_text("")
    assert "notes.txt" in refused(home / "empty")
    shutil.copytree(home / "adapter", home / "empty" / "policy")
    assert f"There is an adapter in {home / 'empty' / 'policy'}" in refused(home / "empty")
    file = home / "base" / "model.safetensors"
    assert "is a file" in refused(file)
    assert f"Directories with similar names: {home / 'base'}" in refused(home / "bsae")
    assert "similar names" not in refused(home / "zzzzzz")
    assert f"There is no {str(home / 'no')!r} either" in refused(home / "no" / "where" / "base")


def test_a_name_that_is_neither_here_nor_on_the_hub():
    """Without the network, in one line each."""
    for name in ("no-such-team/no-such-model", "no-such-team/no-such-model@v1", "a/b/c/d", "base"):
        said = refused(name)
        assert repr(name) in said and "Hub" in said
        assert "\n" not in said


def test_half_a_model(home):
    weights = home / "base" / "model.safetensors"
    cut(weights)
    assert str(weights) in refused(home / "base") and "incomplete" in refused(home / "base")
    weights.write_bytes(b"")
    assert str(weights) in refused(home / "base")
    weights.unlink()
    assert "no weights" in refused(home / "base")
    (home / "base" / "pytorch_model.bin").write_bytes(b"half")
    assert "pytorch_model.bin" in refused(home / "base")
    (home / "base" / "config.json").write_text('{"model_type": "lla')
    assert str(home / "base" / "config.json") in refused(home / "base")
    (home / "base" / "config.json").write_text("[]")
    assert str(home / "base" / "config.json") in refused(home / "base")


def test_half_an_adapter(home):
    adapter = home / "adapter"
    cut(adapter / "adapter_model.safetensors")
    assert str(adapter / "adapter_model.safetensors") in refused(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "adapter_config.json but no weights" in refused(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    assert "adapter_model.safetensors" in refused(adapter)
    (adapter / "adapter_config.json").write_text('{"peft_type": "LO')
    save_file({}, adapter / "adapter_model.safetensors")
    assert str(adapter / "adapter_config.json") in refused(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    assert "peft_type" in refused(adapter)
    assert "is not an adapter" in refused(home / "base", home / "base")


def test_an_adapter_in_pickle_format(home):
    file = home / "adapter" / "adapter_model.safetensors"
    torch.save(load_file(file), home / "adapter" / "adapter_model.bin")
    file.unlink()
    assert Checkpoint.of(home / "adapter").adapter
    cut(home / "adapter" / "adapter_model.bin")
    assert "adapter_model.bin" in refused(home / "adapter")


def test_a_base_that_has_moved(home, caplog):
    shutil.move(home / "base", home / "elsewhere")
    said = refused(home / "adapter")
    assert str(home / "base") in said and "--base" in said
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        moved = Checkpoint.of(home / "adapter", base=home / "elsewhere")
    assert moved.model == str(home / "elsewhere")
    (line,) = caplog.messages
    assert str(home / "base") in line and str(home / "elsewhere") in line
    caplog.clear()
    (home / "below").mkdir()
    shutil.move(home / "elsewhere", home / "below" / "base")
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        Checkpoint.of(home / "adapter", base=home / "below" / "base")
    assert not caplog.messages, "the directory that it is in has moved"
    for nothing in (None, ""):
        rewrite(home / "adapter" / "adapter_config.json", base_model_name_or_path=nothing)
        assert "--base" in refused(home / "adapter")


def test_an_adapter_over_an_adapter(home):
    shutil.copytree(home / "adapter", home / "second")
    rewrite(home / "second" / "adapter_config.json", base_model_name_or_path=str(home / "adapter"))
    assert "is itself an adapter" in refused(home / "second")


def test_a_quantised_model(home):
    rewrite(home / "base" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    for said in (refused(home / "base"), refused(home / "adapter")):
        assert "quantised (bitsandbytes)" in said and "\n" not in said


def test_steps(home, monkeypatch):
    base = str(home / "base")
    run = home / "run"

    def step(place):
        return Checkpoint(base, str(place)).step

    assert step(run / "checkpoint-20") == 20
    assert step(f"{run}/checkpoint-20/") == 20
    monkeypatch.chdir(run / "checkpoint-20")
    assert step(".") == 20
    os.symlink(run / "checkpoint-9", run / "best")
    assert step(run / "best") == 9
    os.symlink(home / "adapter", run / "checkpoint-7")
    assert step(run / "checkpoint-7") == 7
    assert step(home / "adapter") is None
    shutil.copy(run / "checkpoint-100" / "trainer_state.json", home / "adapter")
    assert step(home / "adapter") == 100
    assert step(home / "checkpoint-tmp") is None


def test_what_was_logged(home, caplog):
    one = Checkpoint.of(home / "run" / "checkpoint-20")
    assert one.logged == [{"loss": 2.0, "step": 20}]
    state = Path(one.path) / "trainer_state.json"
    state.write_text('{"log_history": [{"loss": NaN, "step": 20}]}')
    assert one.logged[0]["loss"] != one.logged[0]["loss"]
    assert one.step == 20
    state.write_text('{"log_history": null}')
    assert one.logged == []
    state.unlink()
    assert one.logged == [] and not caplog.messages
    state.write_text('{"log_history": [{"loss"')
    with caplog.at_level(logging.WARNING, "tlens_callback"):
        assert one.logged == []
    assert str(state) in caplog.text


def test_a_run_in_the_order_of_its_steps(home):
    (home / "run" / "checkpoint-tmp").mkdir()
    (home / "run" / "checkpoint-5").write_text("a file")
    (home / "run" / "checkpoint-٣").mkdir()
    found = checkpoints_in(home / "run")
    assert [one.step for one in found] == [9, 20, 100]
    assert {one.model for one in found} == {str(home / "base")}
    elsewhere = shutil.copytree(home / "base", home / "b" / "base")
    assert {one.model for one in checkpoints_in(home / "run", base=elsewhere)} == {str(elsewhere)}


def test_half_a_checkpoint_is_left_out_with_the_reason(home):
    half = home / "run" / "checkpoint-20"
    cut(half / "adapter_model.safetensors")
    (home / "run" / "checkpoint-200").mkdir()
    whole, left_out = survey(home / "run")
    assert [one.step for one in whole] == [9, 100]
    assert list(left_out) == [half, home / "run" / "checkpoint-200"]
    assert "adapter_model.safetensors" in left_out[half]
    assert "empty" in left_out[home / "run" / "checkpoint-200"]
    assert checkpoints_in(home / "run") == whole


def test_no_run(home):
    for run, why in (
        (home / "nowhere", "does not exist"),
        (home / "base" / "config.json", "is a file"),
        (home / "base", "no checkpoint-<step>.*config.json"),
    ):
        with pytest.raises(ValueError, match=why):
            checkpoints_in(run)
    (home / "begun" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"None of the checkpoints can be loaded.*empty"):
        checkpoints_in(home / "begun")


def test_names_on_the_hub(saved, tmp_path, monkeypatch):
    """From the Hub's cache; an adapter is one where the repository has no config.json."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, source in (("base", "base"), ("adapter", "adapter")):
        repository = tmp_path / f"models--team--{name}"
        for revision in ("main", "v2"):
            shutil.copytree(saved / source, repository / "snapshots" / f"{revision}0")
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / revision).write_text(f"{revision}0")
            if source == "adapter":
                rewrite(
                    repository / "snapshots" / f"{revision}0" / "adapter_config.json",
                    base_model_name_or_path="team/base",
                    revision="v2",
                )
    assert Checkpoint.of("team/base") == Checkpoint("team/base")
    assert Checkpoint.of("team/base@v2") == Checkpoint("team/base@v2")
    assert Checkpoint.of("team/adapter") == Checkpoint("team/base@v2", "team/adapter")
    over = Checkpoint.of("team/base", "team/adapter@v2")
    assert over == Checkpoint("team/base", "team/adapter@v2") and over.step is None
    (tmp_path / "models--team--nothing").mkdir()
    assert "not a saved model" in refused("team/nothing")


def test_the_adapter_of_the_fixture_is_one(saved):
    """Control: PEFT itself takes it."""
    PeftModel.from_pretrained(tiny.model("llama"), saved / "adapter")
