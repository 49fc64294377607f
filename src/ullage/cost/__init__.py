"""How long ops take and what they allocate inside: measured here, or a roofline over the device table."""

from ullage.cost._caching_allocator import CachingAllocator
from ullage.cost._devices import Device, device_name, devices, find_device
from ullage.cost._host import HostCost, host_cost_in, measure_host
from ullage.cost._measure import measure_ops
from ullage.cost._nodes import measure_node
from ullage.cost._roofline import is_free, roofline_ops

__all__ = [
    "CachingAllocator",
    "Device",
    "HostCost",
    "device_name",
    "devices",
    "find_device",
    "host_cost_in",
    "is_free",
    "measure_host",
    "measure_node",
    "measure_ops",
    "roofline_ops",
]
