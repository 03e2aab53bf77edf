#!/usr/bin/env python
"""Writes the events that examples/induction.py prints into README.md, in about a minute.

.venv/bin/python scripts/readme_events.py
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SHOWN = re.compile(r"(?<=```\n)(tlens: step \d+: .*\n)+(?=```)")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "examples" / "induction.py", "--output-dir", folder]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    events = re.findall(r"^tlens: step \d+: .*\n", said, flags=re.MULTILINE)
    readme = ROOT / "README.md"
    text, n = SHOWN.subn("".join(events), readme.read_text())
    assert n == 1, f"README.md has {n} blocks of events"
    readme.write_text(text)


if __name__ == "__main__":
    main()
