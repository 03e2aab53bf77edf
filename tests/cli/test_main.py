"""The command line as a whole: exit codes, errors in one line, help, what it does not import."""

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager

import click
import pytest
from click.testing import CliRunner

from tests.processes import python
from tests.sinks.test_local import fill
from tlens_callback import FidelityError
from tlens_callback.cli import Commands, main

COMMAND = [sys.executable, "-m", "tlens_callback"]
HEAVY = {"torch", "transformers", "pandas", "numpy", "transformer_lens", "wandb", "pyarrow", "peft"}


def script(body, *arguments):
    """The command line with one more command, `x`, that does this; in a process of its own."""
    text = f"""
import click, os, sys, time
from tlens_callback.cli import main
@main.command()
def x():
{chr(10).join("    " + line for line in body.splitlines())}
main([{", ".join(map(repr, arguments)) or "'x'"}], prog_name="tlens-callback")
"""
    return [sys.executable, "-c", text]


@contextmanager
def one_more(act):
    main.add_command(click.Command("x", callback=act))
    try:
        yield
    finally:
        del main.commands["x"]


def failing(error, *arguments):
    def act():
        raise error

    with one_more(act):
        return CliRunner().invoke(main, [*arguments, "x"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such layer"), 2),
        (OSError("the disk is full"), 1),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 1),
        (ImportError("pip install it"), 1),
        (FidelityError("the shadow is not the model"), 1),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 2),
    ],
)
def test_what_is_foreseen_is_one_line(error, code):
    result = failing(error)
    assert result.exit_code == code
    assert result.stderr == f"Error: {error}\n" and result.stdout == ""
    result = failing(error, "--debug")
    assert result.exit_code == code
    assert "Traceback" in result.stderr and "in act" in result.stderr
    assert result.stderr.endswith(f"Error: {error}\n")


def test_an_error_without_a_text_has_a_name():
    assert failing(ValueError()).stderr == "Error: ValueError\n"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug"), AssertionError()])
def test_what_is_not_foreseen_is_not_swallowed(error):
    result = failing(error)
    assert result.exception is error and result.exit_code == 1


def test_what_is_not_foreseen_has_its_traceback():
    done = subprocess.run(script("raise RuntimeError('a bug')"), capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("RuntimeError: a bug\n")


@pytest.mark.parametrize("code", [0, 3])
def test_a_command_says_its_own_code(code):
    def act():
        raise click.exceptions.Exit(code)

    with one_more(act):
        assert CliRunner().invoke(main, ["x"]).exit_code == code


def test_ctrl_c():
    # A Ctrl-C that whoever started this process ignores would be ignored there too.
    heard = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    child = subprocess.Popen(
        script(f"{heard}print('here', flush=True)\ntime.sleep(300)"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout.readline() == "here\n"
            child.send_signal(signal.SIGINT)
            _, err = child.communicate(timeout=120)
        finally:
            child.kill()
    assert child.returncode == 130 and err == "Interrupted.\n"


@pytest.mark.parametrize(
    "arguments", [["nothing"], ["--nothing"], ["report"], ["report", "a", "b"]]
)
def test_words_that_mean_nothing(arguments):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "Usage: " in result.stderr


# --- pipes and logs ---


def piped(command, **options):
    """What the command says on stderr while its reader takes one line and goes."""
    line = f"{shlex.join(command)} | head -n 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, **options
    )
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    "body", ["for i in range(100_000): click.echo(i)", "for i in range(100_000): print(i)", 
             "sys.stdout.write('0\\n' * 3 + 'x' * 200_000)\nsys.stdout.write('x')"])  # fmt: skip
def test_a_reader_that_goes_away_is_no_error(body):
    assert piped(script(body)) == ("0\n", "")


def test_a_reader_that_goes_away_would_be_seen():
    out, err = piped([sys.executable, "-c", "for i in range(100_000): print(i)"])
    assert out == "0\n" and "BrokenPipeError" in err


@pytest.mark.slow
def test_a_command_whose_reader_goes_away(tmp_path):
    store = fill(tmp_path / "tlens", (0, 10), page=False).path
    out, err = piped([*python(), "-m", "tlens_callback", "summary", str(store)])
    assert len(out.splitlines()) == 1 and "Traceback" not in err and "BrokenPipe" not in err


BARS = "print(os.environ.get('HF_HUB_DISABLE_PROGRESS_BARS'))"


@pytest.mark.slow
def test_bars_of_transformers_are_for_a_terminal():
    body = "from transformers.utils import logging\nprint(logging.is_progress_bar_enabled())"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_HUB_DISABLE_PROG")}

    def said(**options):
        return subprocess.run(script(body), stdout=subprocess.PIPE, text=True, **options).stdout

    assert said(stderr=subprocess.PIPE, env=environment) == "False\n"
    asked = {**environment, "HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    assert said(stderr=subprocess.PIPE, env=asked) == "True\n"
    outer, inner = os.openpty()
    try:
        assert said(stderr=inner, env=environment) == "True\n"
    finally:
        os.close(outer)
        os.close(inner)


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    seen = []
    with one_more(lambda: seen.append(os.environ["HF_HUB_DISABLE_PROGRESS_BARS"])):
        assert CliRunner().invoke(main, ["x"]).exit_code == 0
    assert seen == ["1"] and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


# --- help ---


def test_commands_are_in_the_order_of_their_use():
    text = CliRunner().invoke(main, ["--help"]).stdout
    listed = re.findall(r"^  (\w+)  ", text[text.index("Commands:") :], re.M)
    assert listed == ["analyze", "replay", "compare", "report", "summary", "ask", "workspace"]


def examples(text):
    """The command lines that a help text ends with, without what the shell does."""
    assert re.search(r"^  Examples?:$", text, re.M), f"no example in {text}"
    tail = re.split(r"^  Examples?:$", text, flags=re.M)[-1]
    # Options are listed after the text.
    lines = re.split(r"^Options:", tail, flags=re.M)[0].replace("\\\n", " ").splitlines()
    found = [re.search(r"tlens-callback (.*)", line) for line in lines if line.strip()]
    assert found and all(found), f"an example is no command: {lines}"
    return [shlex.split(re.split(r"\s[<>|]|\)$", one[1])[0]) for one in found]


def parses(words):
    """Raises what click raises for words that it does not know."""
    name, *rest = words
    group = main.make_context("tlens-callback", list(words))
    main.commands[name].make_context(name, rest, parent=group)
    return name


@pytest.mark.parametrize("name", [None, *main.commands])
def test_every_help_ends_with_an_example_that_parses(name):
    arguments = [] if name is None else [name]
    result = CliRunner().invoke(main, [*arguments, "--help"], terminal_width=100)
    assert result.exit_code == 0
    for words in examples(result.stdout):
        assert parses(words) == (name or "analyze")


def test_an_example_that_does_not_parse_is_found():
    for words in (
        ["report", "a", "--sevre"],
        ["nothing", "a"],
        ["report"],
        ["report", "a", "--port", "x"],
    ):
        with pytest.raises((click.UsageError, KeyError)):
            parses(words)
    with pytest.raises(AssertionError, match="no example"):
        examples(click.Command("x", help="Does.").get_help(click.Context(click.Command("x"))))


def test_a_list_of_commands_says_whole_sentences():
    text = CliRunner().invoke(main, [], terminal_width=80).output
    words = " ".join(text[text.index("Commands:") :].split())
    for name, command in main.commands.items():
        sentence = " ".join(command.help.split("\n\n")[0].split()).removesuffix(".")
        assert f"{name} {sentence}" in words


def imported(*command, code=0):
    """Packages that a process has imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr[-2000:]
    return set(re.findall(r"\| +([A-Za-z_]\w*)", done.stderr))


def test_help_imports_nothing_heavy():
    for arguments in (["--help"], ["report", "--help"], ["analyze", "--help"], ["--version"]):
        found = imported("-m", "tlens_callback", *arguments)
        assert {"click", "tlens_callback"} <= found and not found & HEAVY, arguments


def test_an_error_imports_nothing_heavy():
    for error, code in (("ValueError", 2), ("RuntimeError", 1)):
        assert not imported(*script(f"raise {error}('no')")[1:], code=code) & HEAVY


def test_what_is_heavy_would_be_found():
    assert imported("-c", "import numpy, tlens_callback.cli") & HEAVY == {"numpy"}


def test_the_group_is_what_is_installed():
    assert isinstance(main, Commands)
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("tlens-callback, version")
