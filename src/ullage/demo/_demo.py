"""Train the GPT three ways and compare predicted and measured peak, step time and loss."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

import ullage as ul
from ullage.demo._gpt import GPT, english_bytes
from ullage.measure._measure import keep_pages

BATCH, SEQ = 4, 256


class DemoRow(msgspec.Struct, frozen=True):
    """One contender."""

    name: str
    predicted_peak_bytes: int
    measured_peak_bytes: int
    step_seconds: float
    tokens_per_second: float
    final_loss: str


class Verdict(msgspec.Struct, frozen=True):
    """What the demo promises: same losses, predictions within 1 %, budget kept."""

    same_loss: bool
    predicted: bool
    budget: bool


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def _batches(steps: int) -> list[Tensor]:
    text = torch.tensor(english_bytes())
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(0, len(text) - SEQ, (steps, BATCH), generator=generator)
    return [torch.stack([text[s : s + SEQ] for s in row]) for row in starts.tolist()]


def run_demo(steps: int, budget: str, output: str, progress: Callable[[str], None]) -> tuple[list[DemoRow], Verdict]:
    """Run the demo; writes ullage's plan to `output`."""
    torch.manual_seed(0)
    start = GPT(seq=SEQ)
    batches = _batches(steps)
    keep_pages()

    def optimizer(params: object) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-3)  # type: ignore[arg-type]

    work = ul.Workload(copy.deepcopy(start), batches[0], loss=_loss, optimizer=optimizer)
    progress("profiling")
    facts = ul.profile(work)
    plans: list[tuple[str, ul.Plan | None]] = [("plain", None)]
    plans.append(("every block", ul.plan(work, policy="every_block", profile=facts, progress=progress)))
    chosen = ul.plan(work, budget, profile=facts, progress=progress)
    chosen.save(output)
    plans.append((f"ullage, {budget}", chosen))
    rows = []
    for name, plan in plans:
        progress(f"training: {name}")
        measured = ul.measure(work, plan, steps=1).peak_bytes
        predicted = facts.peak_bytes if plan is None else plan.predicted.peak_bytes
        seconds, loss = _train(copy.deepcopy(start), plan, batches, optimizer)
        rows.append(DemoRow(name, predicted, measured, seconds, BATCH * SEQ / seconds, loss.hex()))
    rows = [msgspec.structs.replace(r, final_loss=f"{float.fromhex(r.final_loss):.9f}") for r in rows]
    verdict = Verdict(
        len({r.final_loss for r in rows}) == 1,
        all(abs(r.predicted_peak_bytes / r.measured_peak_bytes - 1) <= 0.01 for r in rows),
        chosen.budget_bytes is not None and rows[-1].measured_peak_bytes <= chosen.budget_bytes,
    )
    return rows, verdict


def _train(
    model: GPT, plan: ul.Plan | None, batches: list[Tensor], make: Callable[[object], torch.optim.Optimizer]
) -> tuple[float, float]:
    """Median step time in seconds (after two steps of warm-up) and the last loss."""
    torch.manual_seed(1)
    optimizer = make(model.parameters())
    times = []
    with plan.apply(model) if plan is not None else contextlib.nullcontext():
        for ids in batches:
            begin = time.perf_counter()
            loss = _loss(model(ids), ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - begin)
    ordered = sorted(times[2:] or times)
    return ordered[len(ordered) // 2], loss.item()
