"""How long ops take and what they allocate inside: measured here, or a roofline over the device table."""

from ullage.cost._devices import Device, devices, find_device
from ullage.cost._measure import measure_ops
from ullage.cost._replays import ReplayCost, measure_replays, replay_cost_in
from ullage.cost._roofline import roofline_ops

__all__ = [
    "Device",
    "ReplayCost",
    "devices",
    "find_device",
    "measure_ops",
    "measure_replays",
    "replay_cost_in",
    "roofline_ops",
]
