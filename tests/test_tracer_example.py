"""The example of a loop of one's own, as its docstring says, on a model small enough for it."""

import os
import runpy
import subprocess
from pathlib import Path

import numpy as np
import pytest
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.processes import python
from tests.sinks.wandb.wandb_file import history, run_file
from tlens_callback import read_store

FOLDER = Path(__file__).parent.parent / "examples"
SCRIPT = FOLDER / "accelerate_loop.py"


@pytest.fixture
def small(tmp_path) -> str:
    """Path of a tiny chat model."""
    path = tmp_path / "model"
    tiny.model("llama", max_position_embeddings=128).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def run(tmp_path: Path, *arguments: str) -> str:
    """What it prints, as a process of its own: accelerate's state is one for a process."""
    done = subprocess.run(
        [*python(), str(SCRIPT), *arguments],
        cwd=tmp_path,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_it_learns_is_watched_and_says_where_the_page_is(small, tmp_path):
    said = run(tmp_path, "--model", small, "--steps", "5", "--every", "2")
    path = tmp_path / "runs" / "accelerate_loop" / "tlens"
    store = read_store(path)
    assert store.steps == (0, 1, 2, 4, 5)
    steps, values = store.curve("target_scores/probability/france")
    assert list(steps) == [0, 2, 4, 5] and values[0] != values[-1]
    losses = np.concatenate([store.reading("trainer/loss", step).values for step in (2, 4, 5)])
    assert losses.shape == (5,) and losses[-1] < losses[0]
    assert f"page {path / 'page.html'}" in said and (path / "page.html").exists()
    assert "france" in said.splitlines()[-4]


@pytest.mark.slow
def test_it_joins_a_tracker_s_wandb_run(small, tmp_path):
    """And neither's rows displace the other's, observed at each step."""
    said = run(tmp_path, "--model", small, "--steps", "3", "--every", "1", "--wandb")
    assert list(tmp_path.glob("wandb/latest-run/files/media/images/**/*.png")) and "W&B" in said
    rows = history(run_file(tmp_path))
    for key, steps in {
        "train/loss": [1, 2, 3],
        "tlens/target_scores/probability/france": [0, 1, 2, 3],
    }.items():
        assert [row["train/global_step"] for row in rows if key in row] == steps


def test_its_rows_are_those_that_trl_trains_on(small, tmp_path, monkeypatch):
    """The trainer of `sft_lora.py` with the same data: the same tokens, the same part learned."""
    monkeypatch.syspath_prepend(str(FOLDER))
    names = runpy.run_path(str(SCRIPT))
    trainer = SFTTrainer(
        small,
        args=SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False),
        train_dataset=names["training_data"](),
        processing_class=tiny.tokenizer(),
    )
    rows = names["tokenized"](tiny.tokenizer())
    assert len(rows) == len(trainer.train_dataset) > 200
    for own, theirs in zip(rows[:20], trainer.train_dataset, strict=False):
        assert own["input_ids"].tolist() == list(theirs["input_ids"])
        assert own["labels"].tolist() == list(theirs["labels"])
        assert 0 < (own["labels"] == names["IGNORED"]).sum() < len(own["labels"])
    batch = names["collate"](rows[:3])
    real = [len(row["input_ids"]) for row in rows[:3]]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(real))
    for row, length in enumerate(real):
        assert (batch["labels"][row, length:] == names["IGNORED"]).all()
