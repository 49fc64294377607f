"""Options of a unit, the solver, named policies, `Profile` and `Plan`."""

from ullage.planner._plan import Decision, Forecast, Plan
from ullage.planner._planner import plan
from ullage.planner._profile import Profile, profile

__all__ = ["Decision", "Forecast", "Plan", "Profile", "plan", "profile"]
