"""The rows of a plan's text: units of equal names, actions and effects share one."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from ullage._bytes import format_bytes, format_seconds
from ullage.runtime.ops._keep import consecutive

WIDTH = 76  # of 80 columns, less the indentation


class Decided(Protocol):
    """A decision of a plan: see `ullage.Decision`."""

    @property
    def unit(self) -> str: ...
    @property
    def label(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def bytes_freed(self) -> int: ...
    @property
    def seconds_added(self) -> float: ...


D = TypeVar("D", bound=Decided)


def equal_units(decisions: Iterable[D], by_label: bool = True) -> list[list[D]]:
    """Decisions of one template, action and reason together, in the order of the first of each; `by_label`: and of the same ops."""
    groups: dict[tuple[str, ...], list[D]] = {}
    for d in decisions:
        key = template(d.unit), d.words or d.label, d.reason, d.label if by_label else ""
        groups.setdefault(key, []).append(d)
    return list(groups.values())


def rows_of(decisions: Iterable[Decided], verbose: bool = False) -> list[str]:
    """The decisions as lines: which units, what is done, what that frees and adds in all, and why."""
    lines = []
    for alike in equal_units(decisions, verbose):
        words, reason, raw = alike[0].words or alike[0].label, alike[0].reason, alike[0].label if verbose else ""
        freed, added = sum(d.bytes_freed for d in alike), sum(d.seconds_added for d in alike)
        total = " in all" if len(alike) > 1 else ""
        effect = f"frees {format_bytes(freed)}, adds {format_seconds(added)}{total}; " if freed or added else ""
        lines += textwrap.wrap(
            f"{together([d.unit for d in alike])}: {words}",
            WIDTH,
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        lines += textwrap.wrap(
            f"{effect}{reason}", WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False
        )
        lines += [f"  {raw}"] if ":" in raw and raw != words else []
    return lines


def wrapped(line: str) -> list[str]:
    """A line of two leading blanks as lines of 80 columns; what follows is indented further."""
    return textwrap.wrap(
        line.strip(),
        WIDTH + 4,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def template(name: str) -> str:
    """A name without its numbers: equal layers have equal ones."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts `layers.2` before `layers.10`."""
    return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def together(names: Sequence[str]) -> str:
    """Names of one template as one: `layers.0-3,7 (5)`; names in which several numbers differ as first .. last."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    differ = [k for k in range(len(parts[0])) if len({p[k] for p in parts}) > 1]
    if len(differ) != 1:
        return f"{names[0]} .. {names[-1]} ({len(names)})"
    runs = consecutive(sorted(int(p[differ[0]]) for p in parts))
    parts[0][differ[0]] = ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    return f"{'.'.join(parts[0])} ({len(names)})"
