"""Count how long streams waited, once they have: the host does not wait to see it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ullage.offload._link import Event, Link, Stream

MOST_PENDING = 1024  # about as many kernels as CUDA lets a host be ahead by


@dataclass(frozen=True)
class Stall:
    """A wait that was queued on a stream.

    Attributes:
        reached: event at which the stream came to it.
        over: event that it waited for.
        reads: it was for a copy in; otherwise for one out.
        asked: the tensor had been prefetched.
        late: called if it had, and the stream waited all the same.
    """

    reached: Event
    over: Event
    reads: bool
    asked: bool = False
    late: Callable[[], None] | None = None


class Stalls:
    """Waits whose length is not known yet. Needs the engine's lock."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._pending: deque[Stall] = deque()

    def wait(
        self, stream: Stream, event: Event, reads: bool, asked: bool = False, late: Callable[[], None] | None = None
    ) -> None:
        """Have a stream wait for an event, unless it is done."""
        if self._link.done(event):
            return
        reached = self._link.mark(stream)
        self._link.wait(stream, event)
        self._pending.append(Stall(reached, event, reads, asked, late))

    def settled(self) -> list[tuple[Stall, float]]:
        """Those that are over, each once, and how many seconds they took. Waits if there are too many that are not."""
        found = []
        while self._pending:
            stall = self._pending[0]
            if len(self._pending) > MOST_PENDING:
                self._finish(stall)
            seconds = self._link.seconds_between(stall.reached, stall.over)
            if seconds is None:
                break
            found.append((stall, max(seconds, 0.0)))
            self._pending.popleft()
        return found

    def finish(self) -> None:
        """Wait until all are over."""
        for stall in self._pending:
            self._finish(stall)

    def _finish(self, stall: Stall) -> None:
        self._link.synchronize(stall.reached)
        self._link.synchronize(stall.over)

    def clear(self) -> None:
        """Forget those that are not known."""
        self._pending.clear()
