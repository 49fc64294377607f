"""Shows what the planner knows: the timeline of a step, its exports, a page, comparisons, and a gate for CI."""

from ullage.report import _page as _page  # it says how results are written as pages
from ullage.report._baseline import Baseline, StepFacts, UnitState
from ullage.report._check import CheckResult, check
from ullage.report._compare import Comparison, UnitRow, compare
from ullage.report._export import ENDINGS, check_export
from ullage.report._make import timeline
from ullage.report._overview import Measured, StepReport
from ullage.report._recorded import record_snapshot
from ullage.report._records import Allocation, Allocations, Event, Events, Transfer
from ullage.report._report import report
from ullage.report._rows import Row
from ullage.report._sides import Side
from ullage.report._timeline import Timeline

__all__ = [
    "ENDINGS",
    "Allocation",
    "Allocations",
    "Baseline",
    "CheckResult",
    "Comparison",
    "Event",
    "Events",
    "Measured",
    "Row",
    "Side",
    "StepFacts",
    "StepReport",
    "Timeline",
    "Transfer",
    "UnitRow",
    "UnitState",
    "check",
    "check_export",
    "compare",
    "record_snapshot",
    "report",
    "timeline",
]
