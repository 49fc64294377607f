"""Train the GPT three ways and compare predicted and measured peak, step time and loss."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.demo._gpt import GPT, english_bytes
from ullage.measure._measure import hand_back_pages, keep_pages, record_peak
from ullage.measure._state import leaves_rng

BATCH, SEQ = 6, 256
LAYERS, WIDTH, HEADS = 6, 128, 4


class DemoRow(msgspec.Struct, frozen=True):
    """One contender."""

    name: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    step_seconds: float
    tokens_per_second: float
    final_loss: str


class DemoResult(msgspec.Struct, frozen=True, kw_only=True):
    """The table, and what the demo promises: same losses, predictions within 1 %, budget kept."""

    rows: list[DemoRow]
    budget_bytes: int
    same_loss: bool
    predicted: bool
    kept: bool

    @property
    def ok(self) -> bool:
        """Every promise was kept."""
        return self.same_loss and self.predicted and self.kept


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _batches(steps: int) -> list[Tensor]:
    text = torch.tensor(english_bytes())
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(text) - SEQ, (steps, BATCH), generator=generator)
    return [torch.stack([text[s : s + SEQ] for s in row]) for row in starts.tolist()]


@leaves_rng
def run_demo(steps: int, budget: str, output: str, progress: Callable[..., None]) -> DemoResult:
    """Run the demo; writes ullage's plan to `output`.

    Args:
        steps: training steps per contender.
        budget: of ullage's plan.
        output: file of the plan.
        progress: called with a stage and, while training, steps done and their total.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine two threads that wait for each other take many times as long
    try:
        return _run(steps, budget, output, progress)
    finally:
        hand_back_pages()
        torch.set_num_threads(threads)


def _run(steps: int, budget: str, output: str, progress: Callable[..., None]) -> DemoResult:
    torch.manual_seed(0)
    start, batches = GPT(LAYERS, WIDTH, HEADS, SEQ), _batches(steps)
    work = ul.Workload(copy.deepcopy(start), batches[0], loss=_loss, optimizer=_optimizer)
    progress("profiling")
    facts = ul.profile(work)
    chosen = ul.plan(work, budget, profile=facts, progress=progress)
    chosen.save(output)
    every = ul.plan(work, policy="every_block", profile=facts, progress=progress)
    contenders: list[tuple[str, ul.Plan | None]] = [("plain", None), ("every block", every)]
    contenders.append((f"ullage, {budget}", chosen))
    keep_pages()  # otherwise page faults make the plain step, which allocates most, look slow
    peaks = []
    for name, plan in contenders:
        progress(f"recording the allocator: {name}")
        peaks.append(record_peak(work, plan))
    trained = _train_side_by_side(start, [p for _, p in contenders], batches, progress)
    rows = []
    for (name, plan), peak, (seconds, loss) in zip(contenders, peaks, trained, strict=True):
        predicted = facts.peak_bytes if plan is None else plan.predicted.peak_bytes
        rows.append(DemoRow(name, predicted, peak, seconds, BATCH * SEQ / seconds, f"{loss:.9f}"))
    assert chosen.budget_bytes is not None
    return DemoResult(
        rows=rows,
        budget_bytes=chosen.budget_bytes,
        same_loss=len({loss.hex() for _, loss in trained}) == 1,
        predicted=all(abs(r.predicted_peak_bytes / r.measured_peak_bytes - 1) <= 0.01 for r in rows),
        kept=rows[-1].measured_peak_bytes <= chosen.budget_bytes,
    )


def _optimizer(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3)


class _Trainer:
    """One contender's model, optimizer and generator."""

    def __init__(self, start: GPT, plan: ul.Plan | None) -> None:
        self.model = copy.deepcopy(start)
        self.optimizer = _optimizer(self.model.parameters())
        self.handle = plan.apply(self.model) if plan is not None else None
        self.rng = torch.Generator().manual_seed(1).get_state()
        self.times: list[float] = []
        self.loss = 0.0

    def step(self, ids: Tensor) -> None:
        torch.set_rng_state(self.rng)  # dropout draws what it drew for the others
        begin = time.perf_counter()
        loss = _loss(self.model(ids), ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.times.append(time.perf_counter() - begin)
        self.loss = loss.item()
        self.rng = torch.get_rng_state()


def _train_side_by_side(
    start: GPT, plans: Sequence[ul.Plan | None], batches: list[Tensor], progress: Callable[..., None]
) -> list[tuple[float, float]]:
    """Per contender: median step time in seconds (after two steps of warm-up) and the last loss.

    A step of each in turn, so that whatever else the machine does hits all of them.
    """
    trainers = [_Trainer(start, plan) for plan in plans]
    total = len(batches) * len(trainers)
    for k, ids in enumerate(batches):
        for j, trainer in enumerate(trainers):
            progress("training", k * len(trainers) + j, total)
            trainer.step(ids)
    return [(statistics.median(t.times[2:]), t.loss) for t in trainers]
