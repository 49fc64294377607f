"""What each mechanism does with one block's activations: the whole library in one table.

The block is a transformer's feed-forward part, x -> down(gelu(up(norm(x)))), on 256 rows of 64 floats:

    x (64 KiB) -> norm (64 KiB, and 2 KiB of statistics) -> up (256 KiB) -> gelu (256 KiB) -> down (64 KiB)

After it comes a head with 1 MiB of logits, in whose backward the step has its peak. Every number in `TABLE` can be worked
out from these lines with a pencil. None is asked of the library: a dispatch mode sees each op of a real step, and weak
references say which storages are still there.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ullage as ul
from tests.offload.streams import SimulatedLink
from ullage.runtime import Site, Tier, run_offloaded

KIB = 1024
NORM = 64 * KIB
STATISTICS = 2 * KIB  # a mean and a reciprocal deviation per row
UP = GELU = 256 * KIB
PLAIN = NORM + STATISTICS + UP + GELU  # what autograd holds of the block, beside its input


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


Run = Callable[[Block, Tensor], Tensor]


@contextmanager
def keep(site: Site, at: Path) -> Iterator[Run]:
    yield lambda block, x: block(x)


@contextmanager
def recompute(site: Site, at: Path) -> Iterator[Run]:
    yield lambda block, x: ul.checkpoint(block, x)


@contextmanager
def select(site: Site, at: Path) -> Iterator[Run]:
    """Keep what the first matmul gives; autograd holds the second one's output nowhere."""
    yield lambda block, x: ul.checkpoint(block, x, keep="addmm[0]")


@contextmanager
def to_disk(site: Site, at: Path) -> Iterator[Run]:
    with ul.DiskStore(at, "1MiB", backlog_bytes=0, ahead_bytes=0) as store:
        site.tier = Tier(store)
        yield lambda block, x: run_offloaded(site, block, (x,), {})


@contextmanager
def to_host(site: Site, at: Path) -> Iterator[Run]:
    """A CPU has no memory beside its own: the copies go over a simulated link."""
    with ul.HostStore("1MiB", device="cpu", backlog_bytes=0, ahead_bytes=0, link=SimulatedLink(eager=True)) as store:
        site.tier = Tier(store)
        yield lambda block, x: run_offloaded(site, block, (x,), {})


@dataclass(frozen=True)
class Row:
    """Of one step with a mechanism, beside the plain step.

    Attributes:
        saved: by how much fewer bytes the block holds between its forward and its backward.
        peak: by how many bytes the peak is lower.
        again: the block's ops that backward runs a second time.
        sent: the bytes that leave memory.
    """

    saved: int
    peak: int
    again: tuple[str, ...]
    sent: int


TABLE = {
    keep: Row(saved=0, peak=0, again=(), sent=0),
    # down is not run again: nothing of its own is saved, and its input is gelu's output
    recompute: Row(saved=PLAIN, peak=PLAIN, again=("addmm", "gelu", "native_layer_norm"), sent=0),
    select: Row(saved=PLAIN - UP, peak=PLAIN - UP, again=("gelu", "native_layer_norm"), sent=0),
    # statistics are smaller than a block of the file, 4 KiB: they stay
    to_disk: Row(saved=NORM + UP + GELU, peak=NORM + UP + GELU, again=(), sent=NORM + UP + GELU),
    to_host: Row(saved=NORM + UP + GELU, peak=NORM + UP + GELU, again=(), sent=NORM + UP + GELU),
}


class Storages(TorchDispatchMode):
    """Counts the ops of a step, the bytes of the storages they made that are alive, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        out = func(*args, **(kwargs or {}))
        self.ops[func._opname] += 1
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and (s := t.untyped_storage())._cdata not in given | self.alive.keys():
                self.alive[s._cdata] = s.nbytes()
                weakref.finalize(s, self.alive.pop, s._cdata)
        self.peak = max(self.peak, self.bytes)
        return out

    @property
    def bytes(self) -> int:
        return sum(self.alive.values())


@dataclass(frozen=True)
class Step:
    """What was held between the block's forward and its backward, the most there was at once, ops, bytes sent, gradients."""

    held: int
    peak: int
    ops: Counter[str]
    sent: int
    gradients: list[Tensor]


def step(mechanism: Callable[..., Any], at: Path) -> Step:
    torch.manual_seed(0)
    block, head, x = Block(), nn.Linear(64, 1024, bias=False), torch.randn(256, 64, requires_grad=True)
    site = Site("block")
    with mechanism(site, at) as run:
        for _ in range(3):  # the first calls write an op log and prove it
            head(run(block, x)).exp().sum().backward()
        for t in (x, *block.parameters(), *head.parameters()):
            t.grad = None
        site.sent_bytes = 0
        with Storages() as storages:
            out = run(block, x)
            held = storages.bytes - out.untyped_storage().nbytes()
            head(out).exp().sum().backward()
        gradients = [t.grad for t in (x, *block.parameters(), *head.parameters()) if t.grad is not None]
        return Step(held, storages.peak, storages.ops, site.sent_bytes, gradients)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Step:
    found = step(keep, tmp_path_factory.mktemp("plain"))
    assert found.held == PLAIN
    return found


@pytest.mark.parametrize("mechanism", TABLE, ids=lambda m: m.__name__)
def test_table(mechanism: Callable[..., Any], plain: Step, tmp_path: Path) -> None:
    seen = step(mechanism, tmp_path)
    again = [op for op in (seen.ops - plain.ops).elements() if op in ("native_layer_norm", "addmm", "gelu")]
    found = Row(plain.held - seen.held, plain.peak - seen.peak, tuple(sorted(again)), seen.sent)
    assert found == TABLE[mechanism]
    assert len(seen.gradients) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen.gradients, plain.gradients, strict=True))  # to the last bit
