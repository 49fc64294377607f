"""Other ways to save activations, each a function that changes a model in place before it trains.

Every wrapped block goes through `torch.utils.checkpoint` (non-reentrant) with its defaults, early stop included:
torchtitan turns that off, which can only be slower. What a peer can't do on a model raises `NotApplicable`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _models import Model, blocks_of
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

MEMORY_BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class NotApplicable(Exception):
    """This peer can't be used on this model; the message says why."""


@dataclass(frozen=True)
class Peer:
    """`apply(model, facts)` puts it on. `group`: "eager", "compiled" (aot_eager) or "inductor"."""

    apply: Callable[[nn.Module, Model], None]
    group: str = "eager"


def _wrap(blocks: list[nn.Module], **options: Any) -> None:
    for block in blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **options)


def _every(k: int) -> Callable[[nn.Module, Model], None]:
    def apply(model: nn.Module, facts: Model) -> None:
        _wrap(blocks_of(model, facts)[k - 1 :: k])

    return apply


class Segments(nn.Module):
    """A chain of blocks as torch's `checkpoint_sequential` runs it; further arguments go to every block."""

    def __init__(self, blocks: list[nn.Module], segments: int) -> None:
        super().__init__()
        self.blocks, self.segments = nn.ModuleList(blocks), segments

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the chain; the last segment keeps its activations."""
        functions = [lambda h, block=b: block(h, *args, **kwargs) for b in self.blocks]
        return checkpoint_sequential(functions, self.segments, x, use_reentrant=False)


def _segments(model: nn.Module, facts: Model) -> None:
    if not facts.chains:
        raise NotApplicable(facts.not_a_chain)
    for name in facts.chains:
        chain = model.get_submodule(name)
        assert isinstance(chain, nn.ModuleList | nn.Sequential)
        blocks = list(chain)
        model.set_submodule(name, type(chain)(*_one(chain, Segments(blocks, round(math.sqrt(len(blocks)))))))


def _one(chain: nn.Module, only: nn.Module) -> tuple[Any, ...]:
    return ([only],) if isinstance(chain, nn.ModuleList) else (only,)


def torchtitan_ops() -> set[Any]:
    """What torchtitan's `SelectiveAC` saves by default (torchtitan b5bcd76, `_get_default_save_ops`): PyTorch's list of compute-heavy
    ops, fused attention, `max`, `linear`, `topk`. Its collectives and FlexAttention do not occur here. The CPU's own fused attention is
    added: it does what those on the list do on a GPU, and is there under a name of its own."""
    from torch._functorch.partitioners import get_default_op_list

    aten = torch.ops.aten
    return {op.default for op in get_default_op_list().compute_intensive_ops} | {
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_attention_math.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten.max.default,
        aten.linear.default,
        aten.topk.default,
    }


def _sac_policy(counted: set[Any]) -> Callable[..., CheckpointPolicy]:
    """Save the ops of the list, but of the `counted` ones only the first, third, fifth and so on."""
    saved, seen = torchtitan_ops(), {False: 0, True: 0}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in counted:
            seen[ctx.is_recompute] += 1
            if seen[ctx.is_recompute] % 2 == 0:
                return CheckpointPolicy.PREFER_RECOMPUTE
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


MM = {torch.ops.aten.mm.default, torch.ops.aten.linear.default}  # what torchtitan counts; its layers have no biases


def _sac(k: int, counted: set[Any] = MM) -> Callable[[nn.Module, Model], None]:
    def apply(model: nn.Module, facts: Model) -> None:
        _wrap(
            blocks_of(model, facts)[k - 1 :: k],
            context_fn=lambda: create_selective_checkpoint_contexts(_sac_policy(counted)),
        )

    return apply


def _sac_addmm(model: nn.Module, facts: Model) -> None:
    linears = [m for b in blocks_of(model, facts) for m in b.modules() if isinstance(m, nn.Linear)]
    if not any(m.bias is not None for m in linears):
        raise NotApplicable("no linear layer of a block has a bias: it would be the same as SAC, every block")
    _sac(1, MM | {torch.ops.aten.addmm.default})(model, facts)


def _hugging_face(model: nn.Module, facts: Model) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    if enable is None:
        raise NotApplicable("not a Hugging Face model")
    enable()


def _compiled(backend: str, budget: float) -> Callable[[nn.Module, Model], None]:
    def apply(model: nn.Module, facts: Model) -> None:
        torch._functorch.config.activation_memory_budget = budget
        model.compile(backend=backend, dynamic=False)

    return apply


PEERS: dict[str, Peer] = {
    "checkpoint, every block": Peer(_every(1)),
    "checkpoint, every 2nd block": Peer(_every(2)),
    "checkpoint, every 3rd block": Peer(_every(3)),
    "checkpoint_sequential, √N segments": Peer(_segments),
    "SAC, every block": Peer(_sac(1)),
    "SAC with addmm counted, every block": Peer(_sac_addmm),
    "SAC, every 2nd block": Peer(_sac(2)),
    "Hugging Face's switch": Peer(_hugging_face),
    **{f"aot_eager, budget {b}": Peer(_compiled("aot_eager", b), "compiled") for b in MEMORY_BUDGETS},
    **{f"inductor, budget {b}": Peer(_compiled("inductor", b), "inductor") for b in MEMORY_BUDGETS},
}
