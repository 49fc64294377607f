"""Programs that broke a plan once: each is exact now, or kept with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ullage as ul


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], depth: int = 3) -> None:
        super().__init__()
        self.inp = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(make() for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.inp(x)
        for b in self.blocks:
            h = b(h)
        return h.square().mean()


class Block(nn.Module):
    """A linear layer and what a subclass does beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x).tanh()


class Gru(Block):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.gru(x)[0])


class OutBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("m", torch.zeros(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            torch.add(self.m, x.mean((0, 1)), out=self.m)
        return super().forward(x + self.m.clone())


class Spectral(Block):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.utils.parametrizations.spectral_norm(self.lin)


class Norm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.norm(x))


def workload(model: nn.Module, **kw: Any) -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(model, torch.randn(2, 4, 8), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **kw)


@pytest.mark.parametrize("block", [Gru, OutBuffer, Spectral, Norm])
@pytest.mark.parametrize("policy", ["every_block", "selective"])
def test_it_is_exact(block: type[Block], policy: str) -> None:
    work = workload(Stack(block))
    plan = ul.plan(work, policy=policy, costs="roofline")
    check = ul.verify(work, plan)
    check.raise_if_failed()
    assert not check.unstable
    assert policy == "selective" or check.replays == 9


def test_a_closure_is_forward_and_backward() -> None:
    model = Stack(Norm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step(m: nn.Module, x: torch.Tensor) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = m(x)
            loss.backward()
            return loss

        optimizer.step(closure)

    work = ul.Workload(model, torch.randn(2, 4, 8), step=step)
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert all(d.buffers for d in plan.decisions if d.action == "recompute")
    ul.verify(work, plan).raise_if_failed()


class WritesRoot(Block):
    def __init__(self, root: list[nn.Module]) -> None:
        super().__init__()
        self.root = root

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.root[0].count.add_(1)
        return super().forward(x)


class Renorm(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.lin.weight.div_(self.lin.weight.norm())
        return super().forward(x)


class Own(Block):
    generator = torch.Generator()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * torch.bernoulli(torch.full_like(x, 0.5), generator=Own.generator))


def assert_kept(work: ul.Workload, reason: str) -> None:
    plan = ul.plan(work, policy="every_block", costs="roofline")
    blocks = [d for d in plan.decisions if d.unit.startswith("blocks")]
    assert {d.action for d in blocks} == {"keep"} and all(reason in d.reason for d in blocks), blocks


def test_what_a_replay_would_do_twice_is_kept() -> None:
    root: list[nn.Module] = []
    model = Stack(lambda: WritesRoot(root))
    model.register_buffer("count", torch.zeros(()))
    root.append(model)
    assert_kept(workload(model), "writes count")
    assert_kept(workload(Stack(Renorm)), "lin.weight")
    assert_kept(workload(Stack(Own)), "torch.Generator")


def assert_planned(work: ul.Workload, blocks: int = 3) -> ul.Plan:
    """Every block is recomputed, predicted to the byte, and exact."""
    plan = ul.plan(work, policy="every_block", costs="roofline")
    assert [d.action for d in plan.decisions if "recompute" in d.action] == ["recompute"] * blocks, plan.decisions
    found = ul.measure(work, plan, steps=1).step_peaks
    assert (plan.predicted.first_step_peak_bytes, plan.predicted.later_step_peak_bytes) == (found[0], found[-1])
    ul.verify(work, plan).raise_if_failed()
    return plan


def test_a_unit_that_changes_its_argument_is_planned() -> None:
    class Writes(Block):
        def forward(self, d: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            d["h"] = self.lin(d["h"]).tanh()
            return d

    class Passes(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            d = {"h": self.inp(x)}
            for b in self.blocks:
                d = b(d)
            return d["h"].square().mean()

    assert_planned(workload(Passes(Writes)))


class Table(Block):
    """Fills a table in its first forward, and counts in all of them."""

    table: torch.Tensor | None = None
    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.linspace(0, 1, x.shape[1])[:, None]
        return super().forward(x * self.table)


class Carried(Block):
    """Goes on from the state that its last forward left."""

    state: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x if self.state is None else x + self.state)
        self.state = out.detach()
        return out


class OldNorm(Block):
    """`weight` is a plain attribute that a hook sets before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 16)
        torch.nn.utils.weight_norm(self.proj)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(self.proj(x))


class Aside(Block):
    """Leaves a loss on itself, which the root adds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = super().forward(x)
        self.aside = out.abs().mean()
        return out


class Added(Stack):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + sum(b.aside for b in self.blocks)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("block", [Table, Carried, OldNorm, Aside])
def test_blocks_with_state_in_attributes_are_planned(block: type[Block]) -> None:
    assert_planned(workload((Added if block is Aside else Stack)(block)))


def test_a_key_value_cache_is_named() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2
    )
    ids = torch.arange(32).view(2, 16)
    model = transformers.LlamaForCausalLM(config).train()
    plan = assert_planned(ul.Workload(model, {"input_ids": ids, "labels": ids}))
    assert any("use_cache = False" in n for n in plan.notes)


def test_a_random_draw_that_steers_is_said_and_always_the_same() -> None:
    class Drops(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.inp(x)
            for b in self.blocks:
                h = b(h) if torch.rand([]) > 0.5 else h
            return h.square().mean()

    work = workload(Drops(Block))
    plans = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        plans.append(ul.plan(work, policy="every_block", costs="roofline"))
    assert plans[0].digest == plans[1].digest
    assert any("random draw steers the step" in n for n in plans[0].notes)


def test_tensors_outside_the_model_count() -> None:
    teacher = nn.Linear(8, 1000).requires_grad_(False)
    model = Stack(Block)

    def loss(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return out + teacher(x).mean()

    with_teacher = ul.Workload(model, torch.randn(2, 4, 8), loss=loss)
    alone = ul.Workload(model, torch.randn(2, 4, 8), loss=lambda out, x: out)
    extra = ul.profile(with_teacher, costs="roofline").start_bytes - ul.profile(alone, costs="roofline").start_bytes
    assert extra == 4 * 1000 * (8 + 1)
    assert ul.measure(with_teacher, steps=1).start_bytes - ul.measure(alone, steps=1).start_bytes == extra


def test_a_scaler_keeps_the_budget() -> None:
    model = Stack(Block)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")

    def step(m: nn.Module, x: torch.Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = m(x)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    work = ul.Workload(model, torch.randn(64, 16, 8), step=step)
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, 1)
    plan = ul.plan(work, caught.value.smallest_bytes)
    assert ul.measure(work, plan, steps=1).peak_bytes <= caught.value.smallest_bytes
    assert sum(d.recomputed_ops for d in plan.decisions) > 0
    ul.verify(work, plan).raise_if_failed()
