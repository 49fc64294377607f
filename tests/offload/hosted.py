"""A `HostStore` on simulated streams, and tensors that kernels write and read."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import ullage as ul
from tests.offload.streams import SimulatedLink


def opened(link: SimulatedLink, capacity: int | str = "1MiB", **options: Any) -> ul.HostStore:
    return ul.HostStore(capacity, device="cpu", link=link, **options)


def bytes_of(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


def put(link: SimulatedLink, store: Any, data: bytes) -> Any:
    """Put a tensor that a kernel has yet to write; nobody else holds it."""
    source = link.empty(len(data))
    link.write(source, data)
    return store.put(source)


def get(link: SimulatedLink, ticket: Any, late: Callable[[], None] | None = None) -> list[bytes]:
    """Get a tensor and queue a kernel that reads it; what that sees is in the list once it has run."""
    seen: list[bytes] = []
    link.read(ticket.get(late), seen.append)
    return seen
