"""ullage: keep a PyTorch training step inside a memory budget, in bytes, at the lowest step time.

The way of the data: `Workload` -> `profile` -> `plan` -> `Plan.apply` -> `measure` / `Handle.report`; `verify` proves
that gradients are bitwise those of the plain step.
"""

from ullage._bytes import parse_budget
from ullage._errors import (
    AlreadyCheckpointed,
    ApplyError,
    ArgumentError,
    BudgetError,
    BudgetInfeasible,
    CaptureError,
    DeviceError,
    MonitorError,
    OffloadError,
    PlanError,
    PlanMismatch,
    ReplayError,
    UllageError,
    UllageWarning,
    UnsupportedTorch,
    VerifyError,
    WorkloadError,
)
from ullage._version import __version__ as __version__
from ullage.apply import Handle, HandleReport
from ullage.cost import devices
from ullage.measure._measure import Measurement, measure
from ullage.monitor import Monitor, MonitorSummary
from ullage.offload import DiskStore, HostStore, measure_bandwidth, measure_link
from ullage.planner import (
    Bounds,
    Decision,
    Fit,
    Forecast,
    Frontier,
    FrontierPoint,
    Holding,
    Lever,
    PinCost,
    Plan,
    PolicyPoint,
    Profile,
    Tried,
    bounds,
    fit,
    frontier,
    plan,
    profile,
)
from ullage.report import (
    Baseline,
    CheckResult,
    Comparison,
    StepReport,
    Timeline,
    check,
    compare,
    record_snapshot,
    report,
    timeline,
)
from ullage.runtime import checkpoint, is_recomputing
from ullage.verify import Verification, verify
from ullage.workload import Workload, load_target

# Older names of these classes, which go with version 0.2
Check, Gate, Overview, Report = Verification, CheckResult, StepReport, HandleReport

__all__ = [
    "AlreadyCheckpointed", "ApplyError", "ArgumentError", "Baseline", "Bounds", "BudgetError", "BudgetInfeasible", "CaptureError", "Check",
    "CheckResult", "Comparison", "Decision", "DeviceError", "DiskStore", "Fit", "Forecast", "Frontier", "FrontierPoint", "Gate", "Handle",
    "HandleReport", "Holding", "HostStore", "Lever", "Measurement", "Monitor", "MonitorError", "MonitorSummary", "OffloadError",
    "Overview", "PinCost", "Plan", "PlanError", "PlanMismatch", "PolicyPoint", "Profile", "ReplayError", "Report", "StepReport",
    "Timeline", "Tried", "UllageError", "UllageWarning", "UnsupportedTorch", "Verification", "VerifyError", "Workload", "WorkloadError",
    "bounds", "check", "checkpoint", "compare", "devices", "fit", "frontier", "is_recomputing", "load_target", "measure",
    "measure_bandwidth", "measure_link", "parse_budget", "plan", "profile", "record_snapshot", "report", "timeline", "verify",
]  # fmt: skip
