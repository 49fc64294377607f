"""FSDP2 (`fully_shard`) inside and around units: one process of gloo, so the swaps of parameters without the sending."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import bits, torchs

dist = pytest.importorskip("torch.distributed")
pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="a torch without torch.distributed"),
    pytest.mark.filterwarnings("ignore"),  # of torch.distributed, on a CPU
]
WAYS: dict[str, Callable[..., Any]] = {
    "torch": torchs,
    "full": ullage.checkpoint,
    "keep": lambda f, *a: ullage.checkpoint(f, *a, keep="matmul_attention"),
    "values": lambda f, *a: ullage.checkpoint(f, *a, determinism_check="values"),
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, inside: Any = None) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.inside = nn.Linear(4, 8), nn.Linear(8, 4), nn.BatchNorm1d(4), inside

    def body(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.norm(x)).sin().exp())

    def forward(self, x: Tensor) -> Tensor:
        return x + (self.inside(self.body, x) if self.inside is not None else self.body(x))


class Net(nn.Module):
    def __init__(self, inside: Any, around: Any) -> None:
        super().__init__()
        self.blocks, self.around = nn.ModuleList([Block(inside) for _ in range(2)]), around

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.around(block, x) if self.around is not None else block(x)
        return x


def _net(mesh: Any, call: Any, order: str, reshard: bool) -> tuple[Net, Callable[[Tensor], Tensor]]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = Net(call if order == "fsdp(unit)" else None, call if order == "unit(fsdp)" else None)
    for block in net.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(net, mesh=mesh)
    return net, (lambda x: call(net, x)) if order == "unit(fsdp of all)" and call is not None else net


@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "stay"])
@pytest.mark.parametrize("order", ["fsdp(unit)", "unit(fsdp)", "unit(fsdp of all)"])
def test_as_the_plain_step(mesh: Any, order: str, reshard: bool) -> None:
    def run(call: Any) -> Any:
        net, forward = _net(mesh, call, order, reshard)
        seen = []
        for n in range(3):
            torch.manual_seed(n)
            forward(torch.randn(4, 4)).square().mean().backward()
            seen.append([bits(p.grad.to_local()) for p in net.parameters()])
            net.zero_grad()
        return seen, [bits(b) for n, b in net.named_buffers()]

    truth = run(None)
    for name, call in WAYS.items():
        before = ullage.runtime.totals.replays
        found = run(call)
        assert found[0] == truth[0], name
        if name != "torch":
            assert found == truth, name  # torch's counts BatchNorm's statistics twice
            assert ullage.runtime.totals.replays > before


def _skipped(mesh: Any, order: str) -> tuple[int, list[str]]:
    """Ops that selective replays skip in three steps, and what is said."""
    before = ullage.runtime.totals.skipped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        net, forward = _net(mesh, WAYS["keep"], order, reshard=True)
        for _ in range(3):
            forward(torch.randn(4, 4)).square().mean().backward()
            net.zero_grad()
    said = [str(w.message) for w in caught if issubclass(w.category, ullage.UllageWarning)]
    return ullage.runtime.totals.skipped - before, said


def test_a_unit_inside_an_fsdp_block_skips_ops_and_one_around_it_says_that_it_does_not(mesh: Any) -> None:
    skipped, said = _skipped(mesh, "fsdp(unit)")
    assert skipped > 0 and said == []
    skipped, said = _skipped(mesh, "unit(fsdp)")
    assert skipped == 0
    assert [s.partition(";")[0] for s in said] == [
        "FSDPBlock: full replay: FSDP gathers its parameters inside it, in a replay not as in forward"
    ] * 2  # once per unit


def test_a_shard_that_changes_before_backward_is_told(mesh: Any) -> None:
    net, forward = _net(mesh, ullage.checkpoint, "unit(fsdp)", reshard=True)
    out = forward(torch.ones(4, 4, requires_grad=True)).sum()
    with torch.no_grad():
        net.blocks[1].a.weight.mul_(2)
    with pytest.raises(ullage.ReplayError, match=r"Block: a\.weight was changed between forward and backward"):
        out.backward()
