"""Probes from a file: the callback, the tracer and the command line read the same."""

import difflib
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tlens_callback.probes.entries import entries_in, kind_of
from tlens_callback.probes.probe import Probe

CONTENT = "text", "chat", "tokens", "block"
KEYS = ("name", *CONTENT, "times", "seed", "target", "foil", "corrupt")
CORRUPT_KEYS = "text", "chat", "tokens", "target", "foil"
ELSEWHERE = {
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
"""Keys of other kinds of files -> what stands for them here."""

logger = logging.getLogger("tlens_callback")


def read_probes(path: str | os.PathLike[str]) -> list[Probe]:
    """The probes that a file lists, in its order.

    A YAML or JSON list of entries (`.yaml`, `.yml`, `.json`), or JSON lines, an entry each
    (`.jsonl`, `.ndjson`):

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

    - `text`; or `chat`, a list of messages with role and content, or what the user says as a
      string; or `tokens`, a list of token ids; or `block`, the length of a repeated random block,
      with `times` and `seed` as `Probe.repeated` takes them. One of the four.
    - `name`: without it, the first words are.
    - `target`, `foil`: a string that is one token, or a token id.
    - `corrupt`: makes a second probe, `<name>-corrupt`, the other of a pair for
      `ActivationPatching()`. A content of the entry's kind; or a mapping with one of `text`,
      `chat` and `tokens`, and a `target` and `foil` of its own.

    A key whose value is null is as good as left out.

    Raises:
        ValueError: no such file, another ending, not UTF-8, not YAML or JSON, nothing in it; an
            entry with an unknown key, with no content or two, with a value of another type, or
            that `Probe` refuses; two probes of one name. Says which entry or line.
    """
    path = Path(path)
    entries = [(where, _entry(where, entry)) for where, entry in entries_in(path)]
    if not entries:
        raise ValueError(f"{path} has no probes in it; an entry is as little as: - text: Hello")
    names = {entry["name"] for _, entry in entries if "name" in entry}
    found: dict[str, str] = {}
    probes: list[Probe] = []
    for where, entry in entries:
        for probe in _probes(where, entry, names):
            if probe.name in found:
                raise ValueError(
                    f"{where}: the probe of {found[probe.name]} is named {probe.name!r} as well; "
                    f"names become keys, so vary them."
                )
            found[probe.name] = where.removeprefix(f"{path}, ")
            names.add(probe.name)
            probes.append(probe)
    _say_ids(path, [(found[probe.name], probe) for probe in probes])
    return probes


def _say_ids(path: Path, probes: Sequence[tuple[str, Probe]]) -> None:
    """Once, that answers to words are token ids: the text "5" may have been meant."""
    ids = [
        (where, role, getattr(probe, role))
        for where, probe in probes
        for role in ("target", "foil")
        if type(getattr(probe, role)) is int and _in_words(probe)
    ]
    if ids:
        more = f", and {len(ids) - 1} more are" if len(ids) > 1 else ""
        logger.warning(
            'tlens: %s, %s: %s %d is a token id%s; the text of it stands in quotes, "%d".',
            *(path, *ids[0], more, ids[0][2]),
        )


def _in_words(probe: Probe) -> bool:
    return isinstance(probe.content, str) or isinstance(next(iter(probe.content), 0), Mapping)


def short_name(text: str, others: Collection[str]) -> str:
    """The first words, with a number behind them where others are named like that."""
    words = re.findall(r"\w+", text.lower())
    name = base = "-".join(words)[:32].strip("-") or "prompt"
    number = 2
    while name in others:
        name, number = f"{base}-{number}", number + 1
    return name


def _entry(where: str, entry: Any) -> dict[str, Any]:
    """An entry with known keys, without those that are null; its name, if any, is a string."""
    if isinstance(entry, str):
        entry = {"text": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{where} is a text or a mapping such as {{text: ..., target: ...}}, got "
            f"{_shown(entry)}.{_quotes(entry)}"
        )
    entry = _known(where, entry, KEYS)
    if "name" in entry:
        _string(where, "name", entry["name"])
    return entry


def _known(where: str, given: Mapping[Any, Any], keys: Sequence[str]) -> dict[str, Any]:
    for key in given:
        if key not in keys:
            near = [ELSEWHERE.get(str(key).lower(), "")]
            near = [one for one in near if one in keys] or difflib.get_close_matches(
                str(key).lower(), keys, n=1
            )
            meant = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{where}: unknown key {key!r}; {meant}There are {', '.join(keys)}.")
    return {key: value for key, value in given.items() if value is not None}


def _probes(where: str, entry: dict[str, Any], names: Collection[str]) -> list[Probe]:
    """The probe of an entry, and the corrupt one of its pair."""
    kind = _content_key(where, entry, CONTENT)
    probe: dict[str, Any] = {"name": entry.get("name")}
    if kind == "block":
        for key in {"block", "times", "seed"} & entry.keys():
            if type(entry[key]) is not int:
                raise ValueError(f"{where}: {key} is a whole number, got {_shown(entry[key])}.")
            probe[key] = entry[key]
        words = f"repeat {entry['block']}"
    else:
        if extra := {"times", "seed"} & entry.keys():
            raise ValueError(f"{where}: {min(extra)} is of a block, and {kind} is none.")
        probe["content"] = _content(where, kind, entry[kind])
        words = _words(probe["content"])
    if probe["name"] is None:
        probe["name"] = short_name(words, names)
    made = [_probe(where, {**probe, **_answers(where, entry)})]
    if "corrupt" in entry:
        where, corrupt = f"{where}, corrupt", entry["corrupt"]
        if not isinstance(corrupt, Mapping):
            if kind == "block":
                raise ValueError(
                    f"{where}: beside a block it is a mapping, such as {{tokens: [1, 2, 3]}}."
                )
            corrupt = {kind: corrupt}
        corrupt = _known(where, corrupt, CORRUPT_KEYS)
        kind = _content_key(where, corrupt, CORRUPT_KEYS[:3])
        other = {"name": f"{made[0].name}-corrupt", "content": _content(where, kind, corrupt[kind])}
        made.append(_probe(where, {**other, **_answers(where, corrupt)}))
    return made


def _probe(where: str, arguments: dict[str, Any]) -> Probe:
    try:
        return Probe(**arguments)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _content_key(where: str, given: Mapping[str, Any], kinds: Sequence[str]) -> str:
    there = [kind for kind in kinds if kind in given]
    if len(there) != 1:
        has = f"has {' and '.join(there)}" if there else f"has none of {', '.join(kinds)}"
        raise ValueError(f"{where} {has}; one of them says what the model is shown.")
    return there[0]


def _content(where: str, kind: str, value: Any) -> Any:
    """What `Probe` takes as content, of the types that it should be of."""
    if kind == "tokens":
        if not isinstance(value, list) or any(type(one) is not int for one in value):
            raise ValueError(f"{where}: tokens is a list of token ids, got {_shown(value)}.")
        return value
    if kind == "chat" and isinstance(value, list):
        for message in value:
            if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
                raise ValueError(
                    f"{where}: a message of chat is {{role: user, content: ...}}, got "
                    f"{_shown(message)}."
                )
            for key in ("role", "content"):
                _string(where, f"{key} of a message", message[key])
        return value
    _string(where, kind, value)
    return value if kind == "text" else [{"role": "user", "content": value}]


def _answers(where: str, given: Mapping[str, Any]) -> dict[str, str | int]:
    """Target and foil, as far as there."""
    found = {key: given[key] for key in ("target", "foil") if key in given}
    for key, value in found.items():
        if type(value) not in (str, int):
            raise ValueError(
                f"{where}: {key} is a string that is one token, or a token id, got "
                f"{_shown(value)}.{_quotes(value)}"
            )
    return found


def _words(content: str | Iterable[Any]) -> str:
    """What a probe is named by: the text, what the user says first, or the ids."""
    if isinstance(content, str):
        return content
    parts = list(content)
    if parts and isinstance(parts[0], Mapping):
        return next((one for one in parts if one["role"] == "user"), parts[0])["content"]
    return " ".join(str(one) for one in parts)


def _string(where: str, key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{where}: {key} is a string, got {_shown(value)}.{_quotes(value)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({kind_of(value)})"


def _quotes(value: Any) -> str:
    """What to do about a word that YAML takes for something else."""
    if isinstance(value, bool):
        return " YAML takes yes, no, on and off for booleans; put it in quotes."
    return "" if isinstance(value, list | Mapping | None) else " Put it in quotes."
