"""The one way a step is run: capture, verify and measure all call this."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ullage._errors import WorkloadError
from ullage.workload._batch import call_on, takes_targets, targets_of
from ullage.workload._workload import Instance


def forward(inst: Instance) -> Any:
    """Call the model on the batch as the workload says."""
    if inst.inputs is not None:
        return call_on(inst.model, inst.inputs(inst.batch), for_loss=False)
    return call_on(inst.model, inst.batch, for_loss=inst.loss is not None)


def compute_loss(inst: Instance) -> Tensor:
    """Forward and loss, under the workload's autocast.

    Raises:
        WorkloadError: there is no scalar loss.
    """
    with torch.autocast(inst.device.type, inst.autocast, enabled=inst.autocast is not None):
        output = forward(inst)
        if inst.loss is None:
            loss = getattr(output, "loss", output)
        elif takes_targets(inst.loss):
            loss = inst.loss(
                getattr(output, "logits", output), *targets_of(inst.model, inst.batch, inst.inputs, inst.loss)
            )
        else:
            loss = inst.loss(output, inst.batch)
    if isinstance(output, dict) and loss is output:
        loss = dict(output).get("loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        source = (
            "loss: the callable returned" if inst.loss is not None else "loss: none was given and the model returned"
        )
        raise WorkloadError(f"{source} {what}; pass loss=callable(output, batch) that returns a scalar")
    if not loss.requires_grad:
        raise WorkloadError(
            "loss: it depends on no parameter that requires grad (everything frozen, detached, or under no_grad?)"
        )
    return loss


def run_step(inst: Instance, before_update: Any = None) -> Tensor | None:
    """One whole step: micro-batches, the optimizer's step, gradients set to None. Returns the last loss, detached."""
    if inst.step is not None:
        inst.step(inst.model, inst.batch)
        if before_update is not None:
            before_update()
        return None
    last: Tensor | None = None
    for _ in range(inst.accumulate):
        loss = compute_loss(inst)
        last = loss.detach()
        (loss / inst.accumulate if inst.accumulate > 1 else loss).backward()
        del loss
    if before_update is not None:
        before_update()
    if inst.optimizer is not None:
        inst.optimizer.step()
        inst.optimizer.zero_grad(set_to_none=True)
    for parameter in inst.model.parameters():
        parameter.grad = None
    return last
