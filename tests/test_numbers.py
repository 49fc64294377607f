"""Numbers that autograd makes tensors of and saves, and memory of replays beside ops: predicted to the byte."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from ullage.measure._measure import _peaks
from ullage.measure._state import preserved

Form = Callable[[nn.Module, Tensor], Tensor]


def _gelu_new(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))


def _half_in_place(h: Tensor) -> Tensor:
    h[:, :4].mul_(0.5)  # the product's node is inside that of the whole tensor
    return h.tanh()


FORMS: dict[str, Form] = {
    "mul": lambda f, x: x + f(x) * 0.125,
    "at the start": lambda f, x: x + f((x * 0.5).tanh()),
    "at the end": lambda f, x: (x + f(x).tanh()) * 0.7,
    "div": lambda f, x: x + (f(x) / 3).tanh(),
    "number first": lambda f, x: x + torch.mul(0.5, f(x)).tanh() + 2.0 / (f(x).exp() + 1),
    "rounded": lambda f, x: x + torch.div(f(x), 2, rounding_mode="trunc") + f(x).tanh(),
    "alpha": lambda f, x: torch.sub(torch.add(x, f(x).tanh(), alpha=0.3), x, alpha=0.1),
    "sub and rsub": lambda f, x: x + (1.0 - f(x)).tanh() * (x - 2.0),
    "pow": lambda f, x: x + f(x) ** 2 * 0.5 + 2.0 ** f(x).tanh(),
    "gelu_new": lambda f, x: x + f(_gelu_new(f(x))),
    "several": lambda f, x: x * 0.9 + ((f(x * 0.5) * 0.25 / 3 + 1) * 2.0).tanh() * 0.1 + 0.5,
    "in place": lambda f, x: x + f(x).mul_(0.5).tanh_() * 3,
    "in place on a view": lambda f, x: x + _half_in_place(f(x)),
    "bool": lambda f, x: x + (f(x) * True).tanh(),
    "where": lambda f, x: x + torch.where(x > 0, f(x), 0.0).clamp(-1, 1) * 2,
    "weights": lambda f, x: x + nn.functional.linear(x, f.weight * 0.5, f.bias / 2),  # type: ignore[operator]
}


class Unit(nn.Module):
    def __init__(self, form: Form, inner: bool = False) -> None:
        super().__init__()
        self.f, self.form = nn.Linear(16, 16), form
        self.inner = Unit(form) if inner else None

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is not None:
            x = self.inner(x) / 4
        return self.form(self.f, x)


def steps_of(work: ul.Workload, plan: ul.Plan | None) -> list[int]:
    inst = work.instance()
    with plan.apply(inst.model) if plan is not None else contextlib.nullcontext(), preserved(inst) as found:
        return _peaks(inst, found)[1]


def check(*forms: Form, nested: bool = False, autocast: torch.dtype | None = None) -> None:
    """Plain, in full, selectively, and at the smallest budget, where units are recomputed together."""
    torch.manual_seed(0)
    # a class of its own for each: units of one class share what is learnt of their ops
    kinds = [type(f"Unit{k}", (Unit,), {}) for k in range(len(forms))]
    model = nn.Sequential(*(kind(form, nested) for kind, form in zip(kinds, forms, strict=True)), nn.Linear(16, 4))
    work = ul.Workload(model, torch.randn(24, 16), loss=_loss, optimizer=torch.optim.SGD, autocast=autocast)
    profile = ul.profile(work, costs="roofline")
    with pytest.raises(ul.BudgetInfeasible) as caught:
        ul.plan(work, 1, profile=profile)
    plans = [ul.plan(work, policy=name, profile=profile) for name in ("every_block", "selective")]
    for plan in (None, *plans, ul.plan(work, caught.value.smallest_bytes, profile=profile)):
        said = profile if plan is None else plan.predicted
        measured = steps_of(work, plan)
        assert [said.first_step_peak_bytes, said.later_step_peak_bytes] == [measured[0], measured[2]], plan


def _loss(out: Tensor, _: Tensor) -> Tensor:
    return out.float().square().mean() * 0.5


def test_saved_numbers_are_predicted_to_the_byte() -> None:
    check(FORMS["gelu_new"], FORMS["in place on a view"])


@pytest.mark.slow
def test_saved_numbers_under_autocast() -> None:
    """Alone shows numbers that are saved under autocast."""
    check(FORMS["several"], FORMS["gelu_new"], autocast=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(FORMS), 3))
def test_saved_numbers_of_every_form(first: int) -> None:
    """Alone shows all the forms; the faster one shows two."""
    check(*list(FORMS.values())[first : first + 3], nested=first == 0)


def _scaled_in_place(x: Tensor) -> Tensor:
    x[:1].mul_(0.5)
    x[1:].div_(3)
    return x


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("scaled", [lambda x: x * 0.99, _scaled_in_place])
def test_numbers_of_a_graph_that_is_kept_are_held_until_it_goes(
    scaled: Callable[[Tensor], Tensor], again: bool
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(8):  # numbers are most of what is held
                x = scaled(x + self.w)
            return x.sum()

    def step(model: nn.Module, x: Tensor) -> None:
        loss = model(x)
        loss.backward(retain_graph=True)
        if again:
            loss.backward()
        torch.ones(300)  # the peak, with what is still held then
        model.zero_grad()

    for costs in ("auto", "roofline"):
        work = ul.Workload(Model(), torch.ones(2), step=step)
        assert ul.profile(work, costs=costs).peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_a_scaler_of_gradients_is_predicted_and_measured_to_the_byte() -> None:
    model = nn.Sequential(*(Unit(FORMS["mul"]) for _ in range(3)))
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")

    def step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    work = ul.Workload(model, torch.randn(24, 16), step=step)
    profile = ul.profile(work)
    assert ul.measure(work, steps=1).step_peaks == [profile.first_step_peak_bytes] + [profile.later_step_peak_bytes] * 2
    plan = ul.plan(work, policy="every_block", profile=profile)
    assert max(steps_of(work, plan)) == plan.predicted.peak_bytes
    assert ul.plan(work, profile.peak_bytes, profile=profile).counts() == {"keep": len(plan.decisions)}


def test_memory_that_a_step_swaps_is_measured_as_the_plain_loop_has_it() -> None:
    """As sharpness-aware training does: `p.data = old` frees what the parameter had."""
    model = nn.Sequential(*(Unit(FORMS["alpha"]) for _ in range(2)))
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    old: dict[nn.Parameter, Tensor] = {}

    def step(model: nn.Module, x: Tensor) -> None:
        model(x).square().mean().backward()
        for p in model.parameters():
            old[p] = p.data.clone()
            p.data.add_(p.grad, alpha=0.05)  # type: ignore[arg-type]
            p.data = old[p]
        model.zero_grad()

    work = ul.Workload(model, torch.randn(24, 16), step=step)
    assert ul.profile(work).peak_bytes == ul.measure(work, steps=1).peak_bytes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][1])
    assert not old


def test_memory_that_is_swapped_and_shared_comes_back_shared() -> None:
    one, two = nn.Parameter(torch.arange(4.0)), nn.Parameter(torch.zeros(2))
    two.data = one.data[2:]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

    def step(model: nn.Module, x: Tensor) -> None:
        one.data, two.data = torch.ones(4), torch.ones(2)

    ul.measure(ul.Workload(Both(), torch.ones(1), step=step), steps=1)
    assert one.tolist() == [0, 1, 2, 3] and two.tolist() == [2, 3]
    assert two.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.to("cpu").double().float()])
def test_factories_may_convert_what_they_make(convert: Callable[[nn.Module], nn.Module]) -> None:
    def make() -> ul.Workload:
        net = convert(nn.Sequential(*(nn.Linear(8, 8) for _ in range(3))))
        batch = torch.ones(4, 8, dtype=next(net.parameters()).dtype)
        return ul.Workload(net, batch, loss=_loss, optimizer=torch.optim.SGD)

    work = ul.Workload.from_factory(make)
    assert ul.profile(work).peak_bytes == ul.measure(work, steps=1).peak_bytes


@pytest.mark.parametrize(
    "kept", ["div.Tensor[0]", "mul.Tensor[0]", "div.Tensor[0]+mul.Tensor[0]", "sin[0]", "add.Tensor[0]"]
)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_numbers_of_ops_that_a_replay_skips(kept: str, phase: str) -> None:
    """What stands for a skipped op's output gets a node as the op's own would, and that saves the number."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(16, 16), nn.Linear(16, 64 if phase == "backward" else 16)

        def forward(self, x: Tensor) -> Tensor:
            h = (self.f(x) / 3).sin() * 0.5
            return self.g(torch.add(h.cos(), 1.5).square()).sin().sum(-1, keepdim=True) * x

    torch.manual_seed(0)
    work = ul.Workload(nn.Sequential(Block(), Block()), torch.randn(24, 16), loss=_loss, optimizer=torch.optim.SGD)
    plan = ul.plan(work, policy="every_block", pin={"0": f"select:{kept}", "1": f"select:{kept}"}, costs="roofline")
    assert plan.predicted.peak_bytes == max(steps_of(work, plan))


@pytest.mark.parametrize("option", ["recompute", "select:sin[0]"])
@pytest.mark.parametrize("width", [16, 96])
def test_what_is_compared_with_a_replay_is_not_copied_for_it(option: str, width: int) -> None:
    """A transposed weight, and part of a tensor, are among what a first step's units drop: at its peak no byte is ours."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g = nn.Linear(width, 2 * width), nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.g(self.f(x)[:, ::2].sin().cos().square()).sin() * x

    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block())
    work = ul.Workload(model, torch.randn(24, width), loss=_loss, optimizer=torch.optim.SGD)
    plan = ul.plan(work, policy="every_block", pin={"0": option, "1": option}, costs="roofline")
    assert plan.predicted.first_step_peak_bytes == steps_of(work, plan)[0]
