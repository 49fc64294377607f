"""Find out, before the first step, a monitor's model, plan and device, and whether ops can be counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ullage._errors import ArgumentError
from ullage.apply import Handle, handle_on, model_of
from ullage.monitor._loggers import Logger
from ullage.monitor._records import Header, machine_facts


def checked(loggers: Any) -> list[Any]:
    """The loggers, as a list. ArgumentError: one of them is none."""
    found = list(loggers) if isinstance(loggers, Iterable) else [loggers]
    for logger in found:
        if not isinstance(logger, Logger):
            raise ArgumentError(
                f"loggers: a {type(logger).__name__} has no log(metrics, step); wrap a writer or run in TensorBoardLogger, "
                "WandbLogger or MLflowLogger of ullage.monitor"
            )
    return found


def model_and_handle(given: Any) -> tuple[nn.Module, Handle | None]:
    """The model, and the handle of the plan in force on it. ArgumentError: neither was given."""
    if isinstance(given, Handle):
        model = model_of(given)
        if model is None or not given.active:
            raise ArgumentError("model: this handle's plan was removed, or its model is gone; give the model itself")
        return model, given
    if not isinstance(given, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module or the Handle of a plan, got {type(given).__name__}")
    return given, handle_on(given)


def device_of(model: nn.Module) -> tuple[torch.device, dict[str, str]]:
    """The device to watch, and what can't be told of others."""
    found = list(dict.fromkeys(t.device for t in (*model.parameters(), *model.buffers())))
    if not found:
        return torch.device("cpu"), {}
    device = next((d for d in found if d.type == "cuda"), found[0])
    others = [str(d) for d in found if d.type == "cuda" and d != device]
    more = {f"memory and energy of {', '.join(others)}": f"one device is watched, {device}"} if others else {}
    return device, more


def is_compiled(model: nn.Module) -> bool:
    """Is it, or a module in it, compiled?"""
    return any(getattr(m, "_compiled_call_impl", None) or hasattr(m, "_orig_mod") for m in model.modules())


def why_not_counted(count_ops: bool, warmup: int, compiled: bool) -> str:
    """Why no step's ops are counted; "" if one's are."""
    if not count_ops:
        return "count_ops=False; pass flops_per_step= and peak_flops="
    if compiled:
        return "the model is compiled, and its ops can't be counted; pass flops_per_step= and peak_flops="
    return "" if warmup else "warmup=0 leaves no step to count ops in; pass flops_per_step= and peak_flops="


def header(
    handle: Handle | None,
    device: str,
    name: str,
    warmup: int,
    flops: float | None,
    peak: float | None,
    energy: list[str],
    not_available: dict[str, str],
) -> Header:
    """The header of a run that starts now."""
    plan = handle.plan if handle is not None else None
    facts: dict[str, Any] = dict(machine_facts())
    return Header(
        **facts,
        device=device,
        device_name=name,
        warmup=warmup,
        plan=plan.digest if plan is not None else "",
        predicted_peak_bytes=plan.predicted.peak_bytes if plan is not None else None,
        budget_bytes=plan.budget_bytes if plan is not None else None,
        flops_per_step=flops,
        peak_flops=peak,
        energy=energy,
        not_available=not_available,
    )
