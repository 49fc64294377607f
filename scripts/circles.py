"""List the circles of the import graph of src/ullage, by file and by folder. Fails if there are any.

Imports for types only and imports inside functions count: a circle of these runs, but cannot be read or moved in parts.

    python scripts/circles.py            all
    python scripts/circles.py planner    those that some file of this folder is in; several may be named
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "ullage"
Graph = dict[str, set[str]]


def modules(source: Path) -> dict[str, Path]:
    """Every module of a package, by its dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: Path) -> Graph:
    """Per module, the modules of the package that it imports. A package stands for its `__init__`.

    `from package import name` is an import of the module that gives the name to the package, as a reader follows it.
    """
    files = modules(source)
    trees = {name: ast.parse(path.read_text()) for name, path in files.items()}
    given = {name: _given(trees[name], files) for name, path in files.items() if path.name == "__init__.py"}
    graph: Graph = {}
    for name, tree in trees.items():
        graph[name] = {_origin(m, files, given) for m in _named(tree)} & files.keys() - {name}
    return graph


def _named(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def _given(tree: ast.AST, files: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Where the names of a package come from."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in files:
            found |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    return found


def _origin(
    named: tuple[str, str], files: Mapping[str, Path], given: Mapping[str, Mapping[str, tuple[str, str]]]
) -> str:
    module, name = named
    if f"{module}.{name}" in files:
        return f"{module}.{name}"
    further = given.get(module, {}).get(name)
    return _origin(further, files, given) if further is not None and further != named else module


def by_folder(graph: Graph, source: Path) -> Graph:
    """The same between folders; a file right in the package stands for itself."""
    files = modules(source)

    def room(name: str) -> str:
        whole = name if files[name].name == "__init__.py" else name.rpartition(".")[0]
        return name if whole == source.name else whole

    found: Graph = {}
    for name, targets in graph.items():
        found.setdefault(room(name), set()).update(room(t) for t in targets)
    return {name: targets - {name} for name, targets in found.items()}


def circles(graph: Graph) -> list[list[str]]:
    """Sets of modules of which each leads to each other: strongly connected components of more than one (Tarjan, 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10 * len(graph)))
    for name in sorted(graph):
        if name not in index:
            visit(name)
    return sorted(found)


def main(folders: list[str]) -> int:
    """Print the circles; 1 if there are any."""
    graph, failed = imports(SOURCE), 0
    for kind, found in (("files", circles(graph)), ("folders", circles(by_folder(graph, SOURCE)))):
        if folders:
            found = [c for c in found if any(f in name.split(".") for f in folders for name in c)]
        print(f"{kind}: {len(found)} circle{'' if len(found) == 1 else 's'}")
        for names in found:
            print(f"  {len(names)}: {', '.join(names)}")
        failed += len(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
