"""Names of units for people: which units a glob stands for, and a glob that stands for several."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matching(glob: str, fqns: Sequence[str]) -> list[str]:
    """Return the FQNs that a glob matches; `*` matches dots too, as it does in `units=`."""
    return [f for f in fqns if fnmatchcase(f, glob)]


def glob_of(fqns: Sequence[str], among: Sequence[str]) -> str:
    """Return a glob that matches these FQNs and no other of `among`, with `*` for the parts that differ; else a list of names."""
    parts = [f.split(".") for f in fqns]
    if len({len(p) for p in parts}) == 1:
        glob = ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))
        if len(matching(glob, among)) == len(fqns):
            return glob
    return ", ".join(fqns) if len(fqns) < 4 else f"{fqns[0]} .. {fqns[-1]} ({len(fqns)} units)"


def units_of(n: int, kind: str = "") -> str:
    """Return `1 unit`, `3 Block units`, ..."""
    return f"{n} {kind + ' ' if kind else ''}unit{'' if n == 1 else 's'}"
