"""No import between rooms runs up or closes a circle: `docs/architecture.md`, held to the code."""

import re
import shutil
from pathlib import Path

import pytest

from tests.rooms import Import, circle, imports, misplaced, not_allowed, plan, room

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "tlens_callback"
PAGE = (ROOT / "docs" / "architecture.md").read_text()

LOOKS_UP = {
    # `Reading.to_plotly` and `Reading._repr_html_`.
    ("reading.py", "render/figure.py"),
    ("reading.py", "render/snippet.py"),
    # `Store.page`, and the type of what it returns.
    ("store/store.py", "page/__init__.py"),
    ("store/store.py", "page/notebook.py"),
}
"""File and what it looks up at: methods that users know, which import inside themselves."""


def looks_up(one: Import) -> bool:
    return (one.file, one.wants) in LOOKS_UP and one.when != "start"


def found(package: Path) -> list[str]:
    """What is wrong with the imports of a package that has this one's plan, a line each."""
    there, allowed = imports(package), plan(PAGE)
    rest = [one for one in there if not looks_up(one)]
    wrong = not_allowed(rest, allowed) + misplaced(rest, allowed)
    lines = [f"{one.file} imports {one.module} ({one.when})" for one in wrong]
    # Late imports and those for types too: also a reader goes round in a circle.
    return lines + ([" -> ".join(files)] if (files := circle(rest)) else [])


def test_no_import_runs_up_or_closes_a_circle():
    assert found(PACKAGE) == []
    assert circle([one for one in imports(PACKAGE) if one.when == "start"]) == []


def test_the_plan_has_every_room_and_no_other():
    rooms = {room(path.relative_to(PACKAGE).as_posix()) for path in PACKAGE.rglob("*.py")}
    assert set(plan(PAGE).rooms) == rooms - {"__init__.py"}


def test_every_look_up_is_one_and_is_said_beside_it():
    there = imports(PACKAGE)
    assert {(one.file, one.wants) for one in there if looks_up(one)} == LOOKS_UP
    for one in there:
        if looks_up(one) and one.when == "late":
            module = re.escape(one.module)
            above = rf"# Imports a higher room.*\n(?: *(?:#|from ).*\n)* *from {module} import"
            assert re.search(above, (PACKAGE / one.file).read_text()), one


def test_the_page_names_files_that_exist():
    names = re.findall(r"`([\w/.-]+\.(?:py|pyi|js|md|toml)|[\w/]+/)`", PAGE)
    assert len(names) > 40
    for name in names:
        places = [ROOT / name, PACKAGE / name, PACKAGE / "page" / "assets" / name]
        assert any(place.exists() for place in places), name


def test_the_page_names_methods_that_exist():
    sources = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    named = set(re.findall(r"`([A-Z]\w+)\.(\w+)`", PAGE))
    assert {("Reading", "to_plotly"), ("Observer", "after_update")} <= named
    for kind, method in named:
        of = [text for text in sources.values() if re.search(rf"^class {kind}\b", text, re.M)]
        assert any(f"    def {method}(" in text for text in of), (kind, method)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package to spoil."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.pyc"))
    return tmp_path / PACKAGE.name


def add(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text((path.read_text() if path.exists() else "") + "\n" + text)


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        (
            "probes/probe.py",
            "from tlens_callback.shadow import Shadow",
            "probes/probe.py imports tlens_callback.shadow (start)",
        ),
        (
            "shadow/low_rank.py",
            "def late():\n    import tlens_callback.run.observe",
            "shadow/low_rank.py imports tlens_callback.run.observe (late)",
        ),
        (
            "store/tidy.py",
            "import typing\nif typing.TYPE_CHECKING:\n    from ..sinks import local",
            "store/tidy.py imports tlens_callback.sinks.local (types)",
        ),
        (
            "page/thin.py",
            "from tlens_callback import render",
            "page/thin.py imports tlens_callback.render (start)",
        ),
        # A look up is late, and by no other method of the same file.
        (
            "reading.py",
            "from tlens_callback.render.figure import to_plotly",
            "reading.py imports tlens_callback.render.figure (start)",
        ),
        (
            "reading.py",
            "def late():\n    from tlens_callback.render import table",
            "reading.py imports tlens_callback.render.table (late)",
        ),
        # One floor.
        (
            "tracer.py",
            "from tlens_callback.callback import TLensCallback",
            "tracer.py imports tlens_callback.callback (start)",
        ),
        # The public page, which holds everything.
        (
            "cli/ask.py",
            "from tlens_callback import Probe",
            "cli/ask.py imports tlens_callback (start)",
        ),
        # A room that the plan does not have.
        (
            "cellar/wine.py",
            "from tlens_callback.reading import Reading",
            "cellar/wine.py imports tlens_callback.reading (start)",
        ),
        (
            "instruments/heads.py",
            "from plotly.graph_objects import Figure",
            "instruments/heads.py imports plotly.graph_objects (start)",
        ),
        (
            "run/writer.py",
            "def late():\n    try:\n        import wandb\n    except ImportError:\n        pass",
            "run/writer.py imports wandb (late)",
        ),
        (
            "shadow/weights.py",
            "import transformer_lens.model_bridge as bridge",
            "shadow/weights.py imports transformer_lens.model_bridge (start)",
        ),
    ],
)
def test_an_import_that_runs_up_is_found(copy, file, text, line):
    add(copy / file, text)
    assert line in found(copy)


def test_the_copy_is_as_good_as_the_package(copy):
    assert found(copy) == []


def test_a_circle_is_found(copy):
    """Within a room, through three files, one of them by a late import."""
    add(copy / "shadow" / "low_rank.py", "import tlens_callback.shadow.one")
    add(copy / "shadow" / "one.py", "def late():\n    from .two import Two")
    add(copy / "shadow" / "two.py", "from tlens_callback.shadow import low_rank")
    (line,) = found(copy)
    assert line == "shadow/low_rank.py -> shadow/one.py -> shadow/two.py -> shadow/low_rank.py"


def test_a_circle_through_a_package_is_found(copy):
    """`sinks.wandb.file_budget` imports no sink, but before it `sinks.wandb` is imported."""
    add(copy / "sinks" / "shown.py", "import tlens_callback.sinks.wandb.file_budget")
    (line,) = found(copy)
    assert "sinks/shown.py -> sinks/wandb/__init__.py -> sinks/wandb/sink.py" in line


@pytest.mark.parametrize(
    ("was", "now", "text"),
    [
        (
            "| `shadow/`, `probes/`, `reading.py`, `meaning.py` |\n| `shadow/`",
            "| `store/` |\n| `shadow/`",
            "below",
        ),
        ("| `events/` |", "| `store/`, `events/` |", "two rows"),
        ("| room |", "| chamber |", "no table"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(was, now, text):
    assert was in PAGE
    with pytest.raises(ValueError, match=text):
        plan(PAGE.replace(was, now))
