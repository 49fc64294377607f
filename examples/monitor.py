"""Train the small GPT under a plan and watch it: `python examples/monitor.py`; with `run.jsonl` as argument, a line per step goes there."""

import sys

import torch
import torch.nn.functional as F

import ullage as ul
from ullage.demo import GPT, english_bytes


def next_byte_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def workload(batch: int = 4, seq: int = 64, layers: int = 3, width: int = 64) -> ul.Workload:
    ids = torch.tensor(english_bytes()[: batch * seq]).view(batch, seq)
    model = GPT(layers=layers, width=width, heads=4, seq=seq)
    return ul.Workload(model, ids, loss=next_byte_loss, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4))


def main(jsonl: str | None) -> None:
    batch, seq = 4, 64
    work = workload(batch, seq)
    plan = ul.plan(work, budget="80% of plain", costs="roofline")
    model, text = work.model, torch.tensor(english_bytes())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    with plan.apply(model) as handle:
        # A processor's FLOP/s are in no table: this is a modest guess at one core.
        with ul.Monitor(
            handle, samples_per_step=batch, tokens_per_step=batch * seq, peak_flops=5e10, jsonl=jsonl
        ) as monitor:
            for k in range(20):
                ids = text[k * batch * seq : (k + 1) * batch * seq].view(batch, seq)
                with monitor.step() as step:
                    loss = next_byte_loss(model(ids), ids)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    step.loss(loss)
        print(monitor)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
