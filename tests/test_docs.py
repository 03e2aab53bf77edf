"""What the README and the docstrings say is so."""

import ast
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

import tlens_callback
from tests import tiny
from tests.instruments.common import adapted
from tests.processes import python
from tlens_callback import ProbeBatch, instruments, observe
from tlens_callback.cli import main
from tlens_callback.instruments import fast
from tlens_callback.probes.builtin import repeated_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readmes_training_runs(tmp_path, monkeypatch, capsys):
    """The first block and the ones on reading the store and on doing without a trainer, on a tiny
    model in the place of the one named."""
    path = tmp_path / "model"
    tiny.model("llama", max_position_embeddings=128).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    monkeypatch.chdir(tmp_path)
    training, *_ = BLOCKS
    assert '"HuggingFaceTB/SmolLM2-135M-Instruct"' in training and 'report_to="wandb"' in training
    training = training.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', f'"{path}"').replace(
        'output_dir="out", report_to="wandb"',
        'output_dir="out", max_steps=3, logging_steps=1, use_cpu=True, bf16=False, '
        'save_strategy="no"',
    )
    rows = ["the capital of France is Paris", "the cat sat on the mat"] * 8
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_dict({"text": rows}))
    names: dict = {}
    exec(training, names)
    assert "local store" in capsys.readouterr().out
    model = tiny.model("llama")
    batch = {"input_ids": tiny.tokenizer()(rows[:1], return_tensors="pt")["input_ids"]}
    names |= {
        "model": model,
        "tokenizer": tiny.tokenizer(),
        "probes": [tlens_callback.Probe("capital", rows[0])],
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": [{**batch, "labels": batch["input_ids"]}] * 3,
    }
    for block in BLOCKS:
        if "read_store" in block or "ProbeBatch" in block or "with Tracer" in block:
            # In the place of the demo's run the one that was made here.
            exec(block.replace("runs/demo", "out").replace("/france", "/capital"), names)
    assert names["values"].shape[1:] == (2, 4) and names["losses"].ndim == 1
    assert names["reading"].labels["key"][-1] == " is"
    assert {reading.instrument for reading in names["readings"]} == {"head_scores"}
    assert tlens_callback.read_store("out/tlens-2").curve("trainer/loss")[0].tolist() == [1, 2, 3]


def test_the_readmes_probes_are_read(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (tmp_path / "probes.yaml").write_text(block)
    probes = tlens_callback.read_probes(tmp_path / "probes.yaml")
    assert [probe.name for probe in probes][:2] == ["france", "france-corrupt"]
    assert len(probes) == 5 and probes[0].target == " Paris" and probes[-1].times == 3


def test_the_readmes_commands_are_commands():
    lines = re.findall(r"^tlens-callback .*$", README, flags=re.MULTILINE)
    for line in [
        *lines,
        "tlens-callback analyze out --wandb PROJECT",
        "tlens-callback replay out -i fast",
    ]:
        _, name, *arguments = shlex.split(line, comments=True)
        main.commands[name].make_context(name, arguments)
    assert {line.split()[1] for line in lines} == set(main.commands) - {"workspace"}


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_python_in_the_readme_is_formatted_python(block):
    ast.parse(block)
    for imported in ast.walk(ast.parse(block)):
        if isinstance(imported, ast.ImportFrom) and imported.module == "tlens_callback":
            assert all(hasattr(tlens_callback, name.name) for name in imported.names)


def test_the_readmes_instrument_is_the_examples():
    block = next(block for block in BLOCKS if "class AttentionEntropy" in block)
    body = block[block.index("@dataclass") :].strip()
    assert body in (ROOT / "examples" / "custom_instrument.py").read_text()
    assert len(body.splitlines()) < 40


def test_the_readmes_keys_are_emitted():
    named = set(re.findall(r"`((?:\w+)/\w+(?:/<probe>)?)`", README))
    named = {key for key in named if key.split("/")[0] in {i.name for i in fast()}}
    shadow = adapted("llama")
    probes = [tlens_callback.Probe("p", "the capital of France is", target=" Paris", foil=" Rome")]
    batch = ProbeBatch.encode(
        probes + repeated_blocks(64), tiny.tokenizer(), vocab_size=shadow.vocab_size
    )
    emitted = {
        f"{r.instrument}/{r.measure}" + ("/<probe>" if r.probe else "")
        for r in observe(shadow, batch, fast())
    }
    assert named and named <= emitted


def test_the_readme_names_every_instrument():
    for exported in instruments.__all__:
        assert f"`{exported}(" in README or f"`{exported}`" in README, exported


def test_the_instruments_page_is_what_the_docstrings_say():
    """Their keys are held against what is emitted in tests/instruments/test_contract.py."""
    made = runpy.run_path(str(ROOT / "scripts" / "instruments_page.py"))
    assert made["PAGE"].read_text() == made["page"](), "run scripts/instruments_page.py"
    for exported in instruments.__all__:
        if exported != "fast":
            assert f"\n## {exported}\n" in made["page"]()


def test_the_readme_names_only_files_that_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`(scripts/\w+)`", README):
        assert (ROOT / path).exists() or (ROOT / f"{path}.py").exists(), path


def test_every_public_name_has_a_docstring():
    for name in tlens_callback.__all__:
        assert inspect.getdoc(getattr(tlens_callback, name)), name


CHECK = """
import logging, sys, warnings
import transformers, trl, peft, accelerate, datasets, pandas
transformers.logging.get_verbosity()
before = set(sys.modules)
def settings():
    levels = {name: logging.getLogger(name).level for name in ("", "transformers", "trl", "peft")}
    return levels, [str(f) for f in warnings.filters]
found = settings()
from tlens_callback import *
assert settings() == found, (settings(), found)
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(sorted(new & {"wandb", "plotly", "matplotlib", "trackio", "tensorboard"}))
"""


@pytest.mark.slow
def test_importing_the_package_brings_in_no_back_end_and_changes_no_setting():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_readmes_cost_table_has_the_rows_of_the_script():
    script = (ROOT / "scripts" / "measure_overhead.py").read_text()
    table = README[README.index("| smollm2-135m") : README.index("(b) computes the logits")]
    rows = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert len(rows) >= 12
    assert all(f'"{row}"' in script or f'    {row}"' in script for row in rows)


def printed(script: str, *arguments: str) -> str:
    command = [*python(), str(ROOT / "scripts" / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_cost_of_weights_by_the_layer_is_measured():
    said = printed("measure_streamed.py", "--shapes", "tiny", "--rounds", "1")
    rows = [line.strip("| ").split(" | ") for line in said.splitlines() if " ms | " in line]
    held = {row[0]: float(row[4].removesuffix(" MiB")) for row in rows}
    assert held["float32, streamed"] == pytest.approx(held["float32, resident"] / 2, abs=0.06)
    assert all(0 < float(row[-1]) < 1e-2 for row in rows)


@pytest.mark.slow
def test_the_cost_of_every_fast_instrument_is_measured():
    said = printed("measure_instruments.py", "--shape", "tiny", "--rounds", "1", "--slow")
    lines = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")]
    columns, *rows = [[cell.strip() for cell in line] for line in lines]
    cost = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    for instrument in fast():
        of = cost[type(instrument).__name__]
        assert float(of["ms"]) >= 0 and int(of["kernels"].replace(",", "")) > 0
        assert of["forwards"].startswith("0.00"), "no forward of its own"
    assert not cost["HeadAblation"]["forwards"].startswith("0.00")
    assert "times the bare forward" in said
