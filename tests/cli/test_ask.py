"""`tlens-callback ask`, as a person or a script uses it."""

import sys
import webbrowser
from pathlib import Path

import pytest

from tests import tiny
from tests.cli.saved import SMALL_FILES, probabilities, run, save_adapter, save_base, started
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


def pages(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
def test_prompts_from_a_pipe_get_a_page_each(base, adapter, tmp_path):
    lines = f"{PROMPT}\n\n \na cat sat on the"  # empty lines are no prompts, and no end
    done = started("ask", adapter, cwd=tmp_path, input=lines)
    assert done.returncode == 0, done.stderr
    assert pages(tmp_path / "ask") == ["a-cat-sat-on-the.html", "the-capital-of-france-is.html"]
    chance = probabilities(base, adapter, PROMPT).topk(5)
    said = done.stdout.splitlines()
    at = said.index("the-capital-of-france-is:")
    assert said[at + 1 : at + 6] == [
        f"{p:7.3f}  {tiny.tokenizer().decode([i])!r}"
        for p, i in zip(chance.values.tolist(), chance.indices.tolist(), strict=True)
    ]
    assert f"  page: {tmp_path / 'ask' / 'the-capital-of-france-is.html'}" in said
    assert done.stdout.count("the shadow agrees with the model") == 1
    assert "Traceback" not in done.stderr and "> " not in done.stdout


@pytest.mark.slow
def test_one_prompt_that_cannot_be_asked_among_others(adapter, tmp_path):
    lines = "\n".join([PROMPT, "cat " * 80, "a cat sat on the"])
    done = started("ask", adapter, "--out", "pages", cwd=tmp_path, input=lines)
    assert done.returncode == 3
    assert len(pages(tmp_path / "pages")) == 2
    assert done.stderr.count("Error: ") == 1 and "context" in done.stderr


@pytest.mark.slow
def test_a_model_that_is_not_there(tmp_path):
    done = started("ask", "no/such/model", PROMPT, cwd=tmp_path)
    assert done.returncode == 2
    assert "no/such/model" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_disk_that_is_full(base, tmp_path):
    done = started("ask", base, PROMPT, cwd=tmp_path, first=SMALL_FILES)
    assert done.returncode == 1
    assert "File too large" in done.stderr and "Traceback" not in done.stderr


def test_a_page_is_never_overwritten_and_its_name_is_of_the_prompt(base, tmp_path):
    out = tmp_path / "pages"
    for _ in range(2):
        assert run("ask", base, "../../The cat!\x1b[2J", "--out", out).exit_code == 0
    assert pages(out) == ["the-cat-2j-2.html", "the-cat-2j.html"]
    done = run("ask", base, "../..", "--out", out)
    assert done.exit_code == 0 and len(pages(out)) == 3
    assert pages(tmp_path) == ["pages"]


def test_chat_target_and_foil(base, tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(webbrowser, "open", shown.append)
    given = ["--chat", "--target", "Paris", "--foil", "London", "--out", tmp_path]
    done = run("ask", base, "What is the capital of France", *given, "--open")
    assert done.exit_code == 0, done.output
    assert "lead of 'Paris' over 'London': " in done.output
    (page,) = tmp_path.iterdir()
    assert shown == [page.as_uri()]
    message = [{"role": "user", "content": "What is the capital of France"}]
    ids = tiny.tokenizer().apply_chat_template(message, add_generation_prompt=True)["input_ids"]
    assert f"{probabilities(base, None, ids).max():7.3f}  " in done.output
    done = run("ask", base, PROMPT, "--foil", " London", "--out", tmp_path)
    assert done.exit_code == 0 and "over ' London': " in done.output
    assert len(shown) == 1


def test_a_terminal_is_asked_line_by_line(base, tmp_path, monkeypatch):
    said = iter([PROMPT, EOFError()])

    def typed(prompt):
        assert prompt == "> "
        if isinstance(line := next(said), Exception):
            raise line
        return line

    class Terminal:
        isatty = staticmethod(lambda: True)

    monkeypatch.setattr("builtins.input", typed)
    from tlens_callback.cli import ask

    monkeypatch.setattr(sys.modules[ask.callback.__module__], "sys", _With(stdin=Terminal()))
    done = run("ask", base, "--out", tmp_path)
    assert done.exit_code == 0, done.output
    assert "Ctrl-D" in done.stderr and len(pages(tmp_path)) == 1


class _With:
    def __init__(self, stdin):
        self.stdin = stdin


def test_what_cannot_be_done_is_one_line(base, tmp_path):
    def refused(*arguments, **options):
        done = run("ask", *arguments, "--out", tmp_path / "pages", **options)
        assert done.exit_code == 2 and done.stderr.splitlines()[-1].startswith("Error: ")
        return done.stderr

    assert "Nothing was answered" in refused(base, input="\n")
    assert "is 0 tokens" in refused(base, PROMPT, "--target", "")
    assert "Nothing was answered" in refused(base, "--target", "", input=PROMPT)
    assert "empty" in refused(base, " ")
    assert not (tmp_path / "pages").exists()


def test_what_is_known_beforehand_is_said_before_the_model_is_loaded(base, tmp_path, monkeypatch):
    monkeypatch.setattr(loader.Loader, "load", lambda *_: pytest.fail("the model was loaded"))
    file = tmp_path / "file"
    file.write_text("mine")
    done = run("ask", base, PROMPT, "--out", file)
    assert done.exit_code == 2 and "is a file" in done.output and file.read_text() == "mine"
    bare = save_base(tmp_path / "bare", tokenizer=False)
    done = run("ask", bare, PROMPT, "--out", tmp_path / "pages")
    assert done.exit_code == 2 and "--tokenizer NAME" in done.output
    done = run("ask", base, PROMPT, "--device", "abacus", "--out", tmp_path / "pages")
    assert done.exit_code == 2 and "abacus" in done.output
