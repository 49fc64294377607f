"""Captured steps as tables: what each segment of a step needs under each option, and what units hold meanwhile."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ullage.capture._timeline import segment_keys
from ullage.mechanisms import KEEP, RECOMPUTE
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._study import Study

Key = tuple[str, str, int, int]  # phase, unit, call, and a number where these repeat


@dataclass
class Segment:
    """Live bytes at a segment's start, the most in it, and its time."""

    start: int
    peak: int
    seconds: float


def _segments(s: Study, capture: StepCapture, units: frozenset[str]) -> list[tuple[Key, Segment]]:
    session = capture.session
    calls = sorted(
        (c for c in session.calls if c.fqn in units and capture.ops.start <= c.first_op < capture.ops.stop),
        key=lambda c: c.first_sequence,
    )
    seen: dict[str, int] = {}
    for i, c in enumerate(calls):  # calls are numbered within the step, so that captures of different steps compare
        seen[c.fqn] = seen.get(c.fqn, -1) + 1
        calls[i] = replace(c, index=seen[c.fqn])
    t = s.timeline(session)
    return [
        (key, Segment(int(t.before[a]), int(t.peak[a:b].max()), float(t.seconds[a:b].sum())))
        for key, a, b in segment_keys(session.trace, capture.ops, session.tracker.stacks, units, calls)
    ]


class Tables:
    """A study's captures, segment by segment, by the plain step's segments.

    Attributes:
        names: labels of the captures, the plain step first.
        of: by label and segment key, the segment.
        base_name: the capture in which every unit is recomputed; the plain step, if no unit can be.
        held: by label, the bytes that each unit holds beyond the base.
    """

    def __init__(self, s: Study) -> None:
        self._order, self._workspace = tuple(u.fqn for u in s.units), s.device.facts.blas_workspace_bytes
        self._rank = rank = {f: u for u, f in enumerate(self._order)}
        self.names = [KEEP.name, *(n for n in s.captures if n != KEEP.name)]
        captured = {n: _segments(s, s.captures[n], frozenset(rank)) for n in self.names}
        self._keys = [k for k, _ in captured[KEEP.name]]
        self.of = {n: _align(self._keys, captured[n]) for n in self.names}
        self.base_name = RECOMPUTE.name if RECOMPUTE.name in s.captures else KEEP.name
        self._base = {k: self.of[self.base_name][k].start for k in self._keys}
        self.held = {
            n: _held(self._keys, [self.of[n][k].start - b for k, b in self._base.items()], rank) for n in self.names
        }
        self._active = dict(zip(self._keys, _active(self._keys, rank), strict=True))
        self._most = [max(self.held[n][u] for n in self.names) for u in rank.values()]
        self._own: dict[int, list[Key]] = {u: [] for u in rank.values()}
        for key in self._keys:
            if key[1] in rank:
                self._own[rank[key[1]]].append(key)

    def outside_peaks(self) -> list[int]:
        """Return, by the number of units that are active, the most that a segment outside units needs beside what they hold."""
        found = [0] * (len(self._order) + 1)
        for key in (k for k in self._keys if k[1] not in self._rank):
            active = self._active[key]
            prefix = max(active, default=-1) + 1
            rest = (self.of[n][key].peak - sum(self.held[n][w] for w in active) + self._workspace for n in self.names)
            found[prefix] = max(found[prefix], *rest)
        return found

    def matches(self, u: int, v: int) -> bool:
        """Does unit u run in this step, and has v a segment for each of its segments?"""
        return bool(self._own[u]) and all(self._as(key, v) in self._base for key in self._own[u])

    def own_peak(self, u: int, v: int, n: str) -> int:
        """Return the most that unit u's own segments need, as v's did in capture n, if each later unit holds the most it could."""
        found = [0]
        for key in self._own[u]:
            shown = self._as(key, v)
            rest = self.of[n][shown].peak - sum(self.held[n][w] for w in self._active[shown] if w != v)
            later = sum(self._most[w] for w in self._active[key] if w > u)
            found.append(rest + self._base[key] - self._base[shown] + later + self._workspace)
        return max(found)

    def added_seconds(self, u: int, n: str) -> float:
        """Return by how much a unit's own segments take longer in a capture than in the plain step."""
        return sum(self.of[n][key].seconds - self.of[KEEP.name][key].seconds for key in self._own[u])

    def _as(self, key: Key, v: int) -> Key:
        return (key[0], self._order[v], *key[2:])


def _align(keys: list[Key], segments: list[tuple[Key, Segment]]) -> dict[Key, Segment]:
    """Return segments by the plain step's keys; a segment without a counterpart is merged into the one before."""
    wanted, found, last = set(keys), {}, None
    for key, segment in segments:
        if key in wanted:
            found[key] = segment
            last = key
        elif last is not None:
            f = found[last]
            found[last] = Segment(f.start, max(f.peak, segment.peak), f.seconds + segment.seconds)
    before = Segment(segments[0][1].start, segments[0][1].start, 0.0)
    for key in keys:  # a segment without ops in this capture starts and peaks where the one before starts
        before = found.setdefault(key, Segment(before.start, before.start, 0.0))
    return found


def _held(keys: list[Key], delta: list[int], rank: dict[str, int]) -> list[int]:
    """Return, per unit, the bytes that its forward adds to the difference from the base, summed over a micro-batch's calls.

    Growth outside units, before their backward starts, is charged to the unit before: it holds an output that the base has
    released by then (kept logits, for example).
    """
    held = [0] * len(rank)
    latest: int | None = None
    for i, key in enumerate(keys[:-1]):
        unit, grown = rank.get(key[1]), delta[i + 1] - delta[i]
        if unit is not None and key[0] == "backward":
            break
        if unit is not None:
            held[unit] += grown
            latest = unit
        elif latest is not None:
            held[latest] += max(grown, 0)
    return held


def _active(keys: list[Key], rank: dict[str, int]) -> list[set[int]]:
    """Return, per segment, the units whose forward is done and whose (last) backward has not ended."""
    last = {k[1:3]: i for i, k in enumerate(keys) if k[0] == "backward"}
    open_calls: dict[int, set[int]] = {}
    result = []
    for i, key in enumerate(keys):
        result.append({u for u, calls in open_calls.items() if calls})
        unit, call = rank.get(key[1]), key[2]
        if unit is None:
            continue
        if key[0] == "forward":
            open_calls.setdefault(unit, set()).add(call)
        elif last[key[1:3]] == i:
            open_calls.get(unit, set()).discard(call)
    return result
