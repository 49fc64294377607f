"""Other threads while one plans: their optimizers, their random numbers and their patches are none of a capture's business."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ullage as ul
from ullage._files import write_whole
from ullage.measure._turns import one_at_a_time
from ullage.workload._config import _quietly


def _net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 8))


def _work() -> ul.Workload:
    return ul.Workload(
        _net(), torch.ones(4, 8), loss=lambda o, b: o.square().mean(), optimizer=lambda p: torch.optim.AdamW(p)
    )


def _capture_around(other: Callable[[], Any]) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        try:
            other()
        except BaseException as error:
            errors.append(error)

    class Meets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = F.dropout(self.l(x))
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
            return h.square().mean()

    ul.profile(ul.Workload.from_factory(lambda: ul.Workload(Meets(), torch.ones(4, 8))), costs="roofline")
    assert errors == []


def _patches() -> list[Any]:
    import torch.optim.optimizer as optim

    return [
        torch.get_rng_state, F.one_hot, torch._VF.lstm, getattr(optim, "_foreach_supported_types", None),
        getattr(optim, "_get_foreach_kernels_supported_devices", None), len(optim._global_optimizer_pre_hooks),
        len(optim._global_optimizer_post_hooks), dict(os.environ), threading.active_count(),
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
    ]  # fmt: skip


def test_training_goes_on_while_another_thread_plans() -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    steps: list[float] = []

    def train() -> None:
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps.append(float(F.one_hot(torch.tensor([1]), 3).sum()))

    _capture_around(train)
    assert len(steps) >= 2 and set(steps) == {1.0}


def test_random_numbers_of_other_threads_are_those_without_planning() -> None:
    torch.manual_seed(5)
    torch.rand(1)
    drawn: list[float] = []
    _capture_around(lambda: drawn.append(float(torch.rand(1))))
    torch.manual_seed(5)
    torch.rand(1)
    assert len(drawn) >= 2
    assert drawn == [float(torch.rand(1)) for _ in drawn]


def test_two_plans_at_once_are_the_plans_alone() -> None:
    alone = ul.plan(_work(), "100% of plain", costs="roofline").digest
    before, found = _patches(), []
    works = [_work(), _work()]
    torch.set_rng_state(torch.tensor(before[-1], dtype=torch.uint8))
    threads = [
        threading.Thread(target=lambda w=w: found.append(ul.plan(w, "100% of plain", costs="roofline").digest))  # type: ignore[misc]
        for w in works
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert found == [alone, alone]
    assert _patches() == before


def test_the_second_caller_says_that_it_waits() -> None:
    said, told = [], threading.Event()

    def say(line: str) -> None:
        said.append(line)
        told.set()

    with one_at_a_time(), one_at_a_time():  # the holder may enter again
        thread = threading.Thread(target=lambda: ul.profile(work, costs="roofline", progress=say))
        work = _work()
        thread.start()
        assert told.wait(60)
        assert said == ["waiting for a plan or measurement in another thread"]
    thread.join()
    assert len(said) > 1


def _fails(x: torch.Tensor) -> torch.Tensor:
    raise KeyError("mine")


@pytest.mark.parametrize("call", ["profile", "refused", "plan", "measure", "verify"])
def test_nothing_is_left_in_the_process(call: str) -> None:
    work = _work()
    plan = ul.plan(work, "100% of plain", costs="roofline")
    model, optimizer = vars(work.model).keys() | set(), dict(vars(torch.optim.AdamW))
    before = _patches()
    if call == "refused":
        with pytest.raises(ul.CaptureError):
            ul.profile(ul.Workload(work.model, work.batch, loss=lambda o, b: _fails(o)), costs="roofline")
    else:
        {
            "profile": lambda: ul.profile(work),
            "plan": lambda: ul.plan(work, "100% of plain"),
            "measure": lambda: ul.measure(work, plan, steps=1),
            "verify": lambda: ul.verify(work, plan),
        }[call]()
    assert _patches() == before
    assert vars(work.model).keys() == model
    assert dict(vars(torch.optim.AdamW)) == optimizer


def test_a_factory_that_seeds_leaves_the_generator() -> None:
    torch.manual_seed(3)
    torch.rand(2)
    before = torch.get_rng_state()
    ul.profile(ul.Workload.from_factory(_work), costs="roofline")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_steps_own_is_left() -> None:
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    work = ul.Workload(
        nn.Linear(8, 8),
        torch.ones(4, 8),
        loss=lambda o, b: (o * torch.rand(o.shape, generator=generator)).mean(),
    )
    with contextlib.suppress(ul.UllageError):
        ul.profile(work, costs="roofline")
    assert torch.equal(generator.get_state(), before)


def test_files_are_written_without_touching_the_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, modes = os.umask(0o027), list[int]()
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the whole process would see it"))
        write_whole(tmp_path / "x", b"1")
        for mode in (0o600, 0o664):
            (tmp_path / "x").chmod(mode)
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", lambda fd: modes.append(os.fstat(fd).st_mode & 0o777))
                write_whole(tmp_path / "x", b"2")
            assert (tmp_path / "x").stat().st_mode & 0o777 == mode
        write_whole(tmp_path / "y", b"1")
    finally:
        monkeypatch.undo()
        os.umask(old)
    assert modes == [0o600, 0o640]  # while it is written: never wider than it will be
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_seeding_in_a_step_is_seen_by_the_step_alone() -> None:
    seen: list[tuple[int, bool]] = []

    def other() -> None:
        seen.append((torch.initial_seed(), torch.equal(torch.get_rng_state(), before)))

    class Seeds(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert torch.manual_seed(11) is torch.default_generator
            assert torch.initial_seed() == 11
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            return x.square().mean()

    work = ul.Workload(nn.Sequential(nn.Linear(8, 8), Seeds()), torch.ones(4, 8), loss=lambda o, b: o)
    torch.manual_seed(5)
    torch.rand(1)
    before = torch.get_rng_state()
    ul.profile(work, costs="roofline")
    assert set(seen) == {(5, True)}
    assert torch.equal(torch.get_rng_state(), before)
    assert type(torch.random.default_generator) is torch.Generator


def test_a_replay_takes_the_branches_that_the_forward_drew() -> None:
    taken: list[tuple[float, ...]] = []

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = (float(torch.rand(1)) for _ in range(3))
            taken.append((first, second, third))
            return torch.tanh(self.b(torch.tanh(self.a(x))))

    model = nn.Sequential(nn.Linear(64, 64), Draws(), nn.Linear(64, 64))
    work = ul.Workload(model, torch.ones(512, 64), loss=lambda o, b: o.square().mean())
    ul.plan(work, costs="roofline", policy="every_n:1")
    assert len(taken) > len(set(taken)) and all(len(set(t)) == 3 for t in taken)


def test_the_state_that_torchs_own_checkpoint_keeps_is_counted() -> None:
    from torch.utils.checkpoint import checkpoint

    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(torch.tanh, x, use_reentrant=False)  # type: ignore[no-any-return]

    model = nn.Sequential(nn.Linear(8, 8), Own(), nn.Linear(8, 8))
    work = ul.Workload(model, torch.ones(4, 8), loss=lambda o, b: o.square().mean())
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


# In a process of its own: what an allocator gives back hangs on what else lies in its arenas.
RESIDENT = """
import os, pathlib, torch
from torch import nn
import ullage as ul

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

work = ul.Workload(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 2)), torch.randn(4, 8), loss=lambda out, _: out.sum())
ul.measure(work, steps=1)
before = resident()
held = [torch.ones(4 * 2**20) for _ in range(8)]
assert resident() - before > 100 * 2**20
del held
assert resident() - before < 32 * 2**20, resident() - before
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_freed_after_a_measurement_goes_back_to_the_system() -> None:
    run = subprocess.run([sys.executable, "-c", RESIDENT], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_transformers_is_as_talkative_as_before() -> None:
    levels = [30]
    logging = types.SimpleNamespace(
        get_verbosity=lambda: levels[-1], set_verbosity=levels.append, set_verbosity_error=lambda: levels.append(40)
    )
    with contextlib.suppress(KeyError), _quietly(types.SimpleNamespace(logging=logging)):
        raise KeyError
    assert levels == [30, 40, 30]
