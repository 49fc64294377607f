"""The timeline in Chrome's trace event format, which ui.perfetto.dev and chrome://tracing read.

Three lanes of nested slices (phases; modules with their ops; the same for recomputed ops), two of tensors that are offloaded and brought
back, a counter track per category of live bytes, one for their sum, one for the budget, and a mark at the peak. Times are in µs, with
three decimals; slices of a lane nest, as the format requires.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import msgspec
import numpy as np

from ullage._bytes import format_bytes
from ullage.report._records import PHASES, Array, where
from ullage.report._timeline import Timeline

PID = 1
LANES = {1: "phases", 2: "modules", 3: "recomputed", 4: "offloaded", 5: "brought back"}
LIVE, TOTAL, BUDGET = "live bytes", "live bytes, all", "budget"
Level = tuple[Hashable, str]  # what tells it from the one before, and its name


def chrome_trace(t: Timeline) -> bytes:
    """The trace as JSON."""
    trace = _Trace(t)
    what = f"plan ({t.policy})" if t.plan_digest else "plain step"
    # the unit comes first: Perfetto looks for it before the events; and "ns" would make it read times as such
    data = {
        "displayTimeUnit": "ms",
        "traceEvents": list(trace.events(f"ullage: predicted, {what} on {t.device}")),
        "otherData": {"peak_bytes": t.peak_bytes, "plan_digest": t.plan_digest, "device": t.device, "costs": t.costs},
    }
    return msgspec.json.encode(data)


class _Trace:
    def __init__(self, t: Timeline) -> None:
        self.t = t
        seconds = np.concatenate([t.start_seconds, [t.start_seconds[-1] + t.events.seconds.values[-1]]])
        self.edges = np.round(seconds * 1e9).astype(np.int64).tolist()  # ns; event i is from edges[i] to edges[i + 1]
        names = t.modules
        self.paths = [[names[m] for m in stack] for stack in t.stacks]
        self.phase, self.micro = t.events.phase.values.tolist(), t.events.micro_batch.values.tolist()
        self.stack, self.again = t.events.stack.values.tolist(), t.events.recomputed.values.tolist()
        self.op = [t.ops[k] for k in t.events.op.values]
        # number of the run of replayed ops
        self.replay = np.cumsum(np.diff(t.events.recomputed.values, prepend=0) == 1).tolist()

    def events(self, title: str) -> Iterator[dict[str, Any]]:
        yield {"ph": "M", "name": "process_name", "pid": PID, "args": {"name": title}}
        for tid, name in LANES.items():
            if tid > 3 and not self.t.transfers:
                continue
            yield {"ph": "M", "name": "thread_name", "pid": PID, "tid": tid, "args": {"name": name}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": PID, "tid": tid, "args": {"sort_index": tid}}
        everything = range(len(self.t))
        yield from self._lane(1, everything, self._in_phases)
        yield from self._lane(2, [i for i in everything if not self.again[i]], self._in_modules)
        yield from self._lane(3, [i for i in everything if self.again[i]], self._in_replays)
        yield from self._transfers()
        yield from self._counters()
        yield self._peak()

    def _in_phases(self, i: int) -> list[Level]:
        step = "first step" if i < self.t.first_events else "later step"
        levels: list[Level] = [(step, step)]
        if self.micro[-1]:
            levels.append((self.micro[i], f"micro-batch {self.micro[i]}"))
        return [*levels, (self.phase[i], PHASES[self.phase[i]])]

    def _in_modules(self, i: int) -> list[Level]:
        part = (i < self.t.first_events, self.micro[i], self.phase[i])
        modules = [(m, m or "(root)") for m in self.paths[self.stack[i]]]
        return [(part, PHASES[self.phase[i]]), *modules, (i, self.op[i])]

    def _in_replays(self, i: int) -> list[Level]:
        modules = [((self.replay[i], m), m or "(root)") for m in self.paths[self.stack[i]]]
        return [*modules, (i, self.op[i])]

    def _lane(self, tid: int, chosen: Iterable[int], levels: Callable[[int], list[Level]]) -> Iterator[dict[str, Any]]:
        """Slices, each after those it lies in. Neighbours with the same levels above them share these."""
        found: list[list[Any]] = []  # name, first event, last event
        open_keys: list[tuple[Hashable, int]] = []  # and which slice it is
        for i in chosen:
            path = levels(i)
            same = 0
            while same < min(len(open_keys), len(path)) and open_keys[same][0] == path[same][0]:
                same += 1
            del open_keys[same:]
            for key, name in path[same:]:
                open_keys.append((key, len(found)))
                found.append([name, i, i])
            for _, k in open_keys:
                found[k][2] = i
        for name, first, last in found:
            begin, end = self.edges[first], self.edges[last + 1]
            made = {
                "ph": "X",
                "name": name,
                "cat": LANES[tid],
                "pid": PID,
                "tid": tid,
                "ts": _us(begin),
                "dur": _us(end - begin),
            }
            if first == last and name == self.op[first]:
                source = self.t.sources[self.t.events.source.values[first]]
                made["args"] = {"event": first, "source": source, "live_bytes": int(self.t.live_bytes[first])}
            yield made

    def _transfers(self) -> Iterator[dict[str, Any]]:
        for x in self.t.transfers:
            tid = 4 if x.out else 5
            begin, end = (round(s * 1e9) for s in (x.start_seconds, x.start_seconds + x.seconds))
            yield {
                "ph": "X",
                "name": format_bytes(x.nbytes),
                "cat": LANES[tid],
                "pid": PID,
                "tid": tid,
                "ts": _us(begin),
                "dur": _us(end - begin),
                "args": {"bytes": x.nbytes},
            }

    def _counters(self) -> Iterator[dict[str, Any]]:
        live: dict[str, Array] = self.t.live_by_category
        table = np.stack([*live.values()], axis=1)
        changed = np.flatnonzero(np.any(np.diff(table, axis=0, prepend=-1) != 0, axis=1))
        for i, row in zip(changed.tolist(), table[changed].tolist(), strict=True):
            yield self._counter(LIVE, i, dict(zip(live, row, strict=True)))
            yield self._counter(TOTAL, i, {"bytes": sum(row)})
        if self.t.budget_bytes is not None:
            yield self._counter(BUDGET, 0, {"bytes": self.t.budget_bytes})

    def _counter(self, name: str, i: int, values: dict[str, int]) -> dict[str, Any]:
        return {"ph": "C", "name": name, "pid": PID, "tid": 1, "ts": _us(self.edges[i]), "args": values}

    def _peak(self) -> dict[str, Any]:
        at = self.t.peak
        name = f"peak {format_bytes(self.t.peak_bytes)}: {where(at)}"
        start = _us(self.edges[at.index])
        return {
            "ph": "i",
            "s": "p",
            "name": name,
            "pid": PID,
            "tid": 1,
            "ts": start,
            "args": {"event": at.index, "source": at.source},
        }


def _us(ns: int) -> float:
    """Nanoseconds as µs that readers turn back into the same nanoseconds, whether they round (Perfetto) or cut off (older ones)."""
    us = ns / 1e3
    return us if int(us * 1e3) >= ns else math.nextafter(us, math.inf)
