"""Reads probes from a file, for the callback, the tracer and the command line alike."""

import difflib
import logging
import os
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.probes.entries import entries_in, kind_of
from tlens_callback.probes.probe import Probe

CONTENT = "text", "chat", "tokens", "block"
KEYS = ("name", *CONTENT, "times", "seed", "target", "foil", "corrupt")
CORRUPT_KEYS = "text", "chat", "tokens", "target", "foil"
OTHER_NAMES = {
    "prompt": "text",
    "question": "text",
    "content": "text",
    "messages": "chat",
    "conversations": "chat",
    "input_ids": "tokens",
    "prompt_ids": "tokens",
    "id": "name",
    "answer": "target",
    "completion": "target",
}
"""Keys of other kinds of files -> the key that is used here."""

logger = logging.getLogger("tlens_callback")


def read_probes(path: str | os.PathLike[str]) -> list[Probe]:
    """Reads the probes that a file lists, in their order.

    The file is a YAML or JSON list of entries (`.yaml`, `.yml`, `.json`), or JSON lines with an
    entry each (`.jsonl`, `.ndjson`):

        - name: capital
          text: The capital of France is
          target: " Paris" # in quotes, for its space
          foil: " London"
          corrupt: The capital of Italy is
        - chat: What is the capital of France?
          target: Paris
        - tokens: [504, 3575, 282]
        - block: 16
          times: 3
        - A text alone

    An entry is a text, or has these keys:

    - One of four says what the model is shown: `text`; `chat`, a list of messages with role and
      content, or a string, which is what the user says; `tokens`, a list of token ids; `block`,
      the length of a repeated random block, with `times` and `seed` as in `Probe.repeated`.
    - `name`: without it, the probe is named by its first words.
    - `target`, `foil`: a string, or a token id.
    - `corrupt`: makes a second probe, `<name>-corrupt`, for a pair in `ActivationPatching()`. Its
      value is of the same kind as the entry's text, chat or tokens; or it is a mapping with one of
      `text`, `chat` and `tokens`, and with a `target` and `foil` of its own.

    A key whose value is null counts as left out.

    Raises:
        ValueError: for a file that does not exist, has another ending, is empty, or is not UTF-8,
            YAML or JSON; for an entry with an unknown key, with none or two of the four contents,
            with a value of the wrong type, or that `Probe` refuses; for two probes of one name.
            The message names the entry or line.
    """
    path = Path(path)
    entries = [(where, _entry(where, entry)) for where, entry in entries_in(path)]
    if not entries:
        raise ValueError(f"{path} has no probes in it. The shortest entry is: - text: Hello")
    names = {entry["name"] for _, entry in entries if "name" in entry}
    found: dict[str, str] = {}
    probes: list[Probe] = []
    for where, entry in entries:
        for probe in _probes(where, entry, names):
            if probe.name in found:
                raise ValueError(
                    f"{where}: the probe of {found[probe.name]} is also named {probe.name!r}. "
                    f"Names are parts of keys, so each needs its own."
                )
            found[probe.name] = where.removeprefix(f"{path}, ")
            names.add(probe.name)
            probes.append(probe)
    _warn_of_ids(path, [(found[probe.name], probe) for probe in probes])
    return probes


def _warn_of_ids(path: Path, probes: Sequence[tuple[str, Probe]]) -> None:
    """Warns once where the answer to a text is a token id, since the text "5" may be meant."""
    ids = [
        (where, role, getattr(probe, role))
        for where, probe in probes
        for role in ("target", "foil")
        if type(getattr(probe, role)) is int and _is_text_or_chat(probe)
    ]
    if ids:
        more = f", and {len(ids) - 1} more are" if len(ids) > 1 else ""
        logger.warning(
            'tlens: %s, %s: %s %d is a token id%s; for the text write it in quotes, "%d".',
            *(path, *ids[0], more, ids[0][2]),
        )


def _is_text_or_chat(probe: Probe) -> bool:
    return isinstance(probe.content, str) or isinstance(next(iter(probe.content), 0), Mapping)


def short_name(text: str, others: Collection[str]) -> str:
    """Makes a name of the first words of a text, with a number where others have that name."""
    words = re.findall(r"\w+", text.lower())
    name = "-".join(words)[:32].strip("-") or "prompt"
    if name not in others:
        return name
    # Doubles until a number is free, then halves: to count up to the free one would take minutes
    # where thousands of probes begin with the same words.
    free = 2
    while f"{name}-{free}" in others:
        free *= 2
    numbers = range(2, free)
    return f"{name}-{2 + bisect_left(numbers, True, key=lambda n: f'{name}-{n}' not in others)}"


def _entry(where: str, entry: Any) -> dict[str, Any]:
    """Checks the keys and the name of an entry, and drops the keys that are null."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where} must be a text or a mapping such as {{text: ..., target: ...}}, got "
            f"{_shown(entry)}.{_quotes(entry)}"
        )
    entry = _known(where, entry, KEYS)
    if "name" in entry:
        _string(where, "name", entry["name"])
    return entry


def _known(where: str, given: Mapping[Any, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in given:
        if key not in keys:
            near = [OTHER_NAMES.get(str(key).lower(), "")]
            near = [one for one in near if one in keys] or difflib.get_close_matches(
                str(key).lower(), keys, n=1
            )
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"{where}: unknown key {key!r}; {meant}The keys are {', '.join(keys)}."
            )
    return {key: value for key, value in given.items() if value is not None}


def _probes(where: str, entry: dict[str, Any], names: Collection[str]) -> list[Probe]:
    """Makes the probe of an entry, and the corrupt one of its pair if there is one."""
    kind = _content_key(where, entry, CONTENT)
    probe: dict[str, Any] = {"name": entry.get("name")}
    if kind == "block":
        for key in {"block", "times", "seed"} & entry.keys():
            if type(entry[key]) is not int:
                raise ValueError(
                    f"{where}: {key} must be a whole number, got {_shown(entry[key])}."
                )
            probe[key] = entry[key]
        words = f"repeat {entry['block']}"
    else:
        if extra := {"times", "seed"} & entry.keys():
            raise ValueError(f"{where}: {min(extra)} goes with block, not with {kind}.")
        probe["content"] = _content(where, kind, entry[kind])
        words = _words(probe["content"])
    if probe["name"] is None:
        probe["name"] = short_name(words, names)
    probes = [_probe(where, {**probe, **_answers(where, entry)})]
    if "corrupt" in entry:
        where, corrupt = f"{where}, corrupt", entry["corrupt"]
        if not isinstance(corrupt, Mapping):
            if kind == "block":
                raise ValueError(
                    f"{where}: beside a block it must be a mapping, such as {{tokens: [1, 2, 3]}}."
                )
            corrupt = {kind: corrupt}
        corrupt = _known(where, corrupt, CORRUPT_KEYS)
        kind = _content_key(where, corrupt, CORRUPT_KEYS[:3])
        other = {
            "name": f"{probes[0].name}-corrupt",
            "content": _content(where, kind, corrupt[kind]),
        }
        probes.append(_probe(where, {**other, **_answers(where, corrupt)}))
    return probes


def _probe(where: str, arguments: dict[str, Any]) -> Probe:
    try:
        return Probe(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _content_key(where: str, given: Mapping[str, Any], kinds: Sequence[str]) -> str:
    there = [kind for kind in kinds if kind in given]
    if len(there) != 1:
        has = f"has {' and '.join(there)}" if there else f"has none of {', '.join(kinds)}"
        raise ValueError(f"{where} {has}. Exactly one of them must say what the model is shown.")
    return there[0]


def _content(where: str, kind: str, value: Any) -> Any:
    """Checks the types of a content, and gives it as `Probe` takes it."""
    if kind == "tokens":
        if not isinstance(value, list) or any(type(one) is not int for one in value):
            raise ValueError(f"{where}: tokens must be a list of token ids, got {_shown(value)}.")
        return value
    if kind == "chat" and isinstance(value, list):
        for message in value:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ValueError(
                    f"{where}: a message of chat must be {{role: user, content: ...}}, got "
                    f"{_shown(message)}."
                )
            for key in ("role", "content"):
                _string(where, f"{key} of a message", message[key])
        return value
    _string(where, kind, value)
    return value if kind == "text" else [{"role": "user", "content": value}]


def _answers(where: str, given: Mapping[str, Any]) -> dict[str, str | int]:
    """Checks and gives target and foil, if they are there."""
    found = {key: given[key] for key in ("target", "foil") if key in given}
    for key, value in found.items():
        if type(value) not in (str, int):
            raise ValueError(
                f"{where}: {key} must be a string or a token id, got "
                f"{_shown(value)}.{_quotes(value)}"
            )
    return found


def _words(content: str | Iterable[Any]) -> str:
    """Gives the words that name a probe: the text, what the user says first, or the ids."""
    if isinstance(content, str):
        return content
    parts = list(content)
    if parts and isinstance(parts[0], Mapping):
        return next((one for one in parts if one["role"] == "user"), parts[0])["content"]
    return " ".join(str(one) for one in parts)


def _string(where: str, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} must be a string, got {_shown(value)}.{_quotes(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kind_of(value)})"


def _quotes(value: Any) -> str:
    """Says what to do about a word that YAML takes for something else."""
    if isinstance(value, bool):
        return " YAML takes yes, no, on and off for booleans; put it in quotes."
    return "" if isinstance(value, list | Mapping | None) else " Put it in quotes."
