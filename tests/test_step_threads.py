"""A forward that calls its blocks in threads: plans refuse it by that name, and what they advise works."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul

Blocks = list[Callable[[Tensor], Tensor]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 64), nn.Linear(64, 16), nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x + self.down(F.gelu(self.up(x))))
        return out


def _in_turn(blocks: Blocks, x: Tensor) -> list[Tensor]:
    return [b(x) for b in blocks]


def _pool(blocks: Blocks, x: Tensor) -> list[Tensor]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda b: b(x), blocks))


def _one_worker(blocks: Blocks, x: Tensor) -> list[Tensor]:
    with ThreadPoolExecutor(1) as pool:
        return [pool.submit(b, x).result() for b in blocks]


def _event_loop_threads(blocks: Blocks, x: Tensor) -> list[Tensor]:
    async def run() -> list[Tensor]:
        return list(await asyncio.gather(*(asyncio.to_thread(b, x) for b in blocks)))

    return asyncio.run(run())


def _torch_futures(blocks: Blocks, x: Tensor) -> list[Tensor]:
    """If such a thread dies, nobody sets its future, and the step waits for ever."""

    def start(block: Callable[[Tensor], Tensor]) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        threading.Thread(target=lambda: future.set_result(block(x) + torch.zeros(16))).start()
        return future

    return list(torch.futures.wait_all([start(b) for b in blocks]))


def _coroutines(blocks: Blocks, x: Tensor) -> list[Tensor]:
    async def one(block: Callable[[Tensor], Tensor]) -> Tensor:
        await asyncio.sleep(0)
        return block(x)

    async def run() -> list[Tensor]:
        return list(await asyncio.gather(*(one(b) for b in blocks)))

    return asyncio.run(run())


def _forked(blocks: Blocks, x: Tensor) -> list[Tensor]:
    return [torch.jit.wait(f) for f in [torch.jit.fork(b, x) for b in blocks]]


class Parallel(nn.Module):
    def __init__(self, call: Callable[[Blocks, Tensor], list[Tensor]], checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.call, self.checkpointed = call, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        def run(block: nn.Module) -> Callable[[Tensor], Tensor]:
            return (lambda t: ul.checkpoint(block, t, keep="matmul_attention")) if self.checkpointed else block

        return torch.stack(self.call([run(b) for b in self.blocks], x)).square().mean()


def _work(model: nn.Module) -> ul.Workload:
    return ul.Workload(model, torch.randn(32, 16, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("call", [_pool, _one_worker, _event_loop_threads, _torch_futures])
def test_threads_are_refused_by_name_and_none_of_them_dies(
    call: Callable[[Blocks, Tensor], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    died: list[object] = []
    monkeypatch.setattr(threading, "excepthook", died.append)
    with pytest.raises(
        ul.CaptureError,
        match=r"^tests/test_step_threads.py:\d+: in module blocks.0[.a-z]*: .* runs in another thread than the step .* "
        r"one after the other in the planned step, or use ullage.checkpoint in the threads",
    ):
        ul.profile(_work(Parallel(call)), costs="roofline")
    assert died == []


@pytest.mark.parametrize("call", [_coroutines, _forked])
def test_coroutines_and_forked_tasks_of_one_thread_are_planned(call: Callable[[Blocks, Tensor], list[Tensor]]) -> None:
    work = _work(Parallel(call))
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert ul.verify(work, plan, steps=1).ok
    in_turn = ul.plan(_work(Parallel(_in_turn)), policy="every_block", costs="roofline")
    assert plan.predicted.peak_bytes == in_turn.predicted.peak_bytes < in_turn.baseline.peak_bytes


@pytest.mark.parametrize("policy", ["every_block", "selective"])
def test_a_plan_made_for_one_after_the_other_is_exact_in_threads(policy: str) -> None:
    plan = ul.plan(_work(Parallel(_in_turn)), policy=policy, costs="roofline")
    check = ul.verify(_work(Parallel(_pool)), plan, steps=3)
    assert check.ok and check.replays == 12


@pytest.mark.parametrize("call", [_pool, _torch_futures])
def test_checkpoints_in_threads_are_exact(call: Callable[[Blocks, Tensor], list[Tensor]]) -> None:
    plain, ours = Parallel(_in_turn), Parallel(call, checkpointed=True)
    for _ in range(3):
        for model in (plain, ours):
            model(_work(model).batch).backward()
    for a, b in zip([*plain.parameters(), *plain.buffers()], [*ours.parameters(), *ours.buffers()], strict=True):
        assert torch.equal(a, b) and (a.grad is None or torch.equal(a.grad, b.grad))
