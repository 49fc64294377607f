"""Counts over all units of this process, for `ullage.Monitor`.

Plain numbers that only grow. A replay adds to them once, which costs nothing beside the replay. There is no lock, so two threads
that replay at the same time may lose a count.
"""

from __future__ import annotations


class Totals:
    """Counts since the process started.

    Attributes:
        replays: replays of units.
        skipped: ops that selective replays did not run.
        stale: op logs that did not match what ran.
        mismatches: replays that gave other values than their forward.
        sent: bytes of saved tensors that were offloaded.
        late: how often backward waited for a tensor on its way back.
    """

    __slots__ = ("late", "mismatches", "replays", "sent", "skipped", "stale")

    def __init__(self) -> None:
        self.replays = self.skipped = self.stale = self.mismatches = self.sent = self.late = 0

    def now(self) -> tuple[int, int, int, int, int, int]:
        """Return (replays, skipped, stale, mismatches, sent, late)."""
        return self.replays, self.skipped, self.stale, self.mismatches, self.sent, self.late


totals = Totals()
