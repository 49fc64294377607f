"""A small byte-level GPT on real English: `ullage plan examples/gpt.py:workload --budget "60% of plain"`."""

import torch
import torch.nn.functional as F

import ullage as ul
from ullage.demo import GPT, english_bytes


def next_byte_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def workload(batch: int = 8, seq: int = 256, layers: int = 6, width: int = 192) -> ul.Workload:
    ids = torch.tensor(english_bytes()[: batch * seq]).view(batch, seq)
    model = GPT(layers=layers, width=width, seq=seq)
    return ul.Workload(model, ids, loss=next_byte_loss, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-4))
