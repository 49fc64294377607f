"""Names of units for people: which units a glob stands for, and a glob that stands for several."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase


def matching(glob: str, fqns: Sequence[str]) -> list[str]:
    """The FQNs a glob stands for; `*` runs over dots too, as it does in `units=`."""
    return [f for f in fqns if fnmatchcase(f, glob)]


def glob_of(fqns: Sequence[str], among: Sequence[str]) -> str:
    """A glob for several FQNs and no other of `among`: what differs is `*`. Without one, in words."""
    parts = [f.split(".") for f in fqns]
    if len({len(p) for p in parts}) == 1:
        glob = ".".join(names[0] if len(set(names)) == 1 else "*" for names in zip(*parts, strict=True))
        if len(matching(glob, among)) == len(fqns):
            return glob
    return ", ".join(fqns) if len(fqns) < 4 else f"{fqns[0]} .. {fqns[-1]} ({len(fqns)} units)"


def units_of(n: int, kind: str = "") -> str:
    """`1 unit`, `3 Block units`."""
    return f"{n} {kind + ' ' if kind else ''}unit{'' if n == 1 else 's'}"
