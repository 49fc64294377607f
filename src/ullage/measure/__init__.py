"""Real steps: peak and time."""

from ullage.measure._allocator import MemoryEvent, record_allocations

__all__ = ["MemoryEvent", "record_allocations"]
