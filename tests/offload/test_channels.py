"""The simulation of channels against a second one that goes tick by tick; the choice against all choices."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.planner.model._with_tier import WINDOWS, Pace, events_of, solve_with_tier
from ullage.planner.study._tiers import Disk
from ullage.solver._channels import COMPUTE, IN, OUT, Channels, Event, overlap
from ullage.solver._instance import OptionFacts, StepModel
from ullage.solver._schedule import Single, flat

WRITE, READ = 2, 1  # bytes a tick


@dataclass
class Ticks:
    """Time in whole ticks; what ends with a tick is over before the program goes on."""

    window: int
    more: int
    wake: int
    now: int = 0
    stalled: int = 0
    writing: list[list[int]] = field(default_factory=list)  # [ticket, ticks left]
    reading: list[list[int]] = field(default_factory=list)
    backlog: dict[int, int] = field(default_factory=dict)  # bytes, by ticket
    ahead: dict[int, int] = field(default_factory=dict)
    waiting: list[int] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    there: set[int] = field(default_factory=set)
    size: dict[int, int] = field(default_factory=dict)
    most: int = 0

    def tick(self) -> None:
        self.now += 1
        for queue in (self.writing, self.reading):
            if queue:
                queue[0][1] -= 1
                if not queue[0][1]:
                    ticket = queue.pop(0)[0]
                    if queue is self.writing:
                        self.backlog.pop(ticket, None)
                    else:
                        self.there.add(ticket)

    def stall(self, over: Callable[[], bool]) -> None:
        if over():
            return
        while not over():
            self.stalled += 1
            self.tick()
        for _ in range(self.wake):
            self.stalled += 1
            self.tick()

    def stall_for_room(self, nbytes: int) -> None:
        while sum(self.backlog.values()) + nbytes > self.window:
            before = len(self.backlog)
            self.stall(lambda before=before: len(self.backlog) < before)

    def start(self) -> None:
        while self.waiting:
            ticket = self.waiting[0]
            if self.size[ticket] <= self.window:
                if sum(self.ahead.values()) + self.size[ticket] > self.window:
                    break
                self.ahead[ticket] = self.size[ticket]
                if any(w[0] == ticket for w in self.writing):
                    self.there.add(ticket)
                else:
                    self.reading.append([ticket, self.more + self.size[ticket] // READ])
            self.waiting.pop(0)
        self.most = max(self.most, sum(self.backlog.values()) + sum(self.ahead.values()))


def reference(events: list[Event], window: int, more: int = 0, wake: int = 0) -> tuple[int, int, int]:
    """(ticks, stalled ticks, most bytes in the window); each transfer takes `more` ticks than its bytes do, a wait `wake`."""
    t, left, order = Ticks(window, more, wake), Counter(int(w) for k, w, _ in events if k == IN), list[int]()

    def foresee(before: int) -> None:
        for other in reversed(order[: order.index(before)]):
            if left[other] and other not in t.asked:
                t.asked.add(other)
                t.waiting.append(other)
        t.start()

    for kind, what, nbytes in events:
        ticket = int(what)
        if kind == COMPUTE:
            for _ in range(ticket):
                t.tick()
        elif kind == OUT:
            if nbytes <= window:
                t.stall_for_room(nbytes)
            t.size[ticket] = nbytes
            order.append(ticket)
            t.writing.append([ticket, more + nbytes // WRITE])
            if nbytes <= window:
                t.backlog[ticket] = nbytes
                t.most = max(t.most, sum(t.backlog.values()) + sum(t.ahead.values()))
            else:
                t.stall(lambda ticket=ticket: all(w[0] != ticket for w in t.writing))
        else:
            left[ticket] -= 1
            if ticket in t.ahead:
                t.stall(lambda ticket=ticket: ticket in t.there)
                t.ahead.pop(ticket)
                foresee(ticket)
            elif any(w[0] == ticket for w in t.writing):
                foresee(ticket)
            else:
                t.waiting = [w for w in t.waiting if w != ticket]
                t.reading.append([ticket, more + t.size[ticket] // READ])
                foresee(ticket)
                t.stall(lambda ticket=ticket: ticket in t.there)
            t.start()
    return t.now, t.stalled, t.most


def random_events(rng: random.Random) -> list[Event]:
    events: list[Event] = []
    ticket = 0
    for _ in range(rng.randint(1, 2)):  # micro-batches
        sent = []
        for _ in range(rng.randint(1, 7)):
            events.append((COMPUTE, rng.randint(0, 12), 0))
            if rng.random() < 0.8:
                ticket += 1
                sent.append(ticket)
                events.append((OUT, ticket, 2 * rng.randint(1, 10)))
        events.append((COMPUTE, rng.randint(0, 10), 0))
        for mine in reversed(sent):
            events += [(IN, mine, 0), (COMPUTE, rng.randint(0, 20), 0)]
    return events


@pytest.mark.parametrize("seed", range(6))
def test_two_simulations_agree(seed: int) -> None:
    rng = random.Random(seed)
    stalls = 0
    for _ in range(400):
        events, window = random_events(rng), rng.choice([0, 6, 12, 20, 40, 200])
        more, wake = rng.choice([0, 0, 1, 4]), rng.choice([0, 0, 1, 3])
        seen = overlap(events, Channels(WRITE, READ, window, more, wake))
        ticks, stalled, most = reference(events, window, more, wake)
        assert (seen.seconds, seen.stalled_seconds) == (ticks, stalled), (events, window)
        assert seen.resident_bytes == most <= 2 * window
        stalls += stalled
    assert stalls > 1000


def test_what_a_simulation_says() -> None:
    c = Channels(write_bytes_per_second=10.0, read_bytes_per_second=5.0, window_bytes=100)
    hidden = overlap([(OUT, 1, 100), (COMPUTE, 10.0, 0), (IN, 1, 0), (COMPUTE, 1.0, 0)], c)
    assert (hidden.seconds, hidden.sent_bytes, hidden.fetched_bytes, hidden.late) == (31.0, 100, 100, 0)
    assert (hidden.stalled_seconds, hidden.hidden_seconds) == (20.0, 10.0)  # the write was hidden, the read was not
    early = overlap([(OUT, 1, 100), (COMPUTE, 9.0, 0), (IN, 1, 0)], c)  # it has not left yet
    assert (early.seconds, early.fetched_bytes, early.stalled_seconds) == (9.0, 0, 0.0)
    two = [(OUT, 1, 50), (OUT, 2, 50), (COMPUTE, 20.0, 0), (IN, 2, 0), (COMPUTE, 4.0, 0), (IN, 1, 0)]
    ahead = overlap(two, c)  # the first was asked for when the second was: 10 s each, one after the other
    assert (ahead.seconds, ahead.late) == (40.0, 1)
    narrow = overlap(two, Channels(10.0, 5.0, 0))
    assert narrow.seconds == 5 + 5 + 20 + 10 + 4 + 10


def random_model(rng: random.Random) -> tuple[StepModel, Pace]:
    n = rng.randint(2, 5)
    kinds = [Option("select", "mm[0]@disk"), Option("offload", "disk"), RECOMPUTE, KEEP, Option("select", "mm[0]")]
    facts, forward, backward = [], [], []
    for _ in range(n):
        full = 2 * rng.randint(2, 12)
        rows = [OptionFacts(KEEP, full, rng.randint(0, 30), 0.0)]
        for option in rng.sample(kinds, rng.randint(1, 3)):
            held, sent = rng.randint(-2, full), (2 * rng.randint(1, 12) if option.offloads else 0)
            if option != KEEP:
                rows.append(
                    OptionFacts(
                        option,
                        held,
                        rng.randint(0, 30),
                        0.0 if option == Option("offload", "disk") else rng.randint(1, 40),
                        None,
                        sent,
                    )
                )
        facts.append(tuple(rows))
        forward.append(float(rng.randint(1, 8)))
        backward.append(float(rng.randint(1, 16)))
    middle = float(rng.randint(0, 6))
    outside = tuple(rng.randint(0, 20) for _ in range(n + 1))
    model = StepModel(tuple(f"u{u}" for u in range(n)), tuple(facts), outside, sum(forward) + sum(backward) + middle)
    largest = max((o.sent_bytes for u in facts for o in u), default=0)
    return model, Pace(tuple(forward), tuple(backward), middle, 0.0, 1, largest)


def peak_of(model: StepModel, choice: tuple[int, ...]) -> int:
    """Moment by moment: before, in and after every unit, forward and backward."""
    held = [model.options[u][c].held_bytes for u, c in enumerate(choice)]
    moments = [model.outside_bytes[k] + sum(held[:k]) for k in range(len(choice) + 1)]
    moments += [model.options[u][c].own_peak_bytes + sum(held[:u]) for u, c in enumerate(choice)]
    return max(moments)


def best_of_all(model: StepModel, pace: Pace, budget: int, disk: Disk) -> float | None:
    """The least added seconds of any assignment with any window, by the second simulation."""
    best: float | None = None
    idle = model.base_seconds
    for choice in itertools.product(*(range(len(o)) for o in model.options)):
        rows = [model.options[u][c] for u, c in enumerate(choice)]
        sent, peak = sum(r.sent_bytes for r in rows), peak_of(model, choice)
        if not sent:
            if peak <= budget:
                added = sum(r.seconds for r in rows)
                best = added if best is None else min(best, added)
            continue
        for times in WINDOWS:
            window = int(times * pace.largest_bytes)
            if peak + structs.replace(disk, window_bytes=window).reserved_bytes > budget or sent > disk.capacity_bytes:
                continue
            ticks, _, most = reference(events_of(model, pace, flat(choice)), window)
            assert peak + most <= budget
            best = ticks - idle if best is None else min(best, ticks - idle)
    return best


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(100 + seed)
    used = infeasible = 0
    for _ in range(40):
        model, pace = random_model(rng)
        disk = Disk(
            directory="/",
            capacity_bytes=rng.choice([10, 30, 1000]),
            write_bytes_per_second=WRITE,
            read_bytes_per_second=READ,
            threads=1,
            buffer_bytes=2,
        )
        budget = rng.randint(20, 90)
        found, wanted = solve_with_tier(model, pace, budget, disk), best_of_all(model, pace, budget, disk)
        if found is None:
            assert wanted is None
            infeasible += 1
            continue
        solution, window = found[0], found[1].window_bytes
        assert solution.seconds == pytest.approx(wanted, abs=1e-6)
        assert solution.lower_bound <= solution.seconds + 1e-9
        choice = tuple(item.option for item in solution.schedule if isinstance(item, Single))
        sends = any(model.options[u][c].sent_bytes for u, c in enumerate(choice))
        assert solution.peak_bytes <= budget
        assert solution.peak_bytes == peak_of(model, choice) + (2 * window + 2 if sends else 0)
        used += sends
    assert used >= 2 and infeasible < 40
