"""Options of a unit, the solver, named policies, `Profile` and `Plan`."""

from ullage.planner._overrides import PinCost
from ullage.planner._peak import Bounds, Holding, bounds
from ullage.planner._peak_facts import Lever
from ullage.planner._plan import Decision, Forecast, Plan
from ullage.planner._planner import plan
from ullage.planner._profile import Profile, profile

__all__ = [
    "Bounds",
    "Decision",
    "Forecast",
    "Holding",
    "Lever",
    "PinCost",
    "Plan",
    "Profile",
    "bounds",
    "plan",
    "profile",
]
