"""Streams without a device: work waits in queues, and runs when a test says so, or in an order drawn by chance.

What CUDA gives is kept, and no more: a stream runs its work in order; streams know nothing of each other but by events; memory that
is let go of may be written to again in the order of the stream it was allocated in, which this link does at once. So who reads too
early, or lets go of memory too early, gets wrong bytes; who lets go of memory that was not allocated here gets an error.
"""

from __future__ import annotations

import contextlib
import mmap
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ullage.offload._held import Part
from ullage.offload._link import Link

FREED = 0xDD  # what memory holds that was let go of


class Event:
    """Done once `at`, a time in seconds, is known."""

    def __init__(self) -> None:
        self.at: float | None = None


class Stream:
    """Work that waits: from when on it may run, and an event to wait for or a call that returns how many seconds it takes."""

    def __init__(self, name: str) -> None:
        self.name, self.time = name, 0.0  # when what has run was over
        self.queue: deque[tuple[float, Event | Callable[[], float]]] = deque()

    def start(self, earliest: float, work: Event | Callable[[], float]) -> None:
        """Run a piece of work."""
        if isinstance(work, Event):
            assert work.at is not None
            self.time = max(self.time, earliest, work.at)
        else:
            self.time = max(self.time, earliest)
            self.time += work()

    def __repr__(self) -> str:
        return f"<{self.name}: {len(self.queue)} queued>"


class _Raw:
    """Memory at an address, which it does not keep."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}


class SimulatedLink:
    """A `Link` whose device tensors are on the CPU.

    A byte takes a second to copy, other work none if nothing is said, and the host none at all. How long things take does not depend on
    the order in which streams go on here: each has a clock of its own, and waits bring them together.

    Args:
        seed: of the order in which streams go on.
        eager: ops of the current stream are torch's own: they have run when they return. A wait of that stream then has
            the others go on until it is over; they go on by chance at each copy too.
        steps: how many steps at most.
    """

    device, round_bytes = torch.device("cpu"), 1

    def __init__(self, seed: int = 0, eager: bool = False, steps: int = 7) -> None:
        self.steps = steps
        self.chance, self.eager, self.host = random.Random(seed), eager, 0.0
        self.main, self.side, self.out, self.into = map(Stream, ("main", "side", "out", "in"))
        self.streams = (self.main, self.side, self.out, self.into)
        self.pinned: list[Tensor] = []
        self.waits: list[tuple[str, Event]] = []  # that a stream was given
        self._current = self.main
        self._memory: dict[int, np.ndarray] = {}  # by address: all that was ever allocated
        self._pool: dict[tuple[Stream, int], list[np.ndarray]] = {}
        self._users: dict[int, set[Stream]] = {}  # by address

    # time

    def step(self, stream: Stream) -> bool:
        """Run what is first in a stream; False if there is nothing, or it waits."""
        if not stream.queue:
            return False
        earliest, work = stream.queue[0]
        if isinstance(work, Event) and work.at is None:
            return False
        stream.queue.popleft()
        stream.start(earliest, work)
        return True

    def _queue(self, stream: Stream, work: Event | Callable[[], float]) -> None:
        if self.eager and stream is self._current:
            stream.start(self.host, work)
            self.host = stream.time
        else:
            stream.queue.append((self.host, work))

    def go_on(self, steps: int) -> None:
        """Run some of what can run, in an order drawn by chance."""
        for _ in range(steps):
            order = list(self.streams)
            self.chance.shuffle(order)
            if not any(self.step(stream) for stream in order):
                return

    def run(self, *streams: Stream) -> None:
        """Run all that can run in some streams."""
        while any(self.step(stream) for stream in streams):
            pass

    def run_all(self) -> None:
        """Run everything, in an order drawn by chance."""
        while any(stream.queue for stream in self.streams):
            before = [len(stream.queue) for stream in self.streams]
            self.go_on(1)
            assert [len(stream.queue) for stream in self.streams] != before, f"deadlock: {self.streams}"

    def launch(self, work: Callable[[], object], seconds: float = 0.0, stream: Stream | None = None) -> None:
        """Queue work on a stream, as a kernel."""

        def run() -> float:
            work()
            return seconds

        self._queue(stream or self._current, run)

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one."""
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    # kernels

    def write(self, tensor: Tensor, data: bytes, stream: Stream | None = None) -> None:
        """Queue a kernel that writes to a tensor."""
        memory, found = self._at(tensor), np.frombuffer(data, np.uint8)
        self.launch(lambda: np.copyto(memory(), found), stream=stream)

    def read(self, tensor: Tensor, into: Callable[[bytes], object], stream: Stream | None = None) -> None:
        """Queue a kernel that reads a tensor."""
        memory = self._at(tensor)
        self.launch(lambda: into(memory().tobytes()), stream=stream)

    # memory

    def empty(self, nbytes: int) -> Tensor:
        if self.eager or not nbytes:
            return torch.full((nbytes,), FREED, dtype=torch.uint8)
        stream = self._current
        pool = self._pool.setdefault((stream, nbytes), [])
        memory = pool.pop() if pool else np.full(nbytes, FREED, np.uint8)
        address = memory.__array_interface__["data"][0]
        self._memory[address], self._users[address] = memory, set()
        mine = memory[:]  # a new array, which lives as long as the storage
        weakref.finalize(mine, self._freed, memory, address, stream)
        return torch.from_numpy(mine)

    def _freed(self, memory: np.ndarray, address: int, stream: Stream) -> None:
        for user in self._users[address]:
            self._queue(stream, self.mark(user))
        self.launch(lambda: memory.fill(FREED), stream=stream)
        self._pool[stream, len(memory)].append(memory)

    def _at(self, tensor: Tensor) -> Callable[[], np.ndarray]:
        """A tensor's memory, without keeping it."""
        address, nbytes = tensor.data_ptr(), tensor.numel()
        if not nbytes:
            return lambda: np.empty(0, np.uint8)
        for start, memory in self._memory.items():
            if start <= address < start + len(memory):
                part = memory[address - start : address - start + nbytes]
                return lambda: part
        storage = weakref.ref(tensor.untyped_storage())

        def found() -> np.ndarray:
            assert storage() is not None, "memory was let go of before a copy was over"
            return np.asarray(_Raw(address, nbytes))

        return found

    def share(self, tensor: Tensor, stream: Stream) -> None:
        for start, memory in self._memory.items():
            if start <= tensor.data_ptr() < start + len(memory):
                self._users[start].add(stream)

    # the rest of the protocol

    def pin(self, nbytes: int, lower: str = "the capacity") -> Tensor:
        self.pinned.append(torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8).fill_(0x11))
        return self.pinned[-1]

    def unpin(self, slab: Tensor) -> None:
        assert not self.out.queue and not self.into.queue, "unpinned while copies are queued"
        self.pinned = [s for s in self.pinned if s is not slab]

    def current(self) -> Stream:
        return self._current

    def fill(self, target: Tensor, value: int, stream: Stream) -> None:
        memory = self._at(target)
        self.launch(lambda: memory().fill(value), stream=stream)

    def mark(self, stream: Stream) -> Event:
        event = Event()

        def reached() -> float:
            event.at = stream.time
            return 0.0

        self._queue(stream, reached)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self.waits.append((stream.name, event))
        if self.eager and stream is self._current:
            self.synchronize(event)
        self._queue(stream, event)

    def copy_out(self, source: Tensor, slab: Tensor, parts: Sequence[Part], after: Iterable[Event]) -> Event:
        memory, host = self._at(source), slab.numpy()
        return self._copies(self.out, after, parts, lambda p: _copy(host, p.offset, memory(), p.start, p.length))

    def copy_in(self, slab: Tensor, target: Tensor, parts: Sequence[Part], after: Iterable[Event]) -> Event:
        memory, host = self._at(target), slab.numpy()
        return self._copies(self.into, after, parts, lambda p: _copy(memory(), p.start, host, p.offset, p.length))

    def fill_slab(self, slab: Tensor, parts: Sequence[Part], value: int, after: Iterable[Event]) -> None:
        host = slab.numpy()
        self._copies(self.out, after, parts, lambda p: host[p.offset : p.offset + p.length].fill(value))

    def _copies(
        self, stream: Stream, after: Iterable[Event], parts: Sequence[Part], one: Callable[[Part], object]
    ) -> Event:
        for event in after:
            self.waits.append((stream.name, event))
            self._queue(stream, event)
        for part in parts:
            self.launch(lambda part=part: one(part), part.length, stream)  # type: ignore[misc]
        if self.eager:
            self.go_on(self.chance.randint(0, self.steps))
        return self.mark(stream)

    def done(self, event: Event) -> bool:
        if event.at is None:
            return False
        self.host = max(self.host, event.at)  # or it could not have seen it
        return True

    def synchronize(self, event: Event) -> None:
        while not self.done(event):
            before = [len(stream.queue) for stream in self.streams]
            self.go_on(1)
            assert [len(stream.queue) for stream in self.streams] != before, f"deadlock: {self.streams}"

    def drain(self) -> None:
        for stream in (self.out, self.into):
            self.synchronize(self.mark(stream))

    def seconds_between(self, first: Event, second: Event) -> float | None:
        return second.at - first.at if first.at is not None and second.at is not None else None


class ThreadedLink(SimulatedLink):
    """One that many threads may call: what they do to it they do one after the other.

    Args:
        held: who waits for an event waits until the test has streams go on; else streams go on by chance meanwhile.
    """

    def __init__(self, seed: int = 0, eager: bool = False, steps: int = 7, held: bool = False) -> None:
        self.turn, self.held = threading.RLock(), held
        super().__init__(seed, eager, steps)

    def synchronize(self, event: Event) -> None:
        end = time.monotonic() + 20
        while not self.done(event):
            with self.turn:
                if not self.held and not self.done(event):
                    super().synchronize(event) if self.chance.random() < 0.1 else self.go_on(1)
            assert time.monotonic() < end, f"waits for ever: {self.streams}"
            time.sleep(0.0002 if self.held else 0)


def _one_after_the_other(name: str) -> Callable[..., Any]:
    real = getattr(SimulatedLink, name)

    def locked(self: ThreadedLink, *arguments: Any, **named: Any) -> Any:
        with self.turn:
            return real(self, *arguments, **named)

    return locked


for _name in (
    "step", "go_on", "run", "run_all", "launch", "write", "read", "_at", "_queue", "empty", "_freed", "share", "pin", "unpin", "fill",
    "mark", "wait", "copy_out", "copy_in", "done", "seconds_between",
):  # fmt: skip
    setattr(ThreadedLink, _name, _one_after_the_other(_name))


def _copy(to: np.ndarray, at: int, source: np.ndarray, start: int, length: int) -> None:
    to[at : at + length] = source[start : start + length]


def _as_protocol(link: SimulatedLink) -> Link:
    return link
