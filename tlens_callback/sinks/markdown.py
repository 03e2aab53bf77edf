"""Writes tables and rollouts as markdown for TensorBoard, which shows every letter as it is."""

from collections.abc import Mapping, Sequence

import pandas as pd

from tlens_callback.reading import Reading
from tlens_callback.sinks.rollouts import TEXTS, best_and_worst
from tlens_callback.sinks.shown import cells, excerpt


def markdown_table(frame: pd.DataFrame) -> str:
    """Writes about 100 rows of a table, those of the lowest ranks."""
    columns = excerpt(frame)
    rows = list(zip(*columns.values(), strict=True))
    lines = [[escaped(name) for name in columns], ["---"] * len(columns)]
    lines += [[_cell(cell) for cell in row] for row in rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if len(rows) < len(frame):
        text += f"\n\nThe first {len(rows)} of {len(frame)} rows; the local store has all."
    return text


def best_and_worst_text(step: int, readings: Sequence[Reading]) -> str | None:
    """Writes the best and the worst rollout of each group, with the numbers of both.

    None if there are no rollouts, or no texts of them.
    """
    parts: list[str] = []
    for number, prompt, group in best_and_worst(step, readings):
        parts += [f"### Group {number}", _quoted(prompt)]
        numbers = cells(group.drop(columns=["step", "group", *TEXTS]))
        rows = [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]
        names = ("Best", "Worst") if len(rows) > 1 else ("All have the same advantage; the first",)
        for name, row, text in zip(names, rows, group["completion"], strict=True):
            parts += [f"**{name}**: {_facts(row)}", _quoted(str(text))]
    return "\n\n".join(parts) or None


def escaped(text: str) -> str:
    """Escapes text so that TensorBoard's markdown shows it letter by letter.

    A character that cannot be seen becomes its escape, and a space at either end a dot.
    """
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    inner = seen.strip(" ")
    before = len(seen) - len(seen.lstrip(" "))
    after = len(seen) - len(inner) - before
    whole = "·" * before + inner + "·" * after
    return "".join(c if c.isalnum() or c == " " else f"&#{ord(c)};" for c in whole)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else escaped(str(value))


def _facts(row: Mapping[str, object]) -> str:
    return ", ".join(
        f"{escaped(name.replace('_', ' '))} {_cell(value)}" for name, value in row.items()
    )


def _quoted(text: str) -> str:
    """A quotation that keeps the lines of a text: two spaces at the end of a line break it."""
    return "> " + "  \n> ".join(map(escaped, text.split("\n")))
