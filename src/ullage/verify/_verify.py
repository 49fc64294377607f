"""`verify`: run plain steps twice and planned steps once from the same state, and compare every bit."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import torch
from torch import Tensor

from ullage._errors import VerifyError
from ullage.apply import Handle
from ullage.measure._state import helpers_of, preserved
from ullage.planner import Plan
from ullage.verify._units import verify_units
from ullage.workload import Instance, Workload, run_step


class Difference(msgspec.Struct, frozen=True):
    """A tensor that differs: its name and the largest absolute difference."""

    name: str
    max_abs: float


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `verify`.

    Attributes:
        ok: every compared tensor that two plain runs agree on is bitwise equal under the plan.
        scope: "step" (whole steps compared) or "units" (unit by unit, where the plain step does not fit).
        steps: steps compared.
        compared: number of tensors compared.
        recomputed_ops: replays of units that happened while verifying.
        differences: tensors the plan changed.
        unstable: tensors in which two plain runs differ from each other; the plan is not blamed for these.
    """

    ok: bool
    scope: str
    steps: int
    compared: int
    replays: int
    differences: list[Difference]
    unstable: list[Difference]

    def raise_if_failed(self) -> None:
        """Raise VerifyError, naming the tensors, if the check failed."""
        if not self.ok:
            names = ", ".join(f"{d.name} (max abs {d.max_abs:.3g})" for d in self.differences[:5])
            raise VerifyError(
                f"the planned step differs from the plain one in {len(self.differences)} tensors: {names}"
            )

    def __str__(self) -> str:
        state = "ok: bitwise equal" if self.ok else f"FAILED: {len(self.differences)} tensors differ"
        lines = [f"{state} ({self.compared} tensors over {self.steps} steps, by {self.scope}; {self.replays} replays)"]
        lines += [f"  differs: {d.name}, max abs {d.max_abs:.3g}" for d in self.differences[:20]]
        lines += [f"  unstable without any plan: {d.name}, max abs {d.max_abs:.3g}" for d in self.unstable[:20]]
        return "\n".join(lines)


def verify(work: Workload, plan: Plan, steps: int = 3, scope: str = "auto") -> Check:
    """Prove that the plan changes no bit of gradients, buffers, parameters and optimizer state.

    Args:
        work: what is trained; left as found.
        plan: the plan to check.
        steps: steps from the same state and RNG.
        scope: "step", "units", or "auto" (units where the plain step runs out of memory).

    Raises:
        ApplyError, PlanMismatch: the plan can't be applied.
    """
    inst = work.instance()
    if scope not in ("auto", "step", "units"):
        raise ValueError(f"scope={scope!r}: expected 'auto', 'step' or 'units'")
    if scope != "units":
        try:
            return _by_step(inst, plan, steps)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            memory = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if scope == "step" or not memory:
                raise
    differences, compared, replays = verify_units(inst, plan)
    rows = [Difference(n, d) for n, d in differences]
    return Check(ok=not rows, scope="units", steps=1, compared=compared, replays=replays, differences=rows, unstable=[])


def _by_step(inst: Instance, plan: Plan, steps: int) -> Check:
    first, _ = _run(inst, None, steps)
    second, _ = _run(inst, None, steps)
    planned, handle = _run(inst, plan, steps)
    unstable = _differences(first, second)
    names = {d.name for d in unstable}
    differences = [d for d in _differences(first, planned) if d.name not in names]
    replays = sum(u.recomputed for u in handle.report().units) if handle is not None else 0
    return Check(
        ok=not differences,
        scope="step",
        steps=steps,
        compared=len(first),
        replays=replays,
        differences=differences,
        unstable=unstable,
    )


def _run(inst: Instance, plan: Plan | None, steps: int) -> tuple[dict[str, Tensor], Handle | None]:
    """Every tensor a step leaves or makes, copied to host memory."""
    seen: dict[str, Tensor] = {}
    handle = plan.apply(inst.model) if plan is not None else None
    with handle or contextlib.nullcontext(), preserved(inst), _gradients(inst, seen) as label:
        for k in range(steps):
            label["step"] = f"step {k + 1}"
            loss = run_step(inst)
            if loss is not None:
                seen[f"step {k + 1}: loss"] = loss.cpu().clone()
        for name, tensor in _state(inst):
            seen[f"after {steps} steps: {name}"] = tensor.detach().to("cpu", copy=True)
    return seen, handle


@contextlib.contextmanager
def _gradients(inst: Instance, seen: dict[str, Tensor]) -> Any:
    """Note every gradient as it stands after its last accumulation."""
    label = {"step": ""}
    handles = []
    for name, p in inst.model.named_parameters():
        if p.requires_grad:

            def note(q: Tensor, name: str = name) -> None:
                assert q.grad is not None
                seen[f"{label['step']}: gradient of {name}"] = q.grad.detach().to("cpu", copy=True)

            handles.append(p.register_post_accumulate_grad_hook(note))
    try:
        yield label
    finally:
        for h in handles:
            h.remove()


def _state(inst: Instance) -> list[tuple[str, Tensor]]:
    rows: list[tuple[str, Tensor]] = [(f"parameter {n}", p) for n, p in inst.model.named_parameters()]
    rows += [(f"buffer {n}", b) for n, b in inst.model.named_buffers()]
    for k, helper in enumerate(helpers_of(inst)):
        if isinstance(helper, torch.optim.Optimizer):
            for i, state in helper.state_dict()["state"].items():
                rows += [(f"optimizer {k} state {i}.{n}", t) for n, t in state.items() if isinstance(t, Tensor)]
    return rows


def _differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[Difference]:
    rows = [Difference(n, float("nan")) for n in a.keys() ^ b.keys()]
    for n in a.keys() & b.keys():
        if not same_bits(a[n], b[n]):
            gap = (a[n].double() - b[n].double()).abs().max().item() if a[n].shape == b[n].shape else float("nan")
            rows.append(Difference(n, gap))
    return sorted(rows, key=lambda d: d.name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality: shape, dtype and every byte (so NaN equals itself and -0.0 differs from 0.0)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or torch.equal(
        a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8)
    )
