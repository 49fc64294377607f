"""How long ops take and what they allocate inside: measured here, or a roofline over the device table."""

from ullage.cost._devices import Device, devices, find_device
from ullage.cost._measure import measure_ops
from ullage.cost._roofline import roofline_ops

__all__ = ["Device", "devices", "find_device", "measure_ops", "roofline_ops"]
