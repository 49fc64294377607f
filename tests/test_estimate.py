"""A CUDA device that is not here: the substitutions, each by its bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import ullage as ul
from ullage.capture import Session
from ullage.mechanisms import RECOMPUTE
from ullage.planner.study._executed import StepCapture
from ullage.planner.study._prepare import prepare


class Drops(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(self.lin(x), 0.5, self.training).sum()


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(2, 32, 3, 4, 16).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1).sum()


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.lin(x)).float().sum()


def _ops(model: nn.Module, x: torch.Tensor, **kw: object) -> set[str]:
    ops: set[str] = set()
    work = ul.Workload(model, x, **kw)  # type: ignore[arg-type]
    for as_cuda in (False, True):
        session = Session(work, as_cuda=as_cuda)
        session.run()
        ops |= {f"{'cuda' if as_cuda else 'cpu'}:{session.signatures[i].func}" for i in session.trace.signature}
    return ops


def test_dropout_saves_one_byte_an_element() -> None:
    ops = _ops(Drops(), torch.ones(32, 64))
    assert "cpu:aten.bernoulli_.float" in ops and "cuda:aten.native_dropout.default" in ops
    assert "cuda:aten.bernoulli_.float" not in ops


def test_attention_with_dropout_stays_fused() -> None:
    ops = _ops(Attends(), torch.ones(2, 32, 64))
    fused = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    assert f"cuda:{fused}" in ops and f"cpu:{fused}" not in ops


def test_autocast_runs_norms_in_float32() -> None:
    def norm_dtypes(as_cuda: bool) -> set[torch.dtype]:
        session = Session(ul.Workload(Norms(), torch.ones(32, 64), autocast=torch.bfloat16), as_cuda=as_cuda)
        session.run()
        norm = torch.ops.aten.native_layer_norm.default
        return {
            session.signatures[i].args[0].dtype for i in session.trace.signature if session.signatures[i].func is norm
        }

    assert norm_dtypes(False) == {torch.bfloat16} and norm_dtypes(True) == {torch.float32}


def test_optimizers_are_foreach_by_default() -> None:
    ops = _ops(Drops(), torch.ones(32, 64), optimizer=lambda params: torch.optim.AdamW(params))
    assert any(o.startswith("cuda:aten._foreach_") for o in ops) and not any(
        o.startswith("cpu:aten._foreach_") for o in ops
    )


def test_optimizers_are_foreach_after_replays_too() -> None:
    """A unit's replay is substituted inside a step that is; what the optimizer asks after it is the step's own."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(3)))
    work = ul.Workload(model, torch.ones(8, 64), loss=lambda out, x: out.sum(), optimizer=torch.optim.AdamW)
    s = prepare(work, device="h200")
    recomputed = s.capture_fresh({u.fqn: RECOMPUTE for u in s.units})
    for plain, planned in zip(s.plain, recomputed, strict=True):
        assert _updates(planned) == _updates(plain) != []


def _updates(step: StepCapture) -> list[str]:
    trace, ops = step.session.trace, range(step.ops.start, step.ops.stop)
    return [str(step.session.signatures[trace.signature[i]].func) for i in ops if trace.phase[i] == "optimizer"]


def test_an_estimate_is_labelled_and_its_blocks_can_be_replayed() -> None:
    model = nn.Sequential(
        nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.GELU()) for _ in range(6)))
    )
    work = ul.Workload(model, torch.ones(4096, 64), loss=lambda out, x: out.sum(), autocast=torch.bfloat16)
    plan = ul.plan(work, policy="every_block", device="h200")
    assert plan.estimate and plan.costs == "roofline" and "ESTIMATE" in str(plan)
    assert any("estimate for NVIDIA H200" in n for n in plan.notes)
    assert [d.action for d in plan.decisions] == ["recompute"] * 6
    assert plan.predicted.peak_bytes < plan.baseline.peak_bytes
