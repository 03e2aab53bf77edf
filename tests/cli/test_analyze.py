"""`tlens-callback analyze`, as a person or a script uses it."""

import os
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.saved import (
    SMALL_FILES,
    installed,
    probabilities,
    run,
    save_adapter,
    save_base,
    started,
)
from tests.sinks.wandb.wandb_file import history, records, run_file
from tlens_callback import read_store
from tlens_callback.checkpoints import loader

PROMPT = "the capital of France is"
# What the command line itself would do: nobody sees a library's deprecations there.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base) -> Path:
    return save_adapter(base, base.parent / "run" / "checkpoint-60")


@pytest.fixture
def nothing_loads(monkeypatch):
    """Whatever is said now is said before the model is loaded."""
    monkeypatch.setattr(loader.Loader, "load", lambda *_: pytest.fail("the model was loaded"))


@pytest.mark.slow
def test_an_adapter_gets_a_store_a_page_and_a_run_with_the_page(base, adapter, tmp_path):
    arguments = ["--prompt", PROMPT, "--target", " Paris", "--foil", " London", "--wandb", "mine"]
    done = installed("analyze", adapter, *arguments, "--out", "seen", cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    chance = probabilities(base, adapter, PROMPT)
    paris = tiny.tokenizer().convert_tokens_to_ids("\u0120Paris")
    rank = int((chance > chance[paris]).sum())
    name = "the-capital-of-france-is"
    assert f"tlens: {name}: P(' Paris') {chance[paris]:.3f}, rank {rank}\n" in done.stdout
    store = read_store(tmp_path / "seen")
    assert store.steps == (60,)
    probability = store.reading(f"target_scores/probability/{name}", 60).values
    assert float(probability) == pytest.approx(float(chance[paris]), rel=1e-4)
    assert store.reading("trainer/loss", 60).values.tolist() == [2.5, 2.0]
    assert store.reading("checkpoint/name", 60).texts == str(adapter)
    assert not [key for key in store.keys if "drift" in key or "frozen" in key]
    page = tmp_path / "seen" / "page.html"
    assert f"page {page}" in done.stdout
    assert "the shadow agrees with the model: max logit difference" in done.stdout
    assert not re.search("before the first step|of the run|Traceback", done.stdout + done.stderr)

    written = list(records(run_file(tmp_path)))
    (made,) = [one.run for one in written if one.WhichOneof("record_type") == "run"]
    config = {item.key: item.value_json for item in made.config.update}
    assert made.project == "mine"
    assert config["model"] == f'"{base}"' and config["adapter"] == f'"{adapter}"'
    assert PROMPT in config["probes"] and '" Paris"' in config["probes"]
    kept = [one.request.log_artifact.artifact for one in written if one.HasField("request")]
    kept += [one.artifact for one in written if one.HasField("artifact")]
    (kept,) = [one for one in kept if one.type == "tlens-page"]
    assert [(file.path, file.size) for file in kept.manifest.contents] == [
        ("page.html", page.stat().st_size)
    ]
    assert kept.name == "tlens-page-checkpoint-60"
    rows = history(run_file(tmp_path))
    assert {row["train/global_step"] for row in rows} == {60}
    assert any("tlens/fidelity/kl" in row for row in rows)
    assert not any("tlens/checkpoint/name" in row for row in rows)
    (ended,) = [one.exit for one in written if one.WhichOneof("record_type") == "exit"]
    assert ended.exit_code == 0


@pytest.mark.slow
def test_a_model_that_is_not_there(tmp_path):
    done = started("analyze", "no/such/model", "--prompt", PROMPT, "--wandb", "mine", cwd=tmp_path)
    assert done.returncode == 2
    assert "no/such/model" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full(base, tmp_path):
    done = started("analyze", base, "--prompt", PROMPT, cwd=tmp_path, first=SMALL_FILES)
    assert done.returncode == 1
    assert "File too large" in done.stderr and "Traceback" not in done.stderr


def test_each_analysis_begins_a_store_of_its_own(base, adapter, tmp_path):
    out = tmp_path / "seen"
    same = [[adapter], [base, "--adapter", adapter], [adapter, "--base", base]]
    for path, named in zip((out, tmp_path / "seen-2", tmp_path / "seen-3"), same, strict=True):
        done = run("analyze", *named, "-i", "HeadScores", "--out", out)
        assert done.exit_code == 0, done.output
        assert str(path / "page.html") in done.output
    before = read_store(tmp_path / "seen-3").readings(60)
    (tmp_path / "seen-3").rename(tmp_path / "seen-2-2")
    (tmp_path / "seen-2" / "manifest.json").unlink()
    (tmp_path / "seen-2").rename(tmp_path / "elsewhere")
    # A sink that is told seen-2 would go on with seen-2-2.
    done = run("analyze", adapter, "-i", "HeadScores", "--out", out)
    assert str(tmp_path / "seen-3" / "page.html") in done.output
    assert len(read_store(tmp_path / "seen-2-2").readings(60)) == len(before)


def test_a_full_model_is_at_step_0_and_says_what_it_would_write(base, tmp_path):
    done = run("analyze", base, "--prompt", PROMPT, "-i", "LogitLens", "--out", tmp_path / "seen")
    assert done.exit_code == 0, done.output
    assert f"tlens: {base}, at step 0: 1 probe and 0 repeated blocks" in done.output
    chance = probabilities(base, None, PROMPT)
    best = chance.topk(3)
    texts = [tiny.tokenizer().decode([i]) for i in best.indices.tolist()]
    said = [f"{text!r} {p:.3f}" for text, p in zip(texts, best.values.tolist(), strict=True)]
    assert f"tlens: the-capital-of-france-is: next {', '.join(said)}\n" in done.output
    assert read_store(tmp_path / "seen").steps == (0,)


def test_what_is_said_of_a_target_is_what_was_measured(base, tmp_path):
    rome = ["analyze", base, "--prompt", PROMPT, "--target", " Rome", "--no-repeats"]
    chance = probabilities(base, None, PROMPT)
    meant = tiny.tokenizer().convert_tokens_to_ids("\u0120Rome")
    rank = int((chance > chance[meant]).sum())
    for instrument in ("LogitLens", "TargetScores"):
        done = run(*rome, "-i", instrument, "--out", tmp_path / instrument)
        assert f"-is: P(' Rome') {chance[meant]:.3f}, rank {rank}\n" in done.output
    done = run(*rome, "-i", "TokenLoss", "--out", tmp_path / "loss")
    assert done.exit_code == 0 and "Rome" not in done.output


def test_by_default_nothing_is_asked_for_that_is_not_there(base, tmp_path):
    done = run("analyze", base, "--prompt", PROMPT, "--no-repeats", "--out", tmp_path / "seen")
    assert done.exit_code == 0, done.output
    left_out = re.findall("without ([a-z_]+)", done.output)
    assert set(left_out) <= {"head_scores", "virtual_heads", "repeat_loss"}, done.output
    same = ["-i", "fast", "--no-repeats", "--out", tmp_path / "same"]
    done = run("analyze", base, "--prompt", PROMPT, *same)
    assert done.exit_code == 0, done.output
    assert read_store(tmp_path / "same").keys == read_store(tmp_path / "seen").keys


def test_without_a_prompt_and_a_tokenizer_the_repeated_blocks_are_enough(tmp_path):
    model = save_base(tmp_path / "bare", tokenizer=False)
    done = run("analyze", model, "--out", tmp_path / "seen")
    assert done.exit_code == 0, done.output
    assert "tlens: no prompt is given, so the model sees random blocks only" in done.output
    assert read_store(tmp_path / "seen").reading("head_scores/induction", 0).values.shape == (2, 4)
    ids = tmp_path / "ids.jsonl"
    ids.write_text('{"name": "ids", "tokens": [1, 30, 31], "target": 40}\n')
    done = run("analyze", model, "--probes", ids, "--no-repeats", "--out", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert "tlens: ids: P('40') " in done.output


def test_a_text_needs_a_tokenizer(base, tmp_path, request):
    model = save_base(tmp_path / "bare", tokenizer=False)
    text = ["analyze", model, "--prompt", PROMPT, "-i", "LogitLens", "--out", tmp_path / "seen"]
    done = run(*text, "--tokenizer", base)
    assert done.exit_code == 0, done.output
    request.getfixturevalue("nothing_loads")
    done = run(*text)
    assert done.exit_code == 2 and "--tokenizer NAME" in done.output
    done = run(*text, "--tokenizer", tmp_path / "nowhere")
    assert done.exit_code == 2 and "nowhere" in done.output


def test_what_cannot_be_done_is_said_before_the_model_is_loaded(
    base, adapter, tmp_path, nothing_loads, monkeypatch
):
    def refused(*arguments):
        done = run("analyze", *arguments)
        assert done.exit_code == 2 and done.output.startswith("Error: "), done.output
        return done.output

    file = tmp_path / "file"
    file.write_text("mine")
    asked = [base, "--prompt", PROMPT]
    assert "is a file" in refused(*asked, "--out", file)
    assert "is a file" in refused(*asked, "--out", file / "seen")
    assert "HeadScores" in refused(*asked, "-i", "HeadScoers")
    assert "--prompt TEXT" in refused(base, "--no-repeats")
    assert "not an adapter" in refused(base, "--adapter", base)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission to write to" in refused(*asked, "--out", tmp_path / "new")
    assert file.read_text() == "mine" and not (tmp_path / "new").exists()


def test_an_adapter_of_another_base(adapter, tmp_path):
    other = save_base(tmp_path / "wide", hidden_size=64)
    done = run("analyze", adapter, "--base", other, "--out", tmp_path / "seen")
    assert done.exit_code == 2 and "base" in done.output, done.output
    assert not (tmp_path / "seen").exists()


def test_wandb_that_cannot_begin(base, tmp_path, nothing_loads, monkeypatch):
    import wandb

    def init(**settings):
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    done = run("analyze", base, "--out", tmp_path / "seen", "--wandb", "mine")
    assert done.exit_code == 2 and "WANDB_MODE=offline" in done.output
    assert "No API key" in done.output


def test_a_run_whose_look_fails_has_failed(base, offline, monkeypatch):
    import wandb

    monkeypatch.setattr(loader.Loader, "load", _broken)
    done = run("analyze", base, "--out", offline / "seen", "--wandb", "mine")
    assert done.exit_code == 2 and "no weights" in done.output
    wandb.teardown()  # its service writes the last of the file as it ends
    (ended,) = [one.exit for one in records(run_file(offline)) if one.HasField("exit")]
    assert ended.exit_code == 1


def _broken(*_):
    raise ValueError("no weights")
