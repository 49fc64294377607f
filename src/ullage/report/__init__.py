"""Shows what the planner knows: the timeline of a step, its exports, comparisons, and a gate for CI."""

from ullage.report._export import ENDINGS, check_export
from ullage.report._make import timeline
from ullage.report._timeline import Allocation, Allocations, Event, Events, Timeline

__all__ = ["ENDINGS", "Allocation", "Allocations", "Event", "Events", "Timeline", "check_export", "timeline"]
