"""`tlens-callback compare` as a person uses it."""

import re

import pytest
from click.testing import CliRunner

from tests import browser, tiny
from tests.offline.two_models import DOG, adapter, fine_tune, save, watched
from tests.processes import run_command
from tlens_callback import read_store
from tlens_callback.cli import main
from tlens_callback.store.format import arrays_file

ASKED = ["--prompt", DOG.content, "--target", DOG.target, "--foil", DOG.foil]


def run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    base = save(tiny.model("llama"), folder / "base")
    found = {"base": base, "adapter": adapter(folder / "adapter", base, 3)}
    found |= {name: fine_tune(folder / name, seed) for name, seed in (("a", 1), ("b", 2))}
    for name in "ab":
        found[f"run {name}"] = folder / f"run-{name}"
        watched(found[f"run {name}"] / "tlens", {0: base, 4: found[name]})
    return found


def numbers(text):
    """The text without the names and the address of the page."""
    return [
        line for line in text.splitlines() if not line.startswith(("A:", "B:", "Page:", "tlens:"))
    ]


@pytest.mark.slow
def test_the_real_entry_point_with_models(saved, tmp_path):
    out = tmp_path / "out"
    done = run_command("compare", "base", "adapter", *ASKED, "--out", out, cwd=saved["base"].parent)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "A: base" in lines and "B: adapter" in lines
    assert any(line.startswith("Attention moved most: L") for line in lines)
    assert any(line.startswith("Roles gained: ") for line in lines)
    store = read_store(tmp_path / "out")
    assert store.steps == (0, 1)
    names = [str(store.reading("checkpoint/name", step).texts) for step in (0, 1)]
    assert names == ["base", "adapter"]
    assert (tmp_path / "out" / "page.html").exists()
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_adapter_alone_is_compared_with_its_base(saved, tmp_path):
    alone = run(saved["adapter"], *ASKED, "--out", tmp_path / "alone")
    both = run(saved["base"], saved["adapter"], *ASKED, "--out", tmp_path / "both")
    assert alone.exit_code == both.exit_code == 0
    assert numbers(alone.stdout) == numbers(both.stdout) and len(numbers(both.stdout)) > 4
    assert f"A: {saved['base']}\nB: {saved['adapter']}\n" in alone.stdout
    refused = run(saved["a"], *ASKED)
    assert refused.exit_code == 2 and "Give two models" in refused.stderr


@pytest.mark.slow
def test_the_real_entry_point_with_runs(saved, tmp_path):
    done = run_command("compare", saved["run a"], saved["run b"], "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"A: {saved['run a'] / 'tlens'}, step 4" in done.stdout
    again = run(saved["run a"] / "tlens", saved["run b"], "--out", tmp_path / "again", "--step", 4)
    assert again.exit_code == 0 and numbers(again.stdout) == numbers(done.stdout)


def test_what_is_left_out_is_said(saved, tmp_path):
    less = watched(tmp_path / "less", {0: saved["a"]}, [DOG], repeats=False)
    result = run(saved["run a"], less, "--out", tmp_path / "out")
    assert result.exit_code == 3
    assert (
        "Left out: Only A has the probe 'capital', the probe 'repeat-24-0', head_scores"
        in result.stderr
    )
    assert "P(target) dog" in result.stdout and "capital" not in result.stdout
    # One model in two batches: what differs is rounding, of which nothing is said.
    assert "Attention has not moved" in result.stdout
    assert "most:" not in result.stdout and "B - A" not in result.stdout
    assert "nats a token: " in result.stdout and " in both" in result.stdout
    assert "Stores do not record the targets and foils" in result.stderr
    assert read_store(tmp_path / "out").steps == (0, 1)


def test_a_torn_step_is_said(saved, tmp_path):
    torn = watched(tmp_path / "torn", {0: saved["base"], 4: saved["b"], 9: saved["a"]})
    arrays_file(torn, 9).write_bytes(b"cut")
    result = run(saved["run a"], torn, "--out", tmp_path / "out")
    assert result.exit_code == 3 and f"incomplete steps [9] of {torn}" in result.stderr
    assert f"B: {torn}, step 4" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["base", "run a"], "is a model and .* is a store"),
        (["run a", "b", *ASKED], "is a store and .* is a model"),
        (
            ["run a", "run b", *ASKED],
            "--prompt, --target, --foil can only be used to compare models",
        ),
        (
            ["run a", "run b", "--probes", "x.yaml", "-i", "LogitLens"],
            "--probes, --instruments can only",
        ),
        (["run a", "missing"], "There is no directory 'missing'"),
        (["run a", "run b", "--base", "x"], "--base can only be used to compare models"),
        (["run a", "run b", "--step", "3"], r"Step 3 is not in both: .* have \[0, 4\] in common"),
        (["a", "b", "--step", "4", *ASKED], "--step can only be used to compare two stores"),
        (["a", "nothing", *ASKED], "nothing"),
        (["a", "b", "--no-repeats"], "nothing to show"),
        (["a", "b", "--device", "nowhere"], "nowhere"),
        ([], "Missing argument 'A'"),
    ],
)
def test_what_cannot_be_done(saved, tmp_path, arguments, said):
    out = tmp_path / "out"
    result = run(*(saved.get(each, each) for each in arguments), "--out", out)
    assert result.exit_code == 2, result.output
    assert re.search(said, " ".join(result.stderr.split()))
    assert not out.exists()


def test_models_of_another_shape_leave_nothing_behind(saved, tmp_path):
    other = save(tiny.model("llama", num_hidden_layers=3), tmp_path / "deeper")
    result = run(saved["a"], other, *ASKED, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "different shapes" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_store_is_not_overwritten(saved, tmp_path):
    for _ in range(2):
        result = run(saved["run a"], saved["run b"], "--out", tmp_path / "out")
        assert result.exit_code == 0
    assert "out-2/page.html#step=1&other=0&head=" in result.stdout
    assert [len(read_store(tmp_path / name).steps) for name in ("out", "out-2")] == [2, 2]


@browser.needs_browser()
def test_the_address_opens_on_the_comparison(saved, tmp_path):
    result = run(saved["run a"], saved["run b"], "--out", tmp_path / "out")
    address = re.search(r"^Page: (\S+)$", result.stdout, re.MULTILINE)[1]
    layer, head = map(int, address.rpartition("head=")[2].split("."))
    assert f"Attention moved most: L{layer}H{head} " in result.stdout
    with browser.opened(address) as (page, faults):
        page.wait_for_selector("#other")
        state = "[tlens.state.step, tlens.state.other, tlens.state.layer, tlens.state.head]"
        assert page.evaluate(state) == [1, 0, layer, head]
        assert page.input_value("#other") == "0"
        assert not faults


def test_help_shows_an_example():
    assert "tlens-callback compare first-run second-run" in run("--help").output
