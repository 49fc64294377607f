"""Options of a unit, the solver, named policies, `Profile` and `Plan`."""

from ullage.planner._fit import Fit, Tried, fit
from ullage.planner._frontier import Frontier, FrontierPoint, PolicyPoint, frontier
from ullage.planner._plan import Decision, Forecast, Plan
from ullage.planner._planner import plan
from ullage.planner._profile import Profile, profile

__all__ = [
    "Decision",
    "Fit",
    "Forecast",
    "Frontier",
    "FrontierPoint",
    "Plan",
    "PolicyPoint",
    "Profile",
    "Tried",
    "fit",
    "frontier",
    "plan",
    "profile",
]
