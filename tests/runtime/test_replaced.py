"""Parameters, buffers, arguments and closed-over tensors that are given other memory, or are other objects, between forward and backward.

What is right is what the plain step gives, bit for bit: autograd has saved either the tensor itself, and sees the other memory, or a
view of it, and sees what was there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import ullage as ul

KEEPS: list[Any] = [None, "matmul_attention", lambda op: True]
ids = pytest.mark.parametrize("keep", KEEPS, ids=["full", "matmul", "all"])


hold: list[Tensor] = []


class _Block(nn.Module):
    """Its backward needs views of parameters (linear), parameters themselves (mul, mm, conv) and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(8, 8), nn.Conv1d(1, 1, 3, padding=1)
        self.scale, self.mix = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8, 8))
        self.frozen = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.register_buffer("average", torch.rand(8) + 0.5)
        self.register_buffer("table", torch.rand(1000, 8) + 0.5)  # too large to be copied
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.linear(x)).tanh() * self.scale @ self.mix
        x = self.conv(x.sin().unsqueeze(1)).squeeze(1) * self.average
        return (F.linear(x, self.frozen) * self.table[:3]).cos() * x


class _Parametrized(nn.Module):
    """With parametrizations, and a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(8, 8))
        self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8)
        self.c.weight = self.b.weight
        self.average = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).tanh()).sin()).cos()  # type: ignore[no-any-return]


def _names(m: nn.Module) -> list[str]:
    return [n for n, p in m.named_parameters() if p.requires_grad]


def _data(m: nn.Module) -> None:
    for p in m.parameters():
        p.data = p.data * 2


def _data_twice(m: nn.Module) -> None:
    """The second time at the address that the first one has freed."""
    for _ in range(4):
        for p in m.parameters():
            p.data = p.data * 1.5


def _transposed(m: nn.Module) -> None:
    for p in m.parameters():
        if p.shape == (8, 8):
            p.data = p.data.t()


def _average(m: nn.Module) -> None:
    """Exponential moving averages take the place of the weights, in one flat buffer."""
    flat = torch.cat([p.detach().flatten() * 0.5 for p in m.parameters()])
    at = 0
    for p in m.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()


def _merged(m: nn.Module) -> None:
    """A low-rank update is merged into the weights."""
    for p in m.parameters():
        if p.dim() == 2:
            p.data = p.data + torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])


def _assigned(m: nn.Module) -> None:
    hold.extend([*m.parameters(), *m.buffers()])
    m.load_state_dict({k: v.clone() + 1 for k, v in m.state_dict().items()}, assign=True)


def _replaced(m: nn.Module) -> None:
    hold.extend(m.parameters())
    for owner in m.modules():
        for name, p in list(owner.named_parameters(recurse=False)):
            setattr(owner, name, nn.Parameter(p.detach() * 3))


def _buffers(m: nn.Module) -> None:
    hold.extend(m.buffers())
    for owner in m.modules():
        for name, b in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, b.clone() if b.dtype == torch.long else b * 3)


def _buffers_data(m: nn.Module) -> None:
    for b in m.buffers():
        if b.is_floating_point():
            b.data = b.data * 3


def _freed(m: nn.Module) -> None:
    """As FSDP: storages are freed, and filled again at another address."""
    for t in [*m.parameters(), *m.buffers()]:
        was, storage = t.detach().clone(), t.untyped_storage()
        size = storage.size()
        storage.resize_(0)
        hold.append(torch.empty(size, dtype=torch.uint8))
        storage.resize_(size)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(t):
            t.copy_(was)


def _removed(m: nn.Module) -> None:
    for owner in m.modules():
        if "bias" in owner._parameters:
            owner.bias = None  # type: ignore[assignment]


def _added(m: nn.Module) -> None:
    for owner in list(m.modules()):
        owner.register_parameter("more", nn.Parameter(torch.ones(3)))
        owner.register_buffer("other", torch.ones(3))


CHANGES = [
    _data,
    _data_twice,
    _transposed,
    _average,
    _merged,
    _assigned,
    _replaced,
    _buffers,
    _buffers_data,
    _freed,
    _removed,
    _added,
]


def _step(
    make: Callable[[], nn.Module], change: Callable[[nn.Module], Any], call: Callable[..., Tensor], before: int
) -> list[Any]:
    torch.manual_seed(0)
    m = make()
    for _ in range(before):
        call(m, torch.randn(3, 8, requires_grad=True)).square().mean().backward()
    m.zero_grad()
    parameters = [p for p in m.parameters() if p.requires_grad]
    x = torch.randn(3, 8, requires_grad=True)
    loss = call(m, x).square().mean()
    change(m)
    found = dict(m.state_dict())
    loss.backward()
    assert [(k, v.data_ptr()) for k, v in m.state_dict().items()] == [(k, v.data_ptr()) for k, v in found.items()]
    torch.manual_seed(1)
    for p in m.parameters():  # what is there now is what the next step reads
        if p.dtype != torch.float32:
            return [x.grad, *[p.grad for p in parameters]]
    return [x.grad, *[p.grad for p in parameters], *found.values(), call(m, torch.randn(3, 8)).detach()]


def _same(found: list[Any], wanted: list[Any]) -> bool:
    return len(found) == len(wanted) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(found, wanted, strict=True)
    )


@ids
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("make", [_Block, _Parametrized])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_replaced_after_the_forward_gives_what_the_plain_step_gives(
    change: Callable[[nn.Module], Any], make: Callable[[], nn.Module], before: int, keep: Any
) -> None:
    hold.clear()
    try:
        wanted = _step(make, change, lambda m, x: m(x), before)
    except RuntimeError as error:  # a kernel of the backward wants the parameter as it was
        with pytest.raises(RuntimeError, match=str(error)):
            _step(make, change, lambda m, x: ul.checkpoint(m, x, keep=keep), before)
        return
    assert _same(_step(make, change, lambda m, x: ul.checkpoint(m, x, keep=keep), before), wanted)


@pytest.mark.parametrize("name", ["frozen", "table"])
def test_what_does_not_require_grad_and_is_gone_is_an_error_with_its_name(name: str) -> None:
    """It is held weakly: written to later, it might hold the graph that holds it."""
    m = _Block()
    out = ul.checkpoint(m, torch.randn(3, 8)).sum()
    setattr(m, name, type(getattr(m, name))(getattr(m, name) + 1))
    with pytest.raises(ul.ReplayError, match=f"^_Block: {name} was changed between forward and backward"):
        out.backward()


def _to_dtype(m: nn.Module) -> None:
    m.to(torch.float64)


@ids
def test_a_module_that_is_converted_after_its_forward(keep: Any) -> None:
    """The plain step has saved views of the weights that were there."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh())

    for before in (0, 2):
        wanted = _step(make, _to_dtype, lambda m, x: m(x), before)
        assert _same(_step(make, _to_dtype, lambda m, x: ul.checkpoint(m, x, keep=keep), before), wanted)


def _sam(m: nn.Module, data: Tensor, call: Callable[..., Tensor], rho: float = 0.05) -> list[Tensor]:
    """Sharpness-aware minimization: the gradient at a point that the first gradient leads to; both losses are open at once."""
    first = call(m, data).square().mean()
    parameters = list(m.parameters())
    grads = torch.autograd.grad(first, parameters, retain_graph=True)
    old = [p.data for p in parameters]
    for p, g in zip(parameters, grads, strict=True):
        p.data = p.data + rho * g / g.norm()
    second = call(m, data).square().mean()
    for p, data_ in zip(parameters, old, strict=True):
        p.data = data_
    return [*torch.autograd.grad(second, parameters), *torch.autograd.grad(first, parameters)]


@ids
def test_sharpness_aware_minimization(keep: Any) -> None:
    torch.manual_seed(0)
    m, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(3, 8)
    wanted = _sam(copy.deepcopy(m), x, lambda m, x: m(x))
    for _ in range(3):
        assert _same(_sam(m, x, lambda m, x: ul.checkpoint(m, x, keep=keep)), wanted)


class _Units(nn.Module):
    """Each block is a unit of its own."""

    def __init__(self, call: Callable[..., Tensor] | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.BatchNorm1d(8)) for _ in range(3)])
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + (block(x) if self.call is None else self.call(block, x))
        return x


def _inner_steps(m: nn.Module, x: Tensor) -> list[Tensor]:
    """Two steps of gradient descent on parameters that the model is called with, and the gradient through both."""
    weights = {k: p * 1.0 for k, p in m.named_parameters()}
    buffers = {k: b.clone() for k, b in m.named_buffers()}
    for _ in range(2):
        loss = torch.func.functional_call(m, (weights, buffers), (x,)).square().mean()
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        weights = {k: w - 0.1 * g for (k, w), g in zip(weights.items(), grads, strict=True)}
    loss = torch.func.functional_call(m, (weights, buffers), (x,)).square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(m.parameters())), *buffers.values()]


@ids
def test_a_model_that_is_called_with_other_parameters(keep: Any) -> None:
    torch.manual_seed(0)
    plain, x = _Units(None), torch.randn(5, 8)
    wanted = _inner_steps(plain, x)
    units = _Units(lambda f, x: ul.checkpoint(f, x, keep=keep))
    units.load_state_dict(plain.state_dict())
    for _ in range(3):
        assert _same(_inner_steps(units, x), wanted)


class _Adapted(nn.Module):
    """Takes a step on its own loss inside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, adapt: bool = True) -> Tensor:
        if not adapt:
            return x + self.b(F.gelu(self.a(x)))
        ps = dict(self.named_parameters())
        grads = torch.autograd.grad(self._with(ps, x).square().mean(), list(ps.values()), create_graph=True)
        return self._with({k: p - 0.1 * g for (k, p), g in zip(ps.items(), grads, strict=True)}, x)

    def _with(self, ps: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(self, ps, (x,), {"adapt": False})  # type: ignore[no-any-return]


@ids
def test_functional_calls_inside_a_unit(keep: Any) -> None:
    def nothing(m: nn.Module) -> None:
        """Nothing changes."""

    wanted = _step(_Adapted, nothing, lambda m, x: m(x), 2)
    assert _same(_step(_Adapted, nothing, lambda m, x: ul.checkpoint(m, x, keep=keep), 2), wanted)


@ids
@pytest.mark.parametrize("leaf", [True, False])
def test_an_argument_and_a_closed_over_tensor_with_other_memory(leaf: bool, keep: Any) -> None:
    def grads(call: Callable[..., Tensor]) -> list[Any]:
        torch.manual_seed(0)
        x, w, c = torch.randn(4, 4, requires_grad=leaf), torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)
        found: list[Any] = []
        for _ in range(3):
            out = call(lambda a, b: (a @ b * c).sin() @ F.linear(b, c) * a, x, w).sum()
            for t in (x, w, c):
                t.data = t.data * 2
            out.backward()
            found += [x.grad, w.grad, x.detach().clone(), w.detach().clone(), c.clone()]
            x.grad = w.grad = None
        return found

    assert _same(grads(lambda f, *args: ul.checkpoint(f, *args, keep=keep)), grads(lambda f, *args: f(*args)))


@ids
def test_swapped_tensors_are_an_error_with_the_name(keep: Any) -> None:
    """The plain step does not allow it: autograd holds the tensor."""
    m, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    for _ in range(2):
        ul.checkpoint(m, x, keep=keep).sum().backward()
    out = ul.checkpoint(m, x, keep=keep).sum()
    torch.utils.swap_tensors(m[0].weight, nn.Parameter(torch.zeros(8, 8)))
    with pytest.raises(ul.ReplayError, match=r"^Sequential: 0\.weight was changed between forward and backward"):
        out.backward()


@ids
def test_a_parametrization_registered_after_the_forward_is_an_error(keep: Any) -> None:
    m, x = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(3, 8, requires_grad=True)
    out = ul.checkpoint(m, x, keep=keep).sum()
    parametrize.register_parametrization(m[0], "weight", nn.Softmax(1))
    with pytest.raises(ul.ReplayError, match="^Sequential"):
        out.backward()
