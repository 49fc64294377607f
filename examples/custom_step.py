"""A step of your own: GradScaler, gradient clipping and a schedule, inside a budget.

python examples/custom_step.py
ullage verify examples/custom_step.py:workload --plan plan.json
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from ullage.demo import GPT, english_bytes

BATCH, SEQ = 4, 64


def workload() -> ul.Workload:
    """`step` does everything itself; what it needs it reaches through its closure."""
    torch.manual_seed(0)
    model = GPT(layers=4, width=64, heads=4, seq=SEQ)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
    scaler = torch.amp.GradScaler("cpu")

    def step(model: nn.Module, ids: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids)
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()

    ids = torch.tensor(list(english_bytes()[: BATCH * SEQ])).view(BATCH, SEQ)
    return ul.Workload(model, ids, step=step)


def main() -> None:
    work = workload()
    plan = ul.plan(work, budget="75% of plain")
    print(plan)
    check = ul.verify(work, plan)
    print(check)
    check.raise_if_failed()
    measured = ul.measure(work, plan, steps=3)
    print(f"predicted {plan.predicted.peak_bytes:,} bytes; measured {measured}")
    assert work.step is not None
    with plan.apply(work.model):
        for _ in range(3):
            work.step(work.model, work.batch)


if __name__ == "__main__":
    main()
