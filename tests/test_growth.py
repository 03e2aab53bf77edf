"""`scripts/measure_growth.py`, which makes the tables of docs/growth.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "measure_growth.py"
DOCS = (ROOT / "docs" / "growth.md").read_text()


def measured(*arguments):
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def tables(text):
    """The heading of each Markdown table -> its rows, cell by cell."""
    found = {}
    for block in re.findall(r"(?:^\|.*\|\n)+", text + "\n", flags=re.MULTILINE):
        head, _, *rows = (
            tuple(cell.strip() for cell in line.strip("|").split("|"))
            for line in block.splitlines()
        )
        found[head] = rows
    return found


@pytest.mark.slow
def test_every_table_is_made_with_a_ratio_beside_each_doubling():
    done = measured("--quick", "--only", "keys", "--only", "training rows")
    assert done.returncode == 0, done.stderr
    made = tables(done.stdout)
    assert {head[0] for head in made} == {"keys", "training rows"}
    for head, rows in made.items():
        first, second = rows
        assert len(first) == len(second) == len(head)
        size = [int(row[0].replace(",", "")) for row in rows]
        assert size[1] == 2 * size[0]
        assert re.fullmatch(r"[\d.,e-]+ \(x \d+\.\d\)", second[1])


def test_the_documentation_has_the_tables_of_the_script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import measure_growth
    finally:
        sys.path.pop(0)
    said = {head[0]: [row[0] for row in rows] for head, rows in tables(DOCS).items()}
    for name, sizes in measure_growth.SIZES.items():
        assert said.pop(name) == [one.said(name) for one in sizes]
    assert said.pop("training rows") == [f"{n:,}" for n in measure_growth.ROWS]
    assert said.pop("vocabulary") == [f"{n:,}" for n in measure_growth.WORDS]
    assert not said


def test_a_table_that_does_not_exist_is_an_error():
    done = measured("--only", "colours")
    assert done.returncode == 1 and "There is no table 'colours'" in done.stderr
