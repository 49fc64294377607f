"""Options of a unit, the solver, named policies, `Profile` and `Plan`."""

from ullage.planner.answers import _draw as _draw  # it says how a frontier is drawn
from ullage.planner.answers._fit import Fit, Tried, fit
from ullage.planner.answers._frontier import Frontier, FrontierPoint, PolicyPoint, frontier
from ullage.planner.answers._peak_holders import bounds
from ullage.planner.decide._planner import plan
from ullage.planner.explain._peak import Bounds, Holding
from ullage.planner.explain._peak_facts import Lever
from ullage.planner.plan._overrides import PinCost
from ullage.planner.plan._plan import Decision, Forecast, Plan
from ullage.planner.plan._profile import Profile, profile

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
