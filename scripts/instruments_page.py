"""Writes docs/instruments.md from the docstrings of the instruments.

python scripts/instruments_page.py
python scripts/instruments_page.py --check  # fails if the page differs from the docstrings
"""

import argparse
import inspect
import re
import sys
from pathlib import Path

from tlens_callback import Rule, Watch, instruments

PAGE = Path(__file__).parents[1] / "docs" / "instruments.md"
SECTIONS = ("Args", "Keys", "Reads", "Cost", "Source", "Raises")
INTRODUCTION = """\
# Instruments

What each instrument measures: formula, keys, cost and source. This page is made from the
docstrings by `scripts/instruments_page.py`; a test holds the keys against what is emitted.

Axis words are TransformerLens's. A key is `<instrument>/<measure>` or
`<instrument>/<measure>/<probe>`; its first segment is the instrument's `name=`, so that two of a
kind can work side by side. Instruments marked *fast* share one forward pass and are what
`fast()` returns; the others are named in `instruments=[*fast(), ...]`, and those with `every=`
are asked at every n-th observation. A cost is in numbers that leave the device at an
observation, where it says no more.
"""


def page() -> str:
    """The whole page as Markdown."""
    exported = [getattr(instruments, name) for name in instruments.__all__]
    classes = [thing for thing in exported if inspect.isclass(thing)]
    fast = [type(instrument) for instrument in instruments.fast()]
    classes.sort(key=lambda kind: (fast.index(kind) if kind in fast else len(fast), kind.__name__))
    parts = [INTRODUCTION]
    parts += [f"- [{kind.__name__}](#{kind.__name__.lower()}): {_first(kind)}" for kind in classes]
    parts += [
        f"- [{kind.__name__}](#{kind.__name__.lower()}): {_first(kind)}" for kind in (Watch, Rule)
    ]
    parts += [""]
    parts += [_entry(kind, "fast" if kind in fast else "by name") for kind in classes]
    parts += [_entry(Watch, "on by default, `watch=`"), _entry(Rule, "`Watch([Rule(...)])`")]
    return "\n".join(parts)


def _first(kind: type) -> str:
    return (inspect.getdoc(kind) or "").split("\n\n")[0].replace("\n", " ")


def _entry(kind: type, when: str) -> str:
    sections = _sections(inspect.getdoc(kind) or "")
    heading = [f"## {kind.__name__}", "", f"*{when}* · `{_signature(kind)}`", ""]
    lines = [*heading, sections.pop(""), ""]
    for title, text in sections.items():
        if title == "Keys":
            lines += ["| key | axes | unit | range | |", "| --- | --- | --- | --- | --- |"]
            lines += [_row(line) for line in _items(text)]
        elif title in ("Args", "Raises"):
            lines += [f"**{title}**", "", *(f"- {_argument(line)}" for line in _items(text))]
        else:
            lines += [f"**{title}**: {' '.join(text.split())}"]
        lines.append("")
    return "\n".join(lines)


def _signature(kind: type) -> str:
    text = re.sub(r"tlens_callback\.[\w.]*\.|collections\.abc\.|torch\.", "",
                  str(inspect.signature(kind)))  # fmt: skip
    return kind.__name__ + text.removesuffix(" -> None")


def _sections(text: str) -> dict[str, str]:
    """Splits a docstring into title -> text; the description has the title ""."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):\n", text, flags=re.M)
    found = {"": pieces[0].strip()}
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        found[title] = inspect.cleandoc("\n" + body)
    return found


def _items(text: str) -> list[str]:
    """The items of a section, with continuation lines joined."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line.strip():
            items.append(line)
    return items


def _row(line: str) -> str:
    found = re.match(r"(\S+): \[(.*?)\], ([^,]+), ([^;]+)(?:; (.*))?$", line)
    assert found, line
    key, axes, unit, span, remark = found.groups()
    cells = [f"`{key}`", axes, unit, span, remark or ""]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _argument(line: str) -> str:
    name, _, text = line.partition(": ")
    return f"`{name}`: {text}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare; write nothing")
    args = parser.parse_args()
    if not args.check:
        PAGE.write_text(page())
        print(PAGE)
    elif not PAGE.exists() or PAGE.read_text() != page():
        sys.exit(
            f"{PAGE.name} differs from the docstrings. Run: python scripts/instruments_page.py"
        )


if __name__ == "__main__":
    main()
