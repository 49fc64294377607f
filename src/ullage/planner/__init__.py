"""Options of a unit, the solver, named policies, `Profile` and `Plan`."""

from ullage.planner import _draw as _draw  # it says how a frontier is drawn
from ullage.planner._fit import Fit, Tried, fit
from ullage.planner._frontier import Frontier, FrontierPoint, PolicyPoint, frontier
from ullage.planner._holds import bounds
from ullage.planner._overrides import PinCost
from ullage.planner._peak import Bounds, Holding
from ullage.planner._peak_facts import Lever
from ullage.planner._plan import Decision, Forecast, Plan
from ullage.planner._planner import plan
from ullage.planner._profile import Profile, profile

__all__ = [
    "Bounds",
    "Decision",
    "Fit",
    "Forecast",
    "Frontier",
    "FrontierPoint",
    "Holding",
    "Lever",
    "PinCost",
    "Plan",
    "PolicyPoint",
    "Profile",
    "Tried",
    "bounds",
    "fit",
    "frontier",
    "plan",
    "profile",
]
