"""Run training steps on fake tensors: live bytes over time, units, op log."""

from ullage.capture._session import OptionFailed, Session
from ullage.capture._timeline import OpCost, Timeline, timeline
from ullage.capture._units import UnitFacts

__all__ = ["OpCost", "OptionFailed", "Session", "Timeline", "UnitFacts", "timeline"]
