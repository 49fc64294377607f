"""`compare`: plans, profiles, timelines, measurements and monitored runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from ullage._bytes import format_bytes, format_seconds
from ullage._errors import ArgumentError
from ullage._writers import write
from ullage.report._rows import Row, grouped, rows, signed
from ullage.report._sides import Compared, Side, know_owners, read, side

_ROWS = 12
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class UnitRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each side's option for one unit; None if that side has no such unit, or knows no units."""

    unit: str
    actions: list[str | None]


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Two or more side by side. `str(comparison)` is a table.

    Attributes:
        sides: what is compared, in the order given.
        by_category, by_module: bytes alive at the peak of each, what differs most first.
        units: those that are not treated alike.
        same_units: how many are.
        notes: why numbers may not compare.
    """

    sides: list[Side]
    by_category: list[Row]
    by_module: list[Row]
    units: list[UnitRow]
    same_units: int
    notes: list[str]

    def export(self, path: str | Path) -> None:
        """Write it as one HTML file that needs nothing else.

        Raises:
            ArgumentError: the ending is not .html, the folder is not there, or plotly or Jinja is not installed.
        """
        write(self, "export", path)

    def __str__(self) -> str:
        two = len(self.sides) == 2
        letters = LETTERS[: len(self.sides)]
        lines = ["compare"]
        for letter, s in zip(letters, self.sides, strict=True):
            on = f" on {s.device} (costs: {s.costs})" if s.device is not None else ""
            lines.append(f"  {letter}  {s.name}: {s.what}{on}")
            lines += [f"     peaks in {s.moment}"] if s.moment is not None else []
        lines.append(_line("", [*letters, *(["change"] if two else [])]))
        peaks = Row("peak", [s.peak_bytes for s in self.sides])
        lines.append(_line(peaks.name, _cells(peaks)))
        lines.append(_line("step time", _numbers([s.step_seconds for s in self.sides], format_seconds)))
        for name, rates in (
            ("samples/s", [s.samples_per_second for s in self.sides]),
            ("tokens/s", [s.tokens_per_second for s in self.sides]),
        ):
            if any(r is not None for r in rates):
                lines.append(_line(name, _numbers(rates, "{:,.1f}".format)))
        lines += [*_table("alive at the peak, by category", self.by_category), *_table("by module", self.by_module)]
        if self.units:
            lines.append(f"  units that differ ({self.same_units} do not)")
            said = said_of_units(self)
            lines += [f"    {line}" for line in said[:_ROWS]]
            lines += [f"    and {len(said) - _ROWS} more"] if len(said) > _ROWS else []
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])


def said_of_units(c: Comparison) -> list[str]:
    """Options of units that are not treated alike, in lines; neighbours with the same text share one."""
    return grouped([(u.unit, _said(u.actions)) for u in c.units])


def _said(actions: Sequence[str | None]) -> str:
    """Each action once, after the letters of those that take it."""
    by_action: dict[str, str] = {}
    for letter, action in zip(LETTERS, actions, strict=False):
        by_action[action or "-"] = by_action.get(action or "-", "") + letter
    return "; ".join(f"{letters} {action}" for action, letters in by_action.items())


def _table(title: str, found: list[Row]) -> Iterator[str]:
    """The rows that differ; of the others, how many bytes they are."""
    differ = [r for r in found if r.spread]
    if found:
        yield f"  {title}{'' if differ else ': the same'}"
    for r in differ[:_ROWS]:
        yield _line(f"  {r.name}", _cells(r))
    for few, what in ((differ[_ROWS:], "more that differ"), ([r for r in found if r not in differ], "that do not")):
        if few and differ:
            total = [sum(v or 0 for v in column) for column in zip(*(r.values for r in few), strict=True)]
            unknown = [all(v is None for v in column) for column in zip(*(r.values for r in few), strict=True)]
            values = [None if u else t for u, t in zip(unknown, total, strict=True)]
            yield _line(f"  {len(few)} {what}", _cells(Row("", values)))


def _cells(r: Row) -> list[str]:
    """The values, and for two of them the change."""
    cells = ["-" if v is None else format_bytes(v) for v in r.values]
    return [*cells, *([signed(r.change) if None not in r.values else "-"] if len(cells) == 2 else [])]


def _numbers(values: Sequence[float | None], said: Callable[[float], str]) -> list[str]:
    """The values, and for two of them the change in percent."""
    cells = ["-" if v is None else said(v) for v in values]
    if len(values) != 2:
        return cells
    a, b = values
    return [*cells, f"{b / a - 1:+.1%}" if a and b is not None else "-"]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<32} {' '.join(f'{c:>13}' for c in cells)}".rstrip()


def compare(*given: Compared | str | Path) -> Comparison:
    """Put two or more side by side: peaks, times, bytes alive at the peaks, and units' options.

    Args:
        given: each a `Plan`, `Profile`, `Timeline`, `Measurement`, `Baseline` or `MonitorSummary`, or the file of one (of a
            measurement: what `ullage measure --json` prints; of a monitored run: what its `jsonl=` named).

    Raises:
        ArgumentError: fewer than two, or something else.
        PlanError: a file can't be read.
    """
    if not 2 <= len(given) <= len(LETTERS):
        raise ArgumentError(
            f"compare: expected 2 to {len(LETTERS)} plans, profiles, timelines, measurements or runs, got {len(given)}"
        )
    found = [(read(x), str(x)) if isinstance(x, str | Path) else (x, None) for x in given]
    for x, _ in found:
        if not isinstance(x, Compared):
            raise ArgumentError(
                f"compare: expected plans, profiles, timelines, measurements, runs or their files, got a {type(x).__name__}"
            )
    owners = know_owners([x for x, _ in found])
    sides = [side(x, name, owners) for x, name in found]
    units, same = _units(sides)
    return Comparison(
        sides=sides,
        by_category=rows([s.by_category for s in sides]),
        by_module=rows([s.by_module for s in sides]),
        units=units,
        same_units=same,
        notes=list(_notes(sides)),
    )


def _units(sides: Sequence[Side]) -> tuple[list[UnitRow], int]:
    """Units with more than one action among the sides that know units, and how many others there are."""
    known = [s.actions for s in sides if s.actions is not None]
    names = dict.fromkeys(name for actions in known for name in actions)
    differ = [n for n in names if len({actions.get(n) for actions in known}) > 1]
    found = [UnitRow(n, [None if s.actions is None else s.actions.get(n) for s in sides]) for n in differ]
    return found, len(names) - len(found)


def _notes(sides: Sequence[Side]) -> Iterator[str]:
    for what, values in (("devices", [s.device for s in sides]), ("costs", [s.costs for s in sides])):
        if len({v for v in values if v is not None}) > 1:
            yield f"{what} differ: {', '.join(v or 'measured' for v in values)}"
    for letter, s in zip(LETTERS, sides, strict=False):
        if s.device is not None and s.by_category is None:
            yield f"{letter} does not say what is alive at its peak; a timeline of it does"
        if s.no_peak:
            yield f"{letter} has no peak: {s.no_peak}"
