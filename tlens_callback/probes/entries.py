"""Reads files that list entries, as YAML, JSON or JSON lines, and says where each entry stands."""

import json
from pathlib import Path
from typing import Any

import yaml

LISTS, LINES = (".yaml", ".yml", ".json"), (".jsonl", ".ndjson")
ENDINGS = (*LISTS, *LINES)


def entries_in(path: Path) -> list[tuple[str, Any]]:
    """Reads the place of each entry, in words, and the entry; an empty file has none.

    Raises:
        ValueError: no such file, another ending, not UTF-8, not YAML or JSON, no list; a key twice
            in one mapping.
    """
    if not path.is_file():
        why = "it is a directory" if path.is_dir() else f"looked for from {Path.cwd()}"
        raise ValueError(f"There is no file of probes {path}: {why}.")
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(
            f"{path}: the name of a file of probes ends in one of {', '.join(ENDINGS)}, by "
            f"its format. Rename the file."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text, as its byte {error.start} shows. Save it as UTF-8."
        ) from error
    return _lines(path, text) if path.suffix.lower() in LINES else _list(path, text)


def kind_of(value: Any) -> str:
    """Names the type of a value in words."""
    names = {dict: "mapping", str: "string", int: "number", float: "number", bool: "boolean"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


_DEEPEST = 50
"""Levels of lists and mappings; an entry has five."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases, and a key that stands twice in one entry; YAML takes the last one, also
    where the dash of the second entry was forgotten."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias in an alias, some levels deep, makes gigabytes of a few lines.
        self._depth += 1
        if self._depth > _DEEPEST:
            raise RecursionError
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="an alias (*name) cannot be used; write the text again", problem_mark=mark
            )
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: list[Any] = []
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} stands twice in one entry; is a '- ' missing",
                    problem_mark=key.start_mark,
                )
            keys.append(key.value)
        return super().construct_mapping(node, deep)


def _list(path: Path, text: str) -> list[tuple[str, Any]]:
    """Reads the entries of a YAML or JSON list, with their places."""
    entries: Any = None
    at: list[str] = []
    try:
        if path.suffix.lower() == ".json":
            entries = _json(text) if text.strip() else None
        else:
            loader = _Loader(text)
            if (node := loader.get_single_node()) is not None:
                nodes = [one for one in node.value if isinstance(one, yaml.Node)]
                at = [f" (line {one.start_mark.line + 1})" for one in nodes]
                entries = loader.construct_document(node)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error.msg}, line {error.lineno}, column {error.colno}."
        ) from error
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        hint = "Put a text with ': ' or ' #' in it in quotes."
        if "\\t" in str(problem):
            hint = "YAML has no tabs before a key; indent with spaces."
        raise ValueError(f"{path} is not valid YAML: {problem}{place}. {hint}") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a list of probes: it is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).rstrip('.')}.") from error
    if not isinstance(entries := entries or [], list):
        raise ValueError(
            f"{path} must be a list of probes, but holds a {kind_of(entries)}. In YAML each "
            f"probe begins with '- '; in JSON the list stands in [ ]."
        )
    at = at or [""] * len(entries)
    return [(f"{path}, entry {i + 1}{at[i]}", entry) for i, entry in enumerate(entries)]


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """Reads the entries of JSON lines, with their places."""
    found = []
    # Not splitlines: a JSON string may hold other signs that end a line.
    for i, line in enumerate(text.split("\n"), start=1):
        where = f"{path}, line {i}"
        if not line.strip():
            continue
        try:
            found.append((where, _json(line)))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{where} is not JSON: {error.msg}, column {error.colno}. Each line must be a "
                f"whole entry; put a list over several lines into a file that ends in .json."
            ) from error
        except RecursionError as error:
            raise ValueError(f"{where} is nested too deeply to be a probe.") from error
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).rstrip('.')}.") from error
    return found


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_without_repeats)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {max(keys, key=keys.count)!r} stands twice in one entry.")
    return found
