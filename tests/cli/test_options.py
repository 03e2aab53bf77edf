"""The options that several commands share: what they make, and what they refuse in one line."""

import subprocess
import sys
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner

from tests import tiny
from tests.processes import run_command
from tests.sae import layouts
from tlens_callback import (
    ActivationPatching,
    Contrast,
    HeadAblation,
    LogitLens,
    Probe,
    ProbeBatch,
    SparseFeatures,
    fast,
    instruments,
    load_sae,
)
from tlens_callback.cli import main
from tlens_callback.cli.options import (
    model_options,
    parse_instrument,
    parse_instruments,
    prompt_probes,
    settings_and_loader,
)

FILE = """\
- name: capital
  text: the capital of France is
  target: " Paris"
  corrupt: the capital of Italy is
- name: the-cat
  text: the cat sat on the mat
"""


@click.command()
@model_options
def command(**options):
    """Any command that looks."""
    command.got = settings_and_loader(**options)  # type: ignore[attr-defined]


def ask(*words):
    """What the words of a command line come to."""
    CliRunner().invoke(command, list(words), catch_exceptions=False, standalone_mode=False)
    return command.got  # type: ignore[attr-defined]


@pytest.fixture
def probes_file(tmp_path):
    path = tmp_path / "probes.yaml"
    path.write_text(FILE)
    return str(path)


def test_prompts_become_probes():
    arguments, _ = ask(
        "--prompt", "The capital of France is", "--prompt", "the capital of France is"
    )
    assert arguments.probes == [
        Probe("the-capital-of-france-is", "The capital of France is"),
        Probe("the-capital-of-france-is-2", "the capital of France is"),
    ]
    arguments, _ = ask("--chat", "--prompt", "Who?", "--target", "Me", "--foil", "You")
    said = [{"role": "user", "content": "Who?"}]
    assert arguments.probes == [Probe("who", said, target="Me", foil="You")]


def test_a_file_of_probes_comes_after_the_prompts(probes_file):
    arguments, _ = ask("--probes", probes_file, "--prompt", "The cat", "--target", " sat")
    names = [probe.name for probe in arguments.probes or ()]
    assert names == ["the-cat-2", "capital", "capital-corrupt", "the-cat"]
    assert [probe.target for probe in arguments.probes or ()] == [" sat", " Paris", None, None]


def test_without_prompts_repeated_blocks_are_shown_alone():
    arguments, _ = ask()
    assert arguments.probes == [] and arguments.repeats
    assert [type(one) for one in arguments.instruments] == [type(one) for one in fast()]
    for words in (["--no-repeats"], ["-i", "LogitLens"]):
        with pytest.raises(ValueError, match="nothing to show the model: give --prompt"):
            ask(*words)
    assert not ask("--no-repeats", "--prompt", "a")[0].repeats


def test_device_and_dtype_are_the_loaders():
    _, loader = ask("--device", "cpu", "--dtype", "bfloat16")
    assert (loader.device, loader.dtype) == (torch.device("cpu"), torch.bfloat16)
    assert ask()[1].dtype is None


def test_fast_stands_for_the_default_ones():
    arguments, _ = ask("-i", "fast", "-i", "HeadAblation(every=3)", "-i", "ActivationPatching")
    *default, ablation, patching = arguments.instruments
    assert default == fast() and all(getattr(one, "optional", False) for one in default)
    assert ablation == HeadAblation(every=3) and patching == ActivationPatching()
    assert not hasattr(ablation, "optional"), "what is asked for by name is not left out"
    assert parse_instruments([" fast() "]) == fast()


def test_instruments_are_made_as_in_python(tmp_path):
    assert parse_instrument("LogitLens") == parse_instrument(" LogitLens() ") == LogitLens()
    assert parse_instrument("LogitLens(k=3, name='three')") == LogitLens(k=3, name="three")
    texts: dict[str, Any] = dict(having=["a", "b", "c", "d"], without=["e", "f", "g", "h"])
    assert parse_instrument(f"Contrast({texts['having']}, without={texts['without']})") == Contrast(
        **texts
    )
    config = {"num_latents": layouts.N, "k": 5, "d_in": layouts.D_IN, "activation": "topk"}
    path = layouts.sparsify(tmp_path / "layers.1", config, layouts.weights())
    expected = SparseFeatures(load_sae(path), k=4)
    for text in (f"SparseFeatures('{path}', k=4)", f"SparseFeatures(sae='{path}', k=4)"):
        got = parse_instrument(text)
        assert isinstance(got, SparseFeatures) and got.k == 4
        assert torch.equal(got.sae.W_enc, expected.sae.W_enc) and got.sae.hook == expected.sae.hook


@pytest.mark.parametrize(
    "text, says",
    [
        (
            "Zebra",
            r"no instrument 'Zebra'\. The instruments are: ActivationDrift, .*, fast\.$",
        ),
        ("head_scores", r"no instrument 'head_scores'\. Did you mean HeadScores"),
        ("logitlens(k=3)", r"Did you mean LogitLens\?"),
        ("HeadScore", "Did you mean HeadScores"),
        ("fsat", r"Did you mean fast\?"),
        ("fast(3)", "fast.. takes 0 positional arguments"),
        ("LogitLens, HeadScores", "neither a name nor a call.*repeat the option"),
        ("LogitLens(k=10", "neither a name nor a call"),
        ("LogitLens(k=range(3))", "plain values"),
        ("__import__('os').system('true')", "neither a name nor a call"),
        ("", "neither a name"),
        ("LogitLens(x=3)", r"'LogitLens\(x=3\)'.*unexpected keyword argument 'x'"),
        ("LogitLens(k='a')", r"'LogitLens\(k='a'\)'|\(k='a'\)"),
        ("LogitLens(k=0)", r"LogitLens\(k=0\)"),
        ("SparseFeatures", "missing 1 required positional argument: 'sae'"),
        ("SparseFeatures('nowhere')", "nowhere is not the directory of one autoencoder"),
        ("SparseFeatures(3)", "takes an Autoencoder or its directory, got 3"),
    ],
)
def test_an_instrument_that_is_none_is_named(text, says):
    with pytest.raises((ValueError, TypeError), match=says) as raised:
        parse_instrument(text)
    assert "\n" not in str(raised.value)


def test_two_instruments_of_one_name_are_named():
    with pytest.raises(ValueError, match="The name 'logit_lens' is used twice; give one"):
        ask("-i", "fast", "-i", "LogitLens(k=3)")
    assert len(ask("-i", "fast", "-i", "LogitLens(name='three')")[0].instruments) == 17


def test_every_instrument_can_be_named():
    needs = {"Contrast", "SparseFeatures", "TrainedFeatures"}
    for name in set(instruments.__all__) - needs - {"fast"}:
        assert parse_instrument(name).name


WRONG = [
    (["--target", " Paris"], "exactly one --prompt"),
    (["--prompt", "a", "--prompt", "b", "--target", " c"], "exactly one --prompt"),
    (["--prompt", "a", "--foil", " c"], "--foil is the token that --target is compared with"),
    (["--prompt", " "], "prompt ' ' is empty"),
    (["--probes", "nowhere.yaml"], "no file of probes nowhere.yaml"),
    (["--device", "cuda:99"], "cuda"),
    (["--device", "gpu"], "Expected one of cpu, cuda"),
    (["--dtype", "int8"], "'int8' is not one of 'float32'"),
    (["--prompt", "a", "-i", "LogitLen"], "no instrument 'LogitLen'. Did you mean LogitLens"),
]


@pytest.mark.parametrize("words, says", WRONG, ids=lambda value: str(value)[:30])
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is_loaded(
    tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)

    def loads(*args, **kwargs):
        raise AssertionError("loaded")

    monkeypatch.setattr("tlens_callback.checkpoints.Loader.load", loads)
    model = tmp_path / "model"
    tiny.model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    result = CliRunner().invoke(main, ["analyze", str(model), *words])
    assert result.exit_code == 2, result.output
    assert says in result.stderr and result.stdout == ""
    assert result.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert not (tmp_path / "tlens").exists()
    # What is right gets as far as to load.
    with pytest.raises(AssertionError, match="loaded"):
        CliRunner().invoke(main, ["analyze", str(model), "--prompt", "a"], catch_exceptions=False)


@pytest.mark.slow
def test_the_real_command_says_it_in_one_line(tmp_path):
    model = tmp_path / "model"
    tiny.model("llama").save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    done = run_command("analyze", model, "--device", "cuda:99", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1


def test_what_is_said_of_a_target_names_the_prompts_probe(tmp_path, caplog):
    def encoded(target):
        probes = prompt_probes(["the capital of France is"], chat=False, target=target, foil=None)
        return ProbeBatch.encode(probes, tiny.tokenizer(), vocab_size=tiny.VOCAB)

    with pytest.raises(ValueError, match="target '' of probe 'the-capital-of-france-is'"):
        encoded("")
    assert not caplog.messages
    encoded(" Paris cat")
    assert "' Paris cat' of probe 'the-capital-of-france-is' is 2 tokens" in caplog.text
    encoded("Paris")
    assert "has no leading space" in caplog.text


def test_the_options_come_without_the_machinery():
    code = (
        "import sys, tlens_callback.cli; print([m for m in ('torch', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
