"""What all units of this process did together, for whoever watches from outside (`ullage.Monitor`).

Plain numbers that only grow; a replay adds to them once, which costs nothing beside running a unit again. Two threads that replay at
the same time may lose a count.
"""

from __future__ import annotations


class Totals:
    """Counts since the process started.

    Attributes:
        replays: units re-run.
        skipped: ops that selective replays did not run.
        stale: logs that were not of what ran.
        mismatches: replays that gave other values than their forward.
        sent: bytes of saved tensors that were offloaded.
        late: how often backward waited for what was on its way back.
    """

    __slots__ = ("late", "mismatches", "replays", "sent", "skipped", "stale")

    def __init__(self) -> None:
        self.replays = self.skipped = self.stale = self.mismatches = self.sent = self.late = 0

    def now(self) -> tuple[int, int, int, int, int, int]:
        """(replays, skipped, stale, mismatches, sent, late)."""
        return self.replays, self.skipped, self.stale, self.mismatches, self.sent, self.late


totals = Totals()
