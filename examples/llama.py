"""A Hugging Face model in a plain training loop, inside a budget.

python examples/llama.py
ullage plan examples/llama.py:workload --budget "70% of plain"
"""

from __future__ import annotations

import pydoc_data.topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ullage as ul

BATCH, SEQ, STEPS = 4, 64, 5


def batches() -> list[dict[str, torch.Tensor]]:
    """English that ships with Python, one byte a token. The last batch is small, as the last of an epoch is."""
    text = "".join(pydoc_data.topics.topics[k] for k in sorted(pydoc_data.topics.topics)).encode()
    ids = torch.tensor(list(text[: STEPS * BATCH * SEQ])).view(STEPS, BATCH, SEQ)
    rows = [*ids[:-1], ids[-1][:2]]
    return [{"input_ids": r, "labels": r} for r in rows]


def workload() -> ul.Workload:
    """The model has random weights; its own `.loss` is used."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        use_cache=False,  # a cache that grows in forward would grow again when a block is recomputed
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    return ul.Workload(model, batches()[0], optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3))


def main() -> None:
    work = workload()
    plan = ul.plan(work, budget="70% of plain")
    print(plan)
    ul.verify(work, plan).raise_if_failed()
    model = work.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with plan.apply(model) as handle:
        for batch in batches():
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            print(f"loss {loss.item():.4f}")
        print(handle.report())


if __name__ == "__main__":
    main()
