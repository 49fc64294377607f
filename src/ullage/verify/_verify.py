"""`verify`: run plain steps twice and planned steps once from the same state, and compare every bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import msgspec
import torch
from torch import Tensor

from ullage._errors import ArgumentError, VerifyError
from ullage._told import out_of_memory, planned_step, said_by, tells_of
from ullage.apply import Handle, apply_plan
from ullage.measure._measure import check_arguments, resident_bytes
from ullage.measure._reach import optimizers_of
from ullage.measure._snapshot import available_bytes
from ullage.measure._state import leaves_rng, preserved
from ullage.planner import Plan
from ullage.verify._compare import compare
from ullage.verify._units import verify_units
from ullage.workload import Instance, Setup, Workload, run_step


class Difference(msgspec.Struct, frozen=True):
    """A tensor that differs: its name and the largest absolute difference."""

    name: str
    max_abs: float


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """Result of `verify`.

    Attributes:
        ok: every compared tensor that two plain runs agree on is bitwise equal under the plan, and some gradient is.
        scope: "step" (whole steps compared) or "units" (unit by unit, where the plain step does not fit).
        steps: steps compared.
        compared: number of tensors compared.
        replays: replays of units that happened while verifying.
        differences: tensors the plan changed.
        unstable: tensors in which two plain runs differ from each other; the plan is not blamed for these.
        setup: the facts of the planned step; None for a plan of an older version.
    """

    ok: bool
    scope: str
    steps: int
    compared: int
    replays: int
    differences: list[Difference]
    unstable: list[Difference]
    setup: Setup | None = None

    def raise_if_failed(self) -> None:
        """Raise VerifyError, naming the tensors, if the check failed."""
        if not self.ok:
            if not self.differences:
                raise VerifyError(
                    "nothing is proven: two plain runs differ from each other in every gradient. Does the model draw from "
                    "a generator of its own, or keep state outside its modules?"
                )
            names = ", ".join(f"{d.name} (max abs {d.max_abs:.3g})" for d in self.differences[:5])
            raise VerifyError(
                f"the planned step differs from the plain one in {len(self.differences)} tensors: {names}"
            )

    def __str__(self) -> str:
        stable = self.compared - len(self.unstable)
        state = "ok: bitwise equal" if self.ok else f"FAILED: {len(self.differences)} tensors differ"
        if not self.ok and not self.differences:
            state = "NOTHING PROVEN: two plain runs differ from each other in every gradient"
        lines = [
            f"{state} ({stable} of {self.compared} tensors, over {self.steps} steps, by {self.scope}; {self.replays} replays)"
        ]
        lines += [str(self.setup)] if self.setup is not None else []
        lines += [f"  differs: {d.name}, max abs {d.max_abs:.3g}" for d in self.differences[:20]]
        lines += [f"  unstable without any plan: {d.name}, max abs {d.max_abs:.3g}" for d in self.unstable[:20]]
        return "\n".join(lines)


@tells_of(VerifyError)
@leaves_rng
def verify(
    work: Workload,
    plan: Plan,
    steps: int = 3,
    scope: str = "auto",
    *,
    progress: Callable[[str], None] | None = None,
) -> Verification:
    """Prove that the plan changes no bit of gradients, buffers, parameters and optimizer state.

    Args:
        work: what is trained; left as found.
        plan: the plan to check.
        steps: steps from the same state and RNG.
        scope: "step", "units", or "auto" (units where the plain step does not fit in the memory that is left).
        progress: called with a line at each stage.

    Raises:
        ArgumentError: unknown `scope`, or `steps` below 1.
        ApplyError, PlanMismatch: the plan can't be applied.
        VerifyError: the plain step raises, or only the planned one does.
    """
    check_arguments(work, plan, steps)
    if scope not in ("auto", "step", "units"):
        raise ArgumentError(f"scope={scope!r}: expected 'auto', 'step' or 'units'")
    say = progress or (lambda _: None)
    say("building the model")
    inst = work.instance()
    apply_plan(plan, inst.model).remove()  # refuse it now, not after the plain steps
    if scope == "step" or (scope == "auto" and _plain_fits(inst, plan)):
        try:
            return _by_step(inst, plan, steps, say)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if scope == "step":
                raise VerifyError(
                    f"the plain step does not fit into memory ({said_by(error)}); scope='units' compares unit by unit"
                ) from error
    with planned_step(VerifyError):
        found = verify_units(inst, plan, say)
    names = {n for n, _ in found.unstable}
    rows = [Difference(n, d) for n, d in found.differences if n not in names]
    unstable = [Difference(n, d) for n, d in found.unstable]
    return Verification(
        ok=not rows,
        scope="units",
        steps=1,
        compared=found.compared,
        replays=found.replays,
        differences=rows,
        unstable=unstable,
        setup=plan.setup,
    )


def _plain_fits(inst: Instance, plan: Plan) -> bool:
    """Is there room for the plain step? The kernel would end the process rather than fail an allocation."""
    needed = plan.baseline.peak_bytes - resident_bytes(inst)
    if inst.device.type == "cuda":
        free = torch.cuda.mem_get_info(inst.device)[0]
        held = torch.cuda.memory_reserved(inst.device) - torch.cuda.memory_allocated(inst.device)
        return needed <= free + held
    available = available_bytes()
    return available is None or needed <= available


def _by_step(inst: Instance, plan: Plan, steps: int, say: Callable[[str], None]) -> Verification:
    say("running plain steps")
    first, _ = _run(inst, None, steps)
    say("running plain steps again")
    second, _ = _run(inst, None, steps)
    say("running planned steps")
    with planned_step(VerifyError, but=out_of_memory):
        planned, handle = _run(inst, plan, steps)
    say("comparing")
    unstable = _differences(first, second)
    names = {d.name for d in unstable}
    differences = [d for d in _differences(first, planned) if d.name not in names]
    replays = sum(u.recomputed for u in handle.report().units) if handle is not None else 0
    gradients = [n for n in first if "gradient of" in n]
    proven = not gradients or any(n not in names for n in gradients)
    return Verification(
        ok=not differences and proven,
        scope="step",
        steps=steps,
        compared=len(first),
        replays=replays,
        differences=differences,
        unstable=unstable,
        setup=plan.setup,
    )


def _run(inst: Instance, plan: Plan | None, steps: int) -> tuple[dict[str, Tensor], Handle | None]:
    """Every tensor a step leaves or makes, copied to host memory."""
    seen: dict[str, Tensor] = {}
    handle = apply_plan(plan, inst.model) if plan is not None else None
    with handle or contextlib.nullcontext(), preserved(inst), _gradients(inst, seen) as label:
        for k in range(steps):
            label["step"] = f"step {k + 1}"
            loss = run_step(inst)
            if loss is not None:
                seen[f"step {k + 1}: loss"] = loss.cpu().clone()
        for name, tensor in [*_state(inst), ("random generator", torch.get_rng_state())]:
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
            hooks: Any = p._post_accumulate_grad_hooks
            others = [(k, h) for k, h in hooks.items() if k != handles[-1].id]
            for key, _ in others:  # ours first: a hook that steps an optimizer takes the gradient away
                del hooks[key]
            hooks.update(others)
    try:
        yield label
    finally:
        for h in handles:
            h.remove()


def _state(inst: Instance) -> list[tuple[str, Tensor]]:
    rows: list[tuple[str, Tensor]] = [(f"parameter {n}", p) for n, p in inst.model.named_parameters()]
    rows += [(f"buffer {n}", b) for n, b in inst.model.named_buffers()]
    names = {id(p): n for n, p in inst.model.named_parameters()}
    for k, optimizer in enumerate(optimizers_of(inst)):
        for i, (p, state) in enumerate(optimizer.state.items()):
            of = names.get(id(p), str(i))
            rows += [(f"optimizer {k} state {n} of {of}", t) for n, t in state.items() if isinstance(t, Tensor)]
    return rows


def _differences(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[Difference]:
    return [Difference(n, d) for n, d in compare(a, b)]
