"""Forwards that give parameters other memory, which no version and no dispatch mode shows: kept, and no tensor loses its memory."""

from __future__ import annotations

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ullage as ul
from ullage.runtime.tensors._memory import Memory

aten = torch.ops.aten
KEEPS = [None, "matmul_attention", {aten.mul.Tensor}, lambda op: True]


class _Clamped(nn.Module):
    """Clamps its parameter, from batches of `rows` on."""

    def __init__(self, how: str, rows: int = 0) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0))
        self.how, self.rows = how, rows

    def forward(self, x: Tensor) -> Tensor:
        if len(x) >= self.rows and self.how == "data":
            self.scale.data = self.scale.data.clamp(0.5, 0.9) * 0.99
        elif len(x) >= self.rows:
            with torch.no_grad():
                self.scale.set_((self.scale.detach().clamp(0.5, 0.9) * 0.99).detach())
        return x + (self.linear(x) * self.scale).tanh()


def _steps(how: str, rows: int, sizes: list[int], keep: Any, checkpointed: bool) -> list[Tensor]:
    torch.manual_seed(0)
    block, found = _Clamped(how, rows), []
    for size in sizes:
        x = torch.randn(size, 8)
        out = ul.checkpoint(block, x, keep=keep) if checkpointed else block(x)
        out.square().mean().backward()
        found += [p.grad.clone() for p in block.parameters() if p.grad is not None] + [block.scale.detach().clone()]
        block.zero_grad()
    return found


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: getattr(k, "__name__", str(k)))
@pytest.mark.parametrize("how", ["data", "set_"])
def test_a_parameter_that_is_given_other_memory_is_that_of_the_plain_step(how: str, keep: Any) -> None:
    plain = _steps(how, 0, [4, 4, 4], keep, False)
    with pytest.warns(ul.UllageWarning, match=r"scale.*; its activations are kept"):
        found = _steps(how, 0, [4, 4, 4], keep, True)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


@pytest.mark.parametrize("keep", KEEPS[1:], ids=lambda k: getattr(k, "__name__", str(k)))
def test_also_where_only_a_later_signature_does_it(keep: Any) -> None:
    plain = _steps("data", 5, [4, 4, 6, 6], keep, False)
    with pytest.warns(ul.UllageWarning, match=r"gives scale other memory.*; its activations are kept"):
        found = _steps("data", 5, [4, 4, 6, 6], keep, True)
    assert len(found) == len(plain) and all(map(torch.equal, found, plain))


def test_a_tensor_without_memory_gets_back_what_it_had() -> None:
    from ullage.runtime.replay._skip import Placeholder

    p, whole = nn.Parameter(torch.rand(2, 3).t()), nn.Parameter(torch.ones(3))
    was, memory = p.detach().clone(), Memory([whole, p])
    p.data = Placeholder(((3, 2), (1, 3), torch.float32, torch.device("cpu")), 0)
    assert memory.moved([whole, p]) == [1]
    memory.put_back(1, p)
    assert torch.equal(p, was) and memory.holds([whole, p])


class _Later(nn.Module):
    """Does something to its parameter, or to a tensor of a plain object, from its third call on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.scale, self.how, self.calls = nn.Linear(8, 8), nn.Parameter(torch.full((8,), 2.0)), how, 0
        self.holder = [torch.full((8,), 2.0)]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        scale = self.scale if self.how != "closed" else self.holder[0]
        y = scale.detach() * 0.9  # in every call, so that the op log is the same
        if self.calls > 2 and self.how in ("data", "closed"):
            scale.data = y
        elif self.calls > 2:
            with torch.no_grad():
                scale.copy_(scale * 0.9)
        return x + (self.linear(x) * scale).tanh()


@pytest.mark.parametrize("keep", KEEPS, ids=lambda k: getattr(k, "__name__", str(k)))
@pytest.mark.filterwarnings("ignore::ullage.UllageWarning")  # of stale logs
@pytest.mark.parametrize("how", ["data", "closed", "copy_"])
def test_a_replay_that_does_to_a_parameter_what_no_call_had_done_is_an_error_once(how: str, keep: Any) -> None:
    torch.manual_seed(0)
    block, errors = _Later(how), 0
    for step in range(6):
        x = torch.randn(4, 8)
        plain = copy.deepcopy(block)
        want = plain(x).square().mean()
        want.backward()
        loss = ul.checkpoint(block, x, keep=keep).square().mean()
        try:
            loss.backward()
        except ul.ReplayError as error:
            errors += 1
            assert step == 2 and re.search("scale|holder", str(error))
        else:
            assert all(
                map(
                    torch.equal,
                    [p.grad for p in block.linear.parameters()],
                    [p.grad for p in plain.linear.parameters()],
                )
            )
        if how != "copy_":
            assert torch.equal(block.scale, plain.scale) and torch.equal(block.holder[0], plain.holder[0])
        block.zero_grad()
    assert errors == (how != "closed")  # where a closed-over tensor was is known from before the call


class _Codebook(nn.Module):
    """A moving average that is a parameter, and written through `.data`, as vector-quantized autoencoders have it."""

    def __init__(self, writes: str) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.linspace(-1, 1, 4), requires_grad=writes != "frozen")
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin().exp()
        if self.writes == "out":
            torch.mul(self.codes.data, 0.5, out=self.codes.data)
        elif self.writes == "view":
            self.codes.data[1:].mul_(0.5)
        elif self.writes != "nothing":
            self.codes.data.mul_(0.5).add_(0.01)
        return x * self.codes


@pytest.mark.parametrize("keep", [None, "sin[0]"])
@pytest.mark.parametrize("writes", ["data", "view", "frozen", "out", "nothing"])
def test_a_parameter_that_a_forward_writes_where_no_version_tells(writes: str, keep: Any) -> None:
    """A replay would write it a second time: the unit is kept, and says why."""
    found = []
    for checkpointed in (False, True):
        model = _Codebook(writes)
        for step in range(3):
            x = torch.linspace(0, 1, 8).add(step).reshape(2, 4).requires_grad_()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                y = ul.checkpoint(model, x, keep=keep) if checkpointed else model(x)
            if checkpointed and step == 0:
                said = [str(w.message) for w in warned if issubclass(w.category, ul.UllageWarning)]
                kept = "its forward writes codes through `.data` or another alias, which a replay would write again"
                assert [kept in s for s in said] == ([True] if writes != "nothing" else [])
            y.square().sum().backward()
            found += [x.grad, model.codes.detach().clone()]
    assert all(torch.equal(a, b) for a, b in zip(found[:6], found[6:], strict=True))


class _Mask(nn.Module):
    """Writes to a tensor of its own that autograd has saved, or will save."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x.sin())
        mask = x.detach().clone()
        if self.how == "before":
            mask.data.mul_(0.5)
        y = x * mask
        if self.how == "after":
            mask.data.mul_(0.5)
        elif self.how == "view":
            mask.data[1:].t().add_(0.5)
        elif self.how == "out":
            torch.mul(mask, 0.5, out=mask.data)
        elif self.how == "foreach":
            torch._foreach_mul_([mask.data], 0.5)
        elif self.how == "output":
            y = y.exp()
            y.data.mul_(0.5)
        return F.batch_norm(F.rrelu(y, training=True), torch.zeros(4), torch.ones(4), training=True)


@pytest.mark.parametrize("keep", [None, "sin[0]"])
@pytest.mark.parametrize("how", ["before", "after", "view", "out", "foreach", "output"])
def test_a_saved_tensor_that_a_forward_writes_where_no_version_tells(how: str, keep: Any) -> None:
    """The plain step's backward reads what was written. A replay that stops at the save would not write it: the unit is kept."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = _Mask(how)
        for step in range(3):
            x = torch.linspace(0, 1, 8).add(step).reshape(2, 4).requires_grad_()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                y = ul.checkpoint(model, x, keep=keep) if checkpointed else model(x)
            said = [str(w.message) for w in warned if issubclass(w.category, ul.UllageWarning)]
            if checkpointed and step == 0:
                assert ["through `.data` or another alias, which a replay that ends before" in s for s in said] == (
                    [True] if how != "before" else []
                )
            (y * (2 + torch.arange(4))).sum().backward()
            found += [x.grad, model.linear.weight.grad]
    assert all(torch.equal(a, b) for a, b in zip(found[:6], found[6:], strict=True))


class _Gates(nn.Module):
    """Chunks of one storage, each with a version of its own, written in place in turn: as torch's GRU has its gates."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.linear, self.again = nn.Linear(4, 12), again

    def forward(self, x: Tensor) -> Tensor:
        gates = torch.unsafe_chunk(self.linear(x.sin()), 3, 1)
        a, b, c = (g.sigmoid_() for g in gates)
        if self.again:
            a.data[:, 1:2].mul_(0.5)
        return a * b + c.exp()


@pytest.mark.parametrize("again", [False, True])
def test_chunks_of_one_storage_are_written_by_themselves(again: bool) -> None:
    """A write to one chunk is none to another that autograd has saved; one to the same chunk is."""
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model, said = _Gates(again), list[str]()
        for step in range(3):
            x = torch.linspace(0, 1, 8).add(step).reshape(2, 4).requires_grad_()
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                y = ul.checkpoint(model, x, keep="sin[0]") if checkpointed else model(x)
            said += [str(w.message) for w in warned if issubclass(w.category, ul.UllageWarning)]
            (y * (2 + torch.arange(4))).sum().backward()
            found.append(x.grad)
        assert ["through `.data` or another alias" in s for s in said] == ([True] if again and checkpointed else [])
    assert all(torch.equal(a, b) for a, b in zip(found[:3], found[3:], strict=True))
