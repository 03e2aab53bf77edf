"""The command line as a person uses it."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from tlens_callback.cli import main
from tlens_callback.sinks.wandb import workspace

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(*arguments):
    return CliRunner().invoke(main, list(arguments))


def test_help_shows_an_example():
    for arguments in (["workspace", "--help"], ["workspace", "-h"]):
        result = run(*arguments)
        assert result.exit_code == 0
        assert "tlens-callback workspace my-team/my-project" in result.output


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "tlens_callback", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.startswith("Usage: tlens-callback")


def test_prints_the_view_where_it_is_asked_to():
    result = run("workspace", "me/it", "--print", "--probe", "capital", "--name", "slow")
    assert result.exit_code == 0 and result.stderr == ""
    view = json.loads(result.stdout)
    assert (view["entity"], view["project"]) == ("me", "it")
    assert "slow/attention_patterns/pattern/capital" in result.stdout
    assert "tlens/" not in result.stdout


def test_prints_the_view_where_nothing_can_be_saved(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    result = run("workspace", "me/it")
    assert result.exit_code == 0 and json.loads(result.stdout)["displayName"] == "Inside the model"
    assert "Nothing was saved: WANDB_MODE is offline" in result.stderr
    assert "tlens-callback workspace me/it" in result.stderr


def test_saves_the_view(monkeypatch):
    saved = []

    class View:
        url = "https://wandb.ai/me/it?nw=1"

        def save(self):
            saved.append(self)

    asked, logged = {}, workspace.Logged(probes=["a"])
    monkeypatch.setattr(workspace, "unreachable", lambda: None)
    monkeypatch.setattr(workspace, "logged_by", lambda *_, **__: logged)
    monkeypatch.setattr(workspace, "build", lambda *_, **given: asked.update(given) or View())
    result = run("workspace", "me/it")
    assert result.exit_code == 0 and len(saved) == 1 and View.url in result.output
    of_run = {"probes": ["a"], "logged": logged}
    assert asked == {"name": "tlens", "title": "Inside the model", **of_run}

    def refuse(self):
        raise RuntimeError("permission denied")

    monkeypatch.setattr(View, "save", refuse)
    result = run("workspace", "me/it")
    assert result.exit_code == 1 and "did not take the view of me/it" in result.stderr
    monkeypatch.setattr(workspace, "logged_by", lambda *_, **__: refuse(None))
    assert run("workspace", "me/it").exit_code == 1


@pytest.mark.parametrize("arguments", [["it"], ["me/it", "--name", "a b"], []])
def test_what_cannot_be_meant_is_said(arguments):
    result = run("workspace", "--print", *arguments)
    assert result.exit_code == 2 and "Usage:" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("missing", "arguments"), [("wandb_workspaces.workspaces", ["--print"]), ("wandb", [])]
)
def test_says_how_to_install_what_is_missing(monkeypatch, missing, arguments):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    result = run("workspace", "me/it", *arguments)
    assert result.exit_code == 1
    assert "pip install 'tlens-callback[workspace]'" in result.stderr
