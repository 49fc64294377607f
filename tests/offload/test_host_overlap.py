"""The simulation that plans are promised by, against a real store in host memory on simulated streams with clocks of their own."""

from __future__ import annotations

import random

import pytest

import ullage as ul
from tests.offload.streams import SimulatedLink
from ullage.runtime import Site, Tier
from ullage.solver._channels import COMPUTE, IN, OUT, Channels, Event, overlap

BLOCK = 4096
Step = list[tuple[int, int, int]]  # per unit: bytes that leave, seconds of its forward and of its backward


def real(step: Step, window: int) -> tuple[float, float, int]:
    """(seconds, of which stalled, late prefetches): the host queues the whole step before the device begins."""
    link = SimulatedLink()
    store = ul.HostStore("8MiB", device="cpu", backlog_bytes=window, ahead_bytes=window, link=link)
    tier = Tier(store)
    sites = [Site(str(i), tier=tier) for i in range(len(step))]
    away = []
    for (nbytes, forward, _), site in zip(step, sites, strict=True):
        x = link.empty(nbytes)
        link.launch(lambda: None, forward)
        away.append(tier.pack(x, site))
        del x
    for _, _, backward in reversed(step):
        taken = away.pop()
        assert taken is not None
        x = taken.tensor()
        link.launch(lambda: None, backward)
        del x, taken
    link.run_all()
    store.flush()
    stats = store.stats
    store.close()
    return link.main.time, stats.stalled_read_seconds + stats.stalled_write_seconds, sum(s.late for s in sites)


def simulated(step: Step, window: int) -> tuple[float, float, int]:
    events: list[Event] = []
    for i, (nbytes, forward, _) in enumerate(step):
        events += [(COMPUTE, forward, 0), (OUT, i, nbytes)]
    for i in reversed(range(len(step))):
        events += [(IN, i, 0), (COMPUTE, step[i][2], 0)]
    seen = overlap(events, Channels(1.0, 1.0, window), {i: i for i in range(len(step))})
    return seen.seconds, seen.stalled_seconds, seen.late


@pytest.mark.parametrize("window", [1.0, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("slow", [2, 3])
@pytest.mark.parametrize("sizes", [[1, 4] * 12 + [1], [1] * 24], ids=["alternating", "equal"])
def test_blocks(sizes: list[int], slow: int, window: float) -> None:
    step = [(BLOCK * n, BLOCK * slow, BLOCK * slow) for n in sizes]
    wide = int(window * BLOCK * max(sizes))
    assert real(step, wide) == simulated(step, wide)


@pytest.mark.parametrize("seed", range(4))
def test_random_steps(seed: int) -> None:
    """The host is a whole step ahead: what it has not seen to have left it takes as it is, where a simulation reads it back."""
    rng = random.Random(seed)
    equal = 0
    for _ in range(50):
        n = rng.randint(1, 12)
        step = [(BLOCK * rng.randint(1, 5), BLOCK * rng.randint(0, 8), BLOCK * rng.randint(0, 8)) for _ in range(n)]
        window = rng.choice([0, 2, 5, 8, 20]) * BLOCK
        seen, promised = real(step, window)[0], simulated(step, window)[0]
        assert seen <= promised, (step, window)
        equal += seen == promised
    assert equal >= 40
