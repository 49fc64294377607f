"""Simulate a step's time while tensors are offloaded and brought back beside its ops.

Two channels, one out and one in, each with its own bandwidth and first come, first served, as in the stores of `ullage.offload`. They
have the stores' bounds, too: `put` waits while the backlog is full, and tensors are prefetched only while the read-ahead has
room. A tensor that is asked for while it is still on its way out is handed back at once.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from ullage.runtime.unit._ahead import Ahead

# A step's events, in order: (COMPUTE, seconds, 0), (OUT, ticket, bytes) or (IN, ticket, bytes).
COMPUTE, OUT, IN = 0, 1, 2
Event = tuple[int, float, int]


@dataclass(frozen=True)
class Channels:
    """The two channels.

    Attributes:
        write_bytes_per_second: measured, with `ullage.measure_bandwidth`.
        read_bytes_per_second: the same.
        window_bytes: size of the backlog, and of the read-ahead.
        transfer_seconds: seconds per transfer on top of its bytes.
        wait_seconds: seconds per wait on top of the transfer: a thread must wake up.
    """

    write_bytes_per_second: float
    read_bytes_per_second: float
    window_bytes: int
    transfer_seconds: float = 0.0
    wait_seconds: float = 0.0


@dataclass(frozen=True)
class Span:
    """One transfer, with its begin and end in seconds from the step's begin."""

    out: bool
    begin: float
    end: float
    nbytes: int


@dataclass(frozen=True)
class Overlap:
    """The result of a simulation.

    Attributes:
        seconds: of the whole step, stalls included.
        sent_bytes: bytes offloaded.
        fetched_bytes: bytes brought back, without tensors that were asked for on their way out.
        hidden_seconds: seconds that the channels worked while the step did not wait for them.
        stalled_seconds: seconds that the step waited for either channel.
        late: how often it waited for a tensor that had been prefetched.
        resident_bytes: the most bytes in the backlog and the read-ahead at any moment.
        spans: the transfers, those of each channel in order.
        waits: (index of the event, seconds) of each event at which the step waits.
    """

    seconds: float
    sent_bytes: int
    fetched_bytes: int
    hidden_seconds: float
    stalled_seconds: float
    late: int
    resident_bytes: int
    spans: tuple[Span, ...] = ()
    waits: tuple[tuple[int, float], ...] = ()


class _Step:
    def __init__(self, channels: Channels, uses: Counter[float], senders: Mapping[float, Hashable]) -> None:
        self.c, self.senders = channels, senders
        self.uses = uses  # how often each ticket will still be asked for
        self.now = self.stalled = self.busy = 0.0
        self.out_free = self.in_free = 0.0  # when each channel will have finished its transfers so far
        self.sent = self.fetched = self.late = self.most = 0
        self.backlog: deque[tuple[float, int, float]] = deque()  # (written at, bytes, ticket)
        self.in_backlog = self.ahead = 0
        self.size: dict[float, int] = {}
        self.written: dict[float, float] = {}
        self.ready: dict[float, float] = {}  # by prefetched ticket, when it is back
        self.wanted: deque[float] = deque()
        self.spans: list[Span] = []
        self.order: list[float] = []
        self.number: dict[float, int] = {}
        self.sequence = Ahead()

    def wait(self, until: float) -> None:
        if until > self.now:
            self.stalled += until + self.c.wait_seconds - self.now
            self.now = until + self.c.wait_seconds

    def drain(self) -> None:
        while self.backlog and self.backlog[0][0] <= self.now:
            self.in_backlog -= self.backlog.popleft()[1]

    def put(self, ticket: float, nbytes: int) -> None:
        self.drain()
        through = nbytes > self.c.window_bytes
        while not through and self.in_backlog + nbytes > self.c.window_bytes:
            self.wait(self.backlog[0][0])
            self.drain()
        seconds = self.c.transfer_seconds + nbytes / self.c.write_bytes_per_second
        begin = max(self.now, self.out_free)
        self.out_free = begin + seconds
        self.spans.append(Span(True, begin, self.out_free, nbytes))
        self.busy += seconds
        self.sent += nbytes
        self.size[ticket], self.written[ticket] = nbytes, self.out_free
        if through:
            self.wait(self.out_free)
        else:
            self.backlog.append((self.out_free, nbytes, ticket))
            self.in_backlog += nbytes
        self.number[ticket] = self.sequence.left(self.senders.get(ticket, ticket))
        self.order.append(ticket)
        self._see()

    def get(self, ticket: float) -> None:
        self.drain()
        self.uses[ticket] -= 1
        if ticket in self.ready:
            there = self.ready.pop(ticket)
            self.late += there > self.now
            self.wait(there)
            self.ahead -= self.size[ticket]
            self._foresee(ticket)
        elif self.written[ticket] > self.now:  # still on its way out, so its bytes are still in memory
            self._foresee(ticket)
        else:
            self._read(ticket)
            there = self.in_free
            self._foresee(ticket)
            self.wait(there)
        self._start()

    def _read(self, ticket: float) -> None:
        seconds = self.c.transfer_seconds + self.size[ticket] / self.c.read_bytes_per_second
        begin = max(self.now, self.in_free)
        self.in_free = begin + seconds
        self.spans.append(Span(False, begin, self.in_free, self.size[ticket]))
        self.busy += seconds
        self.fetched += self.size[ticket]

    def _foresee(self, ticket: float) -> None:
        """Prefetch the tensors that the step will ask for next."""
        for k in self.sequence.asked(self.number[ticket]):
            other = self.order[k]
            if other not in self.ready and self.uses[other]:
                self.wanted.append(other)
        self._start()

    def _start(self) -> None:
        while self.wanted:
            ticket = self.wanted[0]
            size = self.size[ticket]
            if size <= self.c.window_bytes:
                if self.ahead + size > self.c.window_bytes:
                    break
                self.ahead += size
                if self.written[ticket] > self.now:  # still on its way out: it stays in memory
                    self.ready[ticket] = self.now
                else:
                    self._read(ticket)
                    self.ready[ticket] = self.in_free
            self.wanted.popleft()
        self._see()

    def _see(self) -> None:
        self.drain()
        self.most = max(self.most, self.in_backlog + self.ahead)


def overlap(events: Iterable[Event], channels: Channels, senders: Mapping[float, Hashable] | None = None) -> Overlap:
    """Simulate a step's events. A ticket may be asked for several times, but not before it was sent.

    Args:
        events: the events, in order.
        channels: the channels.
        senders: by ticket, the unit that sent it: tensors of one unit may be asked for in another order than they were sent in.
    """
    events = list(events)
    step = _Step(channels, Counter(what for kind, what, _ in events if kind == IN), senders or {})
    waits = []
    for k, (kind, what, nbytes) in enumerate(events):
        before = step.stalled
        if kind == COMPUTE:
            step.now += what
        elif kind == OUT:
            step.put(what, nbytes)
        else:
            step.get(what)
        if step.stalled > before:
            waits.append((k, step.stalled - before))
    return Overlap(
        step.now,
        step.sent,
        step.fetched,
        max(step.busy - step.stalled, 0.0),
        step.stalled,
        step.late,
        step.most,
        tuple(step.spans),
        tuple(waits),
    )
