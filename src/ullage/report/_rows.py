"""Numbers side by side: a row per name, what differs most first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from ullage._bytes import format_bytes
from ullage.planner import Decision, Holding
from ullage.planner.plan._grouped import equal_units, together


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Bytes of one thing on each side; None: not known there."""

    name: str
    values: list[int | None]

    @property
    def change(self) -> int:
        """The last less the first; 0 if one of them is not known."""
        first, last = self.values[0], self.values[-1]
        return 0 if first is None or last is None else last - first

    @property
    def spread(self) -> int:
        """The largest less the smallest."""
        known = [v for v in self.values if v is not None]
        return max(known) - min(known) if known else 0


def rows(sides: Sequence[Mapping[str, int] | None]) -> list[Row]:
    """A row per name of any side, the largest spread first; 0 where a side has no such thing, None where it does not know."""
    names = dict.fromkeys(name for side in sides if side is not None for name in side)
    found = [Row(name, [None if side is None else side.get(name, 0) for side in sides]) for name in names]
    return sorted(found, key=lambda r: (-r.spread, -max(v or 0 for v in r.values)))


def by_module(holdings: Sequence[Holding]) -> dict[str, int]:
    """Bytes per module or unit, the largest first."""
    found: dict[str, int] = {}
    for h in holdings:
        found[h.module] = found.get(h.module, 0) + h.nbytes
    return dict(sorted(found.items(), key=lambda row: -row[1]))


def signed(nbytes: int) -> str:
    """A change in bytes."""
    return f"{'+' if nbytes >= 0 else '-'}{format_bytes(abs(nbytes))}"


@dataclass(frozen=True)
class UnitRow:
    """Units of one template with one action and one reason; bytes and seconds are of all of them."""

    name: str
    words: str
    ops: str
    nbytes: int
    seconds: float
    reason: str


def unit_rows(decisions: Iterable[Decision]) -> list[UnitRow]:
    """A row per group of equal units."""
    return [_unit_row(alike) for alike in equal_units(decisions)]


def _unit_row(alike: Sequence[Decision]) -> UnitRow:
    words, label = alike[0].words or alike[0].label, alike[0].label
    return UnitRow(
        together([d.unit for d in alike]),
        words,
        label if ":" in label and label != words else "",
        sum(d.bytes_freed for d in alike),
        sum(d.seconds_added for d in alike),
        alike[0].reason,
    )


def grouped(named: Iterable[tuple[str, str]]) -> list[str]:
    """Return `name: text` per entry; neighbours with the same text share a line, with the first and the last name."""
    runs: list[tuple[list[str], str]] = []
    for name, text in named:
        if runs and runs[-1][1] == text:
            runs[-1][0].append(name)
        else:
            runs.append(([name], text))
    return [f"{n[0] if len(n) == 1 else f'{n[0]} .. {n[-1]} ({len(n)})'}: {text}" for n, text in runs]
