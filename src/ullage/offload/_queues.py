"""Parts that wait for a thread: first those someone waits for, then prefetches, then writes."""

from __future__ import annotations

from collections import deque

from ullage.offload._record import FileRecord

URGENT, AHEAD, OUT = range(3)


class Queues:
    """Three queues of (record, number of the part). Not safe for threads by itself."""

    def __init__(self) -> None:
        self._queues: tuple[deque[tuple[FileRecord, int]], ...] = (deque(), deque(), deque())

    def push(self, record: FileRecord, level: int) -> None:
        """Queue all parts of a record."""
        record.left = len(record.parts)
        self._queues[level].extend((record, i) for i in range(len(record.parts)))

    def pop(self) -> tuple[FileRecord, int] | None:
        """The next part."""
        for queue in self._queues:
            if queue:
                return queue.popleft()
        return None

    def promote(self, record: FileRecord) -> None:
        """Let the parts of a prefetch that someone waits for now go first."""
        parts = self._remove(record)
        self._queues[URGENT].extend(parts)

    def cancel(self, record: FileRecord) -> None:
        """Forget the parts that no thread has begun."""
        record.left -= len(self._remove(record))

    def _remove(self, record: FileRecord) -> list[tuple[FileRecord, int]]:
        found: list[tuple[FileRecord, int]] = []
        for queue in self._queues:
            mine = [job for job in queue if job[0] is record]
            if mine:
                found += mine
                others = [job for job in queue if job[0] is not record]
                queue.clear()
                queue.extend(others)
        return found

    def clear(self) -> None:
        """Forget everything."""
        for queue in self._queues:
            queue.clear()
