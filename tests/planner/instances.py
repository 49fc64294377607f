"""Models for the solver's tests: random small ones, chains of twins; every schedule of a small one."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ullage.mechanisms import KEEP, RECOMPUTE, Option
from ullage.solver._instance import OptionFacts, StepModel
from ullage.solver._schedule import Item, Run, Schedule, Single, evaluate

_ACTIONS = [RECOMPUTE, RECOMPUTE, KEEP, Option("select", "attention"), Option("select", "matmul_attention")]


def random_model(rng: random.Random, units: int, options: int, linked: float = 0.85) -> StepModel:
    """Anything that a model may be: twins or not, missing links, options that hold less than recompute, odd transients."""
    alike = rng.random() < 0.4
    kinds = [_random_unit(rng, options) for _ in range(1 if alike else units)]
    chosen = [kinds[0 if alike else u] for u in range(units)]
    links = [False, *(rng.random() < linked for _ in range(units - 1))]
    link_bytes = [u[3] if yes else 0 for u, yes in zip(chosen, links, strict=True)]
    bases, base = [], rng.randint(0, 20)
    for link in link_bytes:
        base += link + (1 if alike else rng.choice([0, 0, rng.randint(-5, 5)]))
        bases.append(base)
    facts = tuple(
        tuple(OptionFacts(o, held, base + own, seconds, record) for o, held, own, seconds, record in unit[0])
        for unit, base in zip(chosen, bases, strict=True)
    )
    return StepModel(
        tuple(f"u{u}" for u in range(units)),
        facts,
        tuple(rng.choice([0, 0, rng.randint(0, 60)]) for _ in range(units + 1)),
        1.0,
        linked=tuple(links),
        link_bytes=tuple(link_bytes),
        forward_seconds=tuple(u[1] for u in chosen),
        forward_peak_bytes=tuple(u[2] for u in chosen),
        backward_base_bytes=tuple(bases),
        forward_base_bytes=tuple(b - rng.randint(-2, 5) for b in bases) if rng.random() < 0.5 else (),
    )


def _random_unit(
    rng: random.Random, options: int
) -> tuple[list[tuple[Option, int, int, float, int | None]], float, int, int]:
    found = [
        (
            rng.choice(_ACTIONS),
            rng.choice([0, rng.randint(-3, 20), rng.randint(0, 20)]),
            rng.randint(0, 40),
            rng.randint(0, 9) / 8,
            rng.choice([None, rng.randint(0, 40)]),
        )
        for _ in range(rng.randint(1, options))
    ]
    return found, rng.randint(0, 8) / 8, rng.randint(0, 30), rng.randint(0, 12)


def long_inputs(rng: random.Random, units: int) -> StepModel:
    """Inputs weigh more than what units do, and forwards need odd amounts: the best schedules nest runs."""
    steep = rng.random() < 0.7  # the base grows by more than the inputs: passing over a run is what counts
    links = [0, *(rng.randint(2, 12) for _ in range(units - 1))]
    bases, base = [], 5
    for link in links:
        base += link + rng.choice([0, 8, 8] if steep else [0, 1, 4, -2])
        bases.append(base)
    facts = []
    for base in bases:
        rows = [OptionFacts(RECOMPUTE, rng.choice([0, 0, -4]), base + rng.randint(0, 8), rng.randint(4, 8) / 8)]
        if rng.random() < 0.3:
            rows.append(OptionFacts(KEEP, rng.randint(-4, 9), base + rng.randint(0, 8), 0.0, rng.randint(0, 12)))
        facts.append(tuple(rows))
    return StepModel(
        tuple(f"u{u}" for u in range(units)),
        tuple(facts),
        tuple(base + rng.choice([-9, -9, 0, 4]) for base in (*bases, bases[-1])),
        1.0,
        linked=(False, *(True,) * (units - 1)),
        link_bytes=tuple(links),
        forward_seconds=tuple(rng.randint(4, 8) / 8 for _ in links),
        forward_peak_bytes=tuple(
            rng.randint(8, 12) if steep else rng.choice([0, 3, rng.randint(0, 25)]) for _ in links
        ),
        backward_base_bytes=tuple(bases),
        forward_base_bytes=() if steep else tuple(base - rng.choice([0, 15]) for base in bases),
    )


def schedules(model: StepModel, start: int = 0) -> Iterator[Schedule]:
    """Every schedule of the units from `start` on."""
    n = len(model.units)
    if start == n:
        yield ()
        return
    for option in range(len(model.options[start])):
        for rest in schedules(model, start + 1):
            yield Single(start, option), *rest
    for last in range(start + 1, n):
        if all(model.linked[start + 1 : last + 1]):
            for items in _rebuilds(model, start, last):
                for rest in schedules(model, last + 1):
                    yield Run(start, last, items), *rest


def _rebuilds(model: StepModel, s: int, t: int) -> Iterator[tuple[Item, ...]]:
    for option in range(len(model.options[s])):
        if s == t:
            yield (Single(s, option),)
        else:
            for rest in _rebuilds(model, s + 1, t):
                yield Single(s, option), *rest
    for w in range(s + 1, t):
        if all(model.linked[s + 1 : w + 1]):
            for items in _rebuilds(model, s, w):
                for rest in _rebuilds(model, w + 1, t):
                    yield Run(s, w, items), *rest


def frontier(model: StepModel) -> list[tuple[int, float]]:
    """(peak, seconds) of the schedules that no other one beats in both, by trying all of them."""
    found: list[tuple[int, float]] = []
    for peak, seconds in sorted({evaluate(model, s) for s in schedules(model)}):
        if not found or seconds < found[-1][1]:
            found.append((peak, seconds))
    return found


def unit_chain(units: int, last_is_kept: bool = False) -> StepModel:
    """Revolve's chain: each input is a byte, a forward takes a second and makes a byte, a backward needs a byte more.

    10 bytes are always there, and the first input. The loss needs a byte as a backward does; or the last unit is kept
    (its backward needs a byte), and the loss nothing.
    """
    bases = [11 + u for u in range(units)]
    facts = [(OptionFacts(RECOMPUTE, 0, base + 1, 1.0),) for base in bases]
    if last_is_kept:
        facts[-1] = (OptionFacts(KEEP, 0, bases[-1] + 1, 0.0, 1),)
    return StepModel(
        tuple(f"u{u}" for u in range(units)),
        tuple(facts),
        (11, *(0,) * (units - 1), 0 if last_is_kept else 12 + units),
        1.0,
        linked=(False, *(True,) * (units - 1)),
        link_bytes=(0, *(1,) * (units - 1)),
        forward_seconds=(1.0,) * units,
        forward_peak_bytes=(1,) * units,
        backward_base_bytes=tuple(bases),
    )


MB = 2**20
# seconds and held bytes of the options between keep and recompute, per second and byte of these
_CURVE = [(0.02, 0.93), (0.05, 0.84), (0.10, 0.73), (0.17, 0.6), (0.25, 0.5), (0.33, 0.4), (0.42, 0.31), (0.55, 0.2)]
_CURVE += [(0.66, 0.12), (0.75, 0.07)]


def blocks(kinds: list[int], odd_bytes: int = 0, gradient_bytes: int = 0) -> StepModel:
    """Transformer-like blocks with 12 options; the first differs from its twins by a few bytes, as in real captures.

    Args:
        kinds: the kind of each block; kinds differ in what they keep and how long they take.
        odd_bytes: makes the held bytes of options no multiples of anything.
        gradient_bytes: what each block's backward adds to what is alive.
    """
    n, link = len(kinds), 4 * MB
    facts, seconds, forward_bases, bases = [], [], [], []
    for u, kind in enumerate(kinds):
        keep, second = (64 + 12 * kind) * MB + 4096 * kind, 0.010 + 0.003 * kind
        forward = 100 * MB + (u + 1) * link
        base = forward + link + gradient_bytes * (n - 1 - u)
        rows = [(KEEP, keep + (5056 if u == 0 else 0), 0.0)]
        for i, (s, h) in enumerate(_CURVE):
            rows.append((Option("select", f"level{i}"), int(h * keep) // MB * MB + odd_bytes * (i * i + 3), s * second))
        rows.append((RECOMPUTE, 0, 0.97 * second))
        own = base + keep + 3 * link - (4800 if u == 0 else 0)
        facts.append(tuple(OptionFacts(o, h, own + (9856 if o != KEEP else 0), s, keep + link) for o, h, s in rows))
        seconds.append(second)
        forward_bases.append(forward)
        bases.append(base)
    return StepModel(
        tuple(f"blocks.{u}" for u in range(n)),
        tuple(facts),
        (100 * MB, *(0,) * (n - 1), 100 * MB + (n + 8) * link),
        1.0,
        linked=(False, *(True,) * (n - 1)),
        link_bytes=(0, *(link,) * (n - 1)),
        forward_seconds=tuple(seconds),
        forward_peak_bytes=(5 * link,) * n,
        backward_base_bytes=tuple(bases),
        forward_base_bytes=tuple(forward_bases),
    )
