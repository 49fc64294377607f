"""Shows what the planner knows: the timeline of a step, its exports, comparisons, and a gate for CI."""

from ullage.report._make import timeline
from ullage.report._timeline import Allocation, Allocations, Event, Events, Timeline

__all__ = ["Allocation", "Allocations", "Event", "Events", "Timeline", "timeline"]
