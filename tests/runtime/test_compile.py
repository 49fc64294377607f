"""Under `torch.compile` ullage.checkpoint is torch's own, with the same policy: no graph break, the same gradients."""

from __future__ import annotations

import copy
import functools
import pkgutil
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import ullage
from tests.runtime.steps import aten, bits, gradients, inputs, plain

XW = ((4, 4), (4, 4))
pytestmark = pytest.mark.skipif(
    not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run on this Python"
)


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _f(x: Tensor, w: Tensor) -> Tensor:
    return ((x @ w).sin().exp() @ w).cos()


KEEPS: dict[str, Any] = {
    "nothing": None,
    "matmul_attention": "matmul_attention",
    "half_matmul_attention": "half_matmul_attention",
    "attention": "attention",
    "ops": [aten.mm.default, aten.exp.default],
    "callable": lambda op: op is aten.mm.default,
}


def _compiled(fn: Any, backend: Any = "aot_eager") -> Any:
    return torch.compile(fn, fullgraph=True, backend=backend)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_function(keep: str) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        return ullage.checkpoint(_f, x.sin(), w, keep=KEEPS[keep]) * 2

    truth = gradients(lambda x, w: _f(x.sin(), w) * 2, inputs(*XW), plain, 2)
    assert gradients(f, inputs(*XW), plain, 2) == truth
    assert gradients(_compiled(f), inputs(*XW), plain, 2) == truth


class Net(nn.Module):
    def __init__(self, keep: Any) -> None:
        super().__init__()
        self.keep = keep
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + ullage.checkpoint(block, x, keep=self.keep)
        return x


@pytest.mark.parametrize("keep", ["nothing", "matmul_attention", "ops"])
def test_a_module(keep: str) -> None:
    torch.manual_seed(0)
    net = Net(KEEPS[keep])
    x = torch.randn(3, 4)
    seen = []
    for call in (net, _compiled(net)):
        net.zero_grad()
        out = call(x)
        out.square().sum().backward()
        seen.append((bits(out), [bits(p.grad) for p in net.parameters()]))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(("keep", "sins"), [(None, 2), ([aten.sin.default], 1)])
def test_what_is_kept_is_not_done_again(keep: Any, sins: int) -> None:
    """Counted in the graphs that AOTAutograd makes: the policy reaches its partitioner."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    counts: list[int] = []

    def count(graph: Any, example: Any) -> Any:
        counts.append(sum(n.target is aten.sin.default for n in graph.graph.nodes))
        return graph

    from functorch.compile import make_boxed_func

    backend = aot_autograd(
        fw_compiler=lambda g, e: make_boxed_func(count(g, e)),
        bw_compiler=lambda g, e: make_boxed_func(count(g, e)),
        partition_fn=min_cut_rematerialization_partition,
    )

    def f(x: Tensor, w: Tensor) -> Tensor:
        return ullage.checkpoint(lambda x, w: torch.sin(x @ w) @ w, x, w, keep=keep)

    x, w = inputs(*XW)
    _compiled(f, backend)(x, w).sum().backward()
    assert sum(counts) == sins


def test_a_decorated_function() -> None:
    decorated = ullage.checkpoint(keep="matmul_attention")(_f)
    truth = gradients(_f, inputs(*XW), plain)
    assert gradients(_compiled(lambda x, w: decorated(x, w)), inputs(*XW), plain) == truth


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_a_compiled_block_inside(keep: Any) -> None:
    """Eager outside, compiled inside: full replay, whatever `keep` says; what it saves is the compiler's choice."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    seen = []
    compiled = torch.compile(net, backend="aot_eager")
    for call in (net, functools.partial(ullage.checkpoint, compiled, keep=keep)):
        for _ in range(3):
            net.zero_grad()
            call(x).square().sum().backward()
        seen.append([bits(p.grad) for p in net.parameters()])
    assert seen[0] == seen[1]


@pytest.mark.filterwarnings("ignore:Detected that context_fn is passed")
@pytest.mark.parametrize("policy", ["every_block", "selective"])
def test_a_planned_model_is_one_graph(policy: str) -> None:
    """Statistics and dropout in the blocks; plan and compile keep gradients and buffers."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(nn.functional.dropout(torch.relu(self.norm(self.a(x))), 0.2))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x.square().mean()

    torch.manual_seed(0)
    net, x = Net(), torch.randn(16, 8)
    plan = ullage.plan(ullage.Workload(net, x), policy=policy, costs="roofline")
    seen = []
    for planned in (False, True):
        model = copy.deepcopy(net)
        if planned:
            plan.apply(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            torch.manual_seed(1)
            compiled(x).backward()
        seen.append([bits(p.grad) for p in model.parameters()] + [bits(b) for b in model.buffers()])
    assert seen[0] == seen[1]


def test_dynamo_keeps_off_all_of_the_runtime() -> None:
    """But for what dispatches to torch under compile, and rules, which a compiled step asks too."""
    package = ullage.runtime
    names = {m.name for m in pkgutil.walk_packages(package.__path__, "ullage.runtime.") if not m.ispkg}
    marked = {m.__name__ for m in package._EAGER}
    assert names - marked == {f"ullage.runtime.{n}" for n in ("forward._checkpoint", "ambient._eager", "ops._keep")}
