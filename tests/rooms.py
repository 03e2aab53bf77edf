"""Who imports whom: read from the sources of a package, and from the tables of its plan."""

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """What one file imports.

    Attributes:
        file: the file, below the package: "shadow/weights.py".
        module: what it imports, a module: "tlens_callback.probes.batch", "wandb.errors".
        wants: the file of that module, "probes/batch.py"; None for one of another package.
        when: "start": when the file is imported itself; "late": inside a function; "types": for a
            type checker alone.
    """

    file: str
    module: str
    wants: str | None
    when: str


@dataclass(frozen=True)
class Plan:
    """What the tables of the plan say.

    Attributes:
        rooms: room -> the rooms that it may import, from the roof to the ground.
        libraries: library -> the rooms and files that may import it.
    """

    rooms: dict[str, frozenset[str]]
    libraries: dict[str, frozenset[str]]


def room(file: str) -> str:
    """The room of a file: "shadow/" of "shadow/weights.py", and "reading.py" of itself."""
    folder, slash, _ = file.partition("/")
    return folder + slash


def imports(package: Path) -> list[Import]:
    """Every import in every file of the package, those in functions and for types too."""
    files = [path.relative_to(package).as_posix() for path in sorted(package.rglob("*.py"))]
    names = {_name(file, package.name): file for file in files}
    return [
        Import(file, module, _file_of(module, names), when)
        for name, file in names.items()
        for node, when in _parsed((package / file).read_text())
        for module in _modules(node, name, file.endswith("__init__.py"), names)
    ]


def _name(file: str, package: str) -> str:
    return ".".join((package, *Path(file).with_suffix("").parts)).removesuffix(".__init__")


def _file_of(module: str, names: dict[str, str]) -> str | None:
    """`import a.b` may name a class of `a`."""
    while module and module not in names:
        module = module.rpartition(".")[0]
    return names.get(module)


@cache
def _parsed(source: str) -> list[tuple[ast.Import | ast.ImportFrom, str]]:
    """The import statements of a file, and when each is run."""
    return list(_statements(ast.parse(source), "start"))


def _statements(node: ast.AST, when: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _statements(ast.Module(child.body, []), "types")
            yield from _statements(ast.Module(child.orelse, []), when)
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) and when == "start":
            yield from _statements(child, "late")
        else:
            yield from _statements(child, when)


def _modules(
    node: ast.Import | ast.ImportFrom, name: str, is_package: bool, names: Collection[str]
) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    # One dot is the package of the file, each further one the package above it.
    up = node.level - is_package
    parts = name.split(".")
    above = parts[: len(parts) - up] if node.level else []
    base = ".".join([*above, *filter(None, [node.module])])
    for alias in node.names:
        inside = f"{base}.{alias.name}"
        yield inside if inside in names else base


def plan(page: str) -> Plan:
    """Reads the tables of a page whose first lines begin with "| room |" and "| library |": the
    first cell of a row is about what the last one says.

    Raises:
        ValueError: for a room in two rows, or one that may import what is not below it.
    """
    rooms: dict[str, frozenset[str]] = {}
    rows = _table(page, "room")
    below = {name for cell, _ in rows for name in _quoted(cell)}
    for cell, allowed in rows:
        here = _quoted(cell)
        below -= set(here)
        may = frozenset(below) if allowed == "everything below" else frozenset(_quoted(allowed))
        if wrong := sorted(may - below):
            raise ValueError(f"{here} may import {wrong}, which the table does not have below.")
        if twice := rooms.keys() & set(here):
            raise ValueError(f"{twice} are in two rows.")
        rooms |= dict.fromkeys(here, may)
    libraries = {
        library: frozenset(_quoted(only))
        for cell, only in _table(page, "library")
        for library in _quoted(cell)
    }
    return Plan(rooms, libraries)


def _table(page: str, title: str) -> list[tuple[str, str]]:
    found = re.search(rf"^\| {title} \|.*\n\|[ -|]*\n((?:\|.*\n)+)", page, flags=re.M)
    if found is None:
        raise ValueError(f"The page has no table of which the first column is {title!r}.")
    rows = [line.strip("|").split("|") for line in found[1].splitlines()]
    return [(cells[0].strip(), cells[-1].strip()) for cells in rows]


def _quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def not_allowed(given: Collection[Import], plan: Plan) -> list[Import]:
    """The imports between rooms that the plan does not allow."""
    return [
        one
        for one in given
        if one.wants is not None
        and room(one.file) not in ("__init__.py", room(one.wants))
        and room(one.wants) not in plan.rooms.get(room(one.file), ())
    ]


def misplaced(given: Collection[Import], plan: Plan) -> list[Import]:
    """The imports of libraries that the plan keeps to other rooms."""
    return [
        one
        for one in given
        if one.wants is None
        and (only := plan.libraries.get(one.module.split(".")[0])) is not None
        and only.isdisjoint([one.file, room(one.file)])
    ]


def circle(given: Collection[Import]) -> list[str]:
    """Files that import each other in a circle, one after another; none where there is no circle.

    Who imports `a.b.c` imports `a` and `a.b` before it, unless it is inside them.
    """
    after: dict[str, set[str]] = {}
    for one in given:
        if one.wants is not None:
            parts = one.wants.split("/")[:-1]
            packages = ["/".join([*parts[:i], ""]) for i in range(1, len(parts) + 1)]
            before = {f"{p}__init__.py" for p in packages if not one.file.startswith(p)}
            after.setdefault(one.file, set()).update({one.wants, *before})
    # What imports nothing but what is in no circle is in no circle either.
    while True:
        left = {file: others & after.keys() for file, others in after.items()}
        left = {file: others for file, others in left.items() if others}
        if left == after:
            break
        after = left
    path = sorted(after)[:1]
    while path and (onward := min(after[path[-1]])) not in path:
        path.append(onward)
    return [*path[path.index(onward) :], onward] if path else []
