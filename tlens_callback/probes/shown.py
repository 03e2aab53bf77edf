"""Says how the probes of a run were encoded."""

from tlens_callback.probes.batch import ProbeBatch
from tlens_callback.probes.encoding import text_ids

_PROBES, _BEGIN, _END = 8, 4, 8
"""How many probes are shown, and how many tokens at the beginning and at the end of each."""


def encoded_lines(batch: ProbeBatch) -> list[str]:
    """Writes a line for each of the first probes that are not repeated blocks: its tokens, of a
    long one the first and the last, and those of its target and foil."""
    rows = [row for row, probe in enumerate(batch.probes) if probe.block is None]
    lines = [_line(batch, row) for row in rows[:_PROBES]]
    if len(rows) > _PROBES:
        lines.append(f"tlens: and {len(rows) - _PROBES} more probes")
    if batch.bos is not None and any(_differs(batch, row) for row in rows):
        do = "" if batch.bos else "do not "
        lines.append(
            f"tlens: the training rows {do}begin with "
            f"{batch.token_text(batch.tokenizer.bos_token_id)!r}, so the texts "
            f"{'do too' if batch.bos else 'do not either'}"
        )
    return lines


def _line(batch: ProbeBatch, row: int) -> str:
    names = [repr(name) for name in batch.labels[row]]
    count = f"{len(names)} token{'s' * (len(names) != 1)}"
    if len(names) > _BEGIN + _END + 1:
        names = [*names[:_BEGIN], "...", *names[-_END:]]
    line = f"tlens: {batch.probes[row].name} is {count}, {' '.join(names)}"
    answers = {"target": batch.target_tokens[row], "foil": batch.foil_tokens[row]}
    said = [
        f"its {role} {'is ' if role == 'target' else ''}"
        f"{' '.join(repr(batch.token_text(token)) for token in tokens)}"
        for role, tokens in answers.items()
        if tokens
    ]
    return f"{line}; {', '.join(said)}" if said else line


def _differs(batch: ProbeBatch, row: int) -> bool:
    """Whether the tokenizer itself would begin this text in another way."""
    content = batch.probes[row].content
    if not isinstance(content, str):
        return False
    usual = text_ids(content, batch.tokenizer)
    return usual != batch.tokens[row, : batch.lengths[row]].tolist()
