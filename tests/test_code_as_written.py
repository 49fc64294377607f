"""Code as people write it: decorators, trackers, files, generators, factories that load. Planned, predicted to the byte, exact."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2)])


net = model()
opt = torch.optim.AdamW(net.parameters(), lr=1e-3)
X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def square(out: Tensor, batch: Any) -> Tensor:
    return out.float().square().mean()


def assert_planned(work: ul.Workload) -> ul.Plan:
    """Predicted to the byte, plain and planned, and exact."""
    profile = ul.profile(work, costs="roofline")
    plan = ul.plan(work, policy="every_block", profile=profile)
    for source, using in ((profile, None), (plan.predicted, plan)):
        found = ul.measure(work, using, steps=1).step_peaks
        assert (source.first_step_peak_bytes, source.later_step_peak_bytes) == (found[0], found[-1])
    assert sum(d.action == "recompute" for d in plan.decisions) == 2
    ul.verify(work, plan, steps=1).raise_if_failed()
    return plan


def plain(model: nn.Module, batch: Tensor) -> None:
    model(batch).square().mean().backward()
    opt.step()
    opt.zero_grad()


def counted(fn: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(fn)
    def wrapped(*args: Any) -> None:
        fn(*args)

    return wrapped


@contextmanager
def stepping() -> Iterator[None]:
    opt.zero_grad()
    yield
    opt.step()


def in_a_context(model: nn.Module, batch: Tensor) -> None:
    with stepping():
        model(batch).square().mean().backward()


class Tracker:
    """Its running iterator refuses to be copied."""

    def __init__(self) -> None:
        self.lock, self.running = threading.Lock(), (x for x in range(3))
        self.last = 0.0

    def add(self, value: float) -> None:
        with self.lock:
            self.last = value


def tracked() -> ul.Workload:
    own, rates = Tracker(), torch.optim.SGD(net.parameters(), lr=0.1)

    def step(model: nn.Module, batch: Tensor) -> None:
        model(batch).square().mean().backward()
        rates.step()
        rates.zero_grad()
        own.add(rates.param_groups[0]["lr"])

    return ul.Workload(net, X, step=step)


STEPS: dict[str, Callable[[], ul.Workload]] = {
    "a decorator of one's own": lambda: ul.Workload(net, X, step=counted(plain)),
    "a decorator of torch": lambda: ul.Workload(net, X, step=torch.enable_grad()(plain)),
    "a context manager with the optimizer": lambda: ul.Workload(net, X, step=in_a_context),
    "a tracker": tracked,
}


@pytest.mark.parametrize("name", STEPS)
def test_steps(name: str) -> None:
    assert_planned(STEPS[name]())


def test_what_a_model_is_reached_through_and_cannot_be_copied_is_named() -> None:
    class Handle:
        def __init__(self, model: nn.Module) -> None:
            self.model = model

        def __reduce_ex__(self, protocol: Any) -> Any:
            raise TypeError("a handle is one of a kind")

    handle = Handle(net)

    def step(_: nn.Module, batch: Tensor) -> None:
        handle.model(batch).square().mean().backward()

    with pytest.raises(
        ul.WorkloadError,
        match=r"Handle can't be copied .*one of a kind.* reaches a Sequential through it; .*from_factory",
    ):
        ul.profile(ul.Workload(net, X, step=step), costs="roofline")


def _casts(model: nn.Module) -> nn.Module:
    return model.bfloat16().to("cpu")


def _loads(path: Path) -> Callable[[nn.Module], nn.Module]:
    def load(model: nn.Module) -> nn.Module:
        model.load_state_dict(torch.load(path, map_location="cpu"))
        return model

    return load


@pytest.mark.parametrize("kind", ["casts", "loads"])
def test_factories(kind: str, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pt")
    change = {
        "casts": _casts,
        "loads": _loads(tmp_path / "w.pt"),
    }[kind]

    def make() -> ul.Workload:
        changed = change(model())
        batch = X.bfloat16() if kind == "casts" else X
        return ul.Workload(changed, batch, loss=square, optimizer=torch.optim.AdamW(changed.parameters()))

    assert_planned(ul.Workload.from_factory(make))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_captured_without_the_compiler(in_place: bool) -> None:
    """No setting of the compiler is changed for that: other threads may be compiling."""

    def make() -> ul.Workload:
        made, compiled = model(), model()
        compiled.compile(backend="eager") if in_place else None
        return ul.Workload(compiled if in_place else torch.compile(made, backend="eager"), X, loss=loss)

    def loss(out: Tensor, batch: Tensor) -> Tensor:
        assert torch._dynamo.eval_frame._stance.stance == "default"
        return square(out, batch)

    profile = ul.profile(ul.Workload.from_factory(make), costs="roofline")
    assert profile.peak_bytes == ul.profile(ul.Workload(model(), X, loss=square), costs="roofline").peak_bytes
    assert any("no peak is promised under torch.compile" in n for n in profile.notes)


def test_a_reference_copied_in_a_factory() -> None:
    def make() -> ul.Workload:
        trained = model()
        reference = copy.deepcopy(trained).requires_grad_(False)
        return ul.Workload(trained, X, loss=lambda out, b: (out - reference(b) - 1).square().mean())

    assert_planned(ul.Workload.from_factory(make))


def test_weights_that_a_library_reads_past_torch() -> None:
    """As safetensors does: real parameters in a model that is built on fake tensors."""
    weights = [p.detach().clone() for p in net.parameters()]

    def make() -> ul.Workload:
        loaded = model()
        for (name, _), real in zip(list(loaded.named_parameters()), weights, strict=True):
            owner, _, leaf = name.rpartition(".")
            setattr(loaded.get_submodule(owner), leaf, nn.Parameter(real))
        return ul.Workload(loaded, X, loss=square, optimizer=torch.optim.AdamW(loaded.parameters()))

    assert_planned(ul.Workload.from_factory(make))
    assert all(p.grad is None for p in weights)


SHARED, UNUSED = torch.Generator(), torch.Generator()


class Masked(nn.Module):
    """Draws twice, from a generator of its own, of the module's globals or torch's; what it could draw from is read at every call."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.up, self.down, self.source, self.own = nn.Linear(64, 64), nn.Linear(64, 64), source, None
        if source == "own":
            self.own = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        generator = {"own": self.own, "shared": SHARED, "unused": None, "default": torch.default_generator}[self.source]
        if generator is UNUSED:
            raise AssertionError
        noise = torch.rand(x.shape, generator=generator)
        mask = torch.bernoulli(torch.full_like(x, 0.5), generator=generator)
        return self.down((self.up(x) * noise).relu() * mask) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("source", ["own", "shared", "unused", "default"])
def test_units_that_draw_from_generators_are_planned(source: str) -> None:
    """Their states, 5,056 bytes each, are kept per call, and counted."""
    torch.manual_seed(0)
    work = ul.Workload(
        nn.Sequential(*(Masked(source) for _ in range(3))),
        torch.randn(32, 64),
        loss=square,
        optimizer=lambda p: torch.optim.Adam(p),
    )
    before = [g.get_state() for g in (SHARED, UNUSED)]
    for policy in ("every_block", "selective"):
        plan = ul.plan(work, policy=policy, costs="roofline")
        assert "keep" not in {d.action for d in plan.decisions}
        assert ul.verify(work, plan).ok
        assert ul.measure(work, plan, steps=1).peak_bytes == plan.predicted.peak_bytes
    assert all(torch.equal(g.get_state(), b) for g, b in zip((SHARED, UNUSED), before, strict=True))


def test_a_generator_of_ones_own_is_copied() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.generator = nn.Linear(8, 8), torch.Generator().manual_seed(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x + torch.empty(x.shape).normal_(generator=self.generator))

    noisy = Noisy()
    before = noisy.generator.get_state()
    work = ul.Workload(noisy, X, loss=square)
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes
    assert torch.equal(noisy.generator.get_state(), before)


class Constants:
    weights = torch.ones(4)

    def __init__(self) -> None:
        self.model = nn.Linear(8, 4)

    def step(self, model: nn.Module, x: Tensor) -> None:
        F.cross_entropy(self.model(x), torch.zeros(32, dtype=torch.int64), weight=self.weights).backward()


def test_a_class_attribute_is_counted_where_it_is_measured_too() -> None:
    run = Constants()
    work = ul.Workload(run.model, X, step=run.step)
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


TEACHER = nn.Linear(8, 8).requires_grad_(False)


class Holder:
    """Of a class that the step reads by name."""

    teacher = TEACHER


def test_a_tensor_that_is_reached_by_its_name_and_another_way_is_counted_once() -> None:
    """The global is copied with the step; through the class the step reaches the real one."""
    model = nn.Linear(8, 8)

    def step(model: nn.Module, x: Tensor) -> None:
        (model(x) - TEACHER(x).detach() - Holder.teacher(x).detach()).square().sum().backward()

    work = ul.Workload(model, X, step=step)
    assert ul.profile(work, costs="roofline").peak_bytes == ul.measure(work, steps=1).peak_bytes


def test_the_update_of_a_step_that_has_a_graph_then_is_no_floor() -> None:
    """A GAN's critic is updated while the generator's activations are alive, which a plan can free."""
    make = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4)))
    critic = nn.Linear(16, 16)
    own, other = torch.optim.AdamW(make.parameters()), torch.optim.AdamW(critic.parameters())

    def step(model: nn.Module, x: Tensor) -> None:
        made = model(x)
        critic(made.detach()).square().mean().backward()
        other.step()
        other.zero_grad()
        critic(made).mean().backward()
        own.step()
        own.zero_grad()

    work = ul.Workload(make, torch.randn(256, 16), step=step)
    plan = ul.plan(work, budget="smallest", costs="roofline")
    again = ul.plan(work, plan.predicted.peak_bytes, costs="roofline")
    assert ul.measure(work, again, steps=1).peak_bytes <= plan.predicted.peak_bytes < again.baseline.peak_bytes
