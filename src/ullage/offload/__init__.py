"""Places for tensors that memory has no room for: `DiskStore`, `HostStore` for a CUDA device, and how fast they are.

Knows nothing of plans, units or autograd: bytes go out by `Store.put` and come back by `Ticket.get`. See docs/offload.md.
"""

from ullage.offload._bandwidth import measure_bandwidth, measure_link
from ullage.offload._extents import BLOCK, whole_blocks
from ullage.offload._facts import Bandwidth, Stats, endurance_note
from ullage.offload._host import HostStore, HostTicket
from ullage.offload._protocol import Store, Ticket
from ullage.offload._store import DiskStore, DiskTicket

__all__ = [
    "BLOCK",
    "Bandwidth",
    "DiskStore",
    "DiskTicket",
    "HostStore",
    "HostTicket",
    "Stats",
    "Store",
    "Ticket",
    "endurance_note",
    "measure_bandwidth",
    "measure_link",
    "whole_blocks",
]
