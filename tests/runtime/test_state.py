"""State that a forward changes ends as after one forward, and a replay sees what its forward saw."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ullage
from tests.runtime.steps import Wrap, bits, gradients, inputs, ours, plain, selective, steps, torchs, unit
from ullage.runtime import Apart, Site

both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
XW = ((4, 4), (4, 4))


class Stateful(nn.Module):
    """Every step depends on the state, and changes it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("load", torch.zeros(4))
        self.register_buffer("narrow", torch.zeros(4, dtype=torch.bfloat16))
        self.n, self.seen, self.table, self.names = 0, [], {}, set()
        self.recent: deque[int] = deque(maxlen=3)
        self.array = np.zeros(3)
        self.holder = SimpleNamespace(total=0.0, parts=[torch.zeros(())])

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.kind)(self.linear(x)).sin().exp()

    def buffer(self, h: Tensor) -> Tensor:
        self.count += 1
        return h * self.count.item()

    def replaced(self, h: Tensor) -> Tensor:
        self.count = self.count + 1
        return h * self.count.item()

    def integer(self, h: Tensor) -> Tensor:
        self.n += 1
        return h * self.n

    def expert_load(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.load.add_(torch.bincount(h.argmax(-1), minlength=4))
            self.narrow += 1
        return h * (self.load.detach().clone() + self.narrow.clone())

    def listed(self, h: Tensor) -> Tensor:
        self.seen.append(h.detach())
        return h * len(self.seen)

    def dictionary(self, h: Tensor) -> Tensor:
        self.table[len(self.table)] = len(self.names)
        self.names.add(len(self.names))
        self.recent.append(len(self.table))
        return h * (len(self.table) + len(self.names) + sum(self.recent))

    def numpys(self, h: Tensor) -> Tensor:
        self.array += 1
        return h * float(self.array.sum())

    def held(self, h: Tensor) -> Tensor:
        self.holder.total += 1.0
        self.holder.parts[0] += 1
        self.holder.parts.append(h.detach().mean())
        return h * self.holder.total * self.holder.parts[0].item() + len(self.holder.parts)

    def everything(self) -> Any:
        recent = list(self.recent)
        plain_state = (self.n, bits(self.seen), self.table, self.names, recent, self.array.tolist())
        return plain_state, self.holder.total, bits(self.holder.parts)


KINDS = ["buffer", "replaced", "integer", "expert_load", "listed", "dictionary", "numpys", "held"]


@both
@pytest.mark.parametrize("kind", KINDS)
def test_state_ends_as_after_one_forward(kind: str, wrap: Wrap) -> None:
    models: list[Any] = []

    def make() -> nn.Module:
        models.append(Stateful(kind))
        return models[-1]

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        x = torch.randn(2, 4)
        y = call(model, x)  # called twice: the first replay must not see the second call's state
        return (y * call(model, x + y)).sum()

    assert steps(make, loss, wrap) == steps(make, loss, plain)
    assert models[0].everything() == models[1].everything()
    before = len(models)
    try:
        wrong = steps(make, loss, torchs) != steps(make, loss, plain)
    except RuntimeError:
        wrong = True
    assert wrong or models[before].everything() != models[1].everything()  # torch's replays change it again


class Retyped(nn.Module):
    """Its buffer is given other memory in each forward, in the first of another dtype."""

    def __init__(self, before: torch.dtype, after: torch.dtype) -> None:
        super().__init__()
        self.after = after
        self.register_buffer("state", torch.zeros(3, dtype=before))

    def forward(self, x: Tensor) -> Tensor:
        now = self.state.double().sum() + self.state.element_size()
        self.state.data = (self.state.double() + 1).to(self.after)
        return (x * now).sin().exp()


@both
@pytest.mark.filterwarnings("ignore:(?s).*a stale op log:ullage.UllageWarning")  # later calls cast nothing
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.int32),
    ],
    ids=str,
)
def test_a_buffer_with_other_memory(before: torch.dtype, after: torch.dtype, wrap: Wrap) -> None:
    found = []
    for call in (wrap, plain):
        model, x = Retyped(before, after), torch.linspace(-1, 1, 6).requires_grad_()
        for _ in range(3):
            call(model, x).sum().backward()
        assert model.state.dtype == after
        found.append((bits(x.grad), bits(model.state)))
    assert found[0] == found[1]


ODD: dict[str, Callable[[], Any]] = {
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "zero": lambda: torch._efficientzerotensor(3),
    "conjugate": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "meta": lambda: torch.ones(3, device="meta"),
    "freed": lambda: _freed(torch.ones(3)),
    "of less than a byte": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.uint4),
}


def _freed(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


@both
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("kind", ODD)
def test_an_attribute_that_can_not_be_copied(kind: str, wrap: Wrap) -> None:
    model = nn.Linear(4, 4)
    model.odd = ODD[kind]()
    x = torch.ones(2, 4)
    grads = []
    for call in (wrap, wrap, plain):
        model.zero_grad()
        call(model, x).exp().sum().backward()
        grads.append(bits(model.weight.grad))
    assert grads[0] == grads[1] == grads[2]


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


class Typed(nn.Module):
    """A buffer of a dtype, in a layout, that each forward changes and that its result depends on."""

    def __init__(self, dtype: torch.dtype, layout: str) -> None:
        super().__init__()
        made = torch.zeros(0 if layout == "empty" else 12, dtype=dtype)
        laid = (
            {"scalar": made[:1].reshape(()), "transposed": made.reshape(3, 4).t(), "every second": made[::2]}
            if len(made)
            else {}
        )
        self.register_buffer("state", laid.get(layout, made))

    def forward(self, x: Tensor) -> Tensor:
        now = self.state.to(torch.complex64).abs().sum() + self.state.numel()
        self.state.copy_((self.state.to(torch.complex64) + 1).abs().to(self.state.dtype))
        return (x * now).sin().exp()


@both
@pytest.mark.parametrize("layout", ["plain", "scalar", "transposed", "every second", "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_of_any_dtype_and_layout(dtype: torch.dtype, layout: str, wrap: Wrap) -> None:
    """Their values are put back for a replay, and their storages stay resizable, as FSDP needs them."""
    found = []
    for call in (wrap, plain):
        model, seen = Typed(dtype, layout), []
        for _ in range(3):
            x = torch.linspace(-1, 1, 6).requires_grad_()
            call(model, x).sum().backward()
            seen.append(x.grad)
        assert model.state.untyped_storage().resizable()
        found.append((bits(seen), bits([model.state])))
    assert found[0] == found[1]


@both
def test_identities_stay(wrap: Wrap) -> None:
    model = Stateful("buffer")
    before = {k: id(v) for k, v in model.__dict__.items()} | {k: id(b) for k, b in model.named_buffers()}
    for _ in range(3):
        wrap(model, torch.randn(2, 4)).sum().backward()
    after = {k: id(v) for k, v in model.__dict__.items()} | {k: id(b) for k, b in model.named_buffers()}
    assert before == after


@both
@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_in_training_and_evaluation(wrap: Wrap, track: bool) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=track), nn.GELU(), nn.Linear(4, 4))

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        a = call(model.train(), torch.randn(6, 4)).sum()
        return a + call(model.eval(), torch.randn(6, 4)).exp().sum()

    if not track:
        assert steps(make, loss, wrap, 4) == steps(make, loss, plain, 4)
    else:
        # the statistics changed between the two calls are read by the second: both ends must agree
        def one(model: nn.Module, call: Wrap) -> Tensor:
            return call(model.train(), torch.randn(6, 4)).exp().sum()

        assert steps(make, one, wrap, 4) == steps(make, one, plain, 4)

        def evaluated(model: nn.Module, call: Wrap) -> Tensor:
            return call(model.eval(), torch.randn(6, 4)).exp().sum()

        assert steps(make, evaluated, wrap) == steps(make, evaluated, plain)


@both
def test_a_list_that_is_an_argument(wrap: Wrap) -> None:
    def f(x: Tensor, w: Tensor, seen: list[Tensor]) -> Tensor:
        seen.append((x @ w).detach())
        return (x @ w * len(seen)).sin().exp() @ w

    def run(call: Wrap) -> Any:
        seen: list[Tensor] = []
        found = gradients(lambda x, w: call(f, x, w, seen), inputs(*XW), plain, 4)
        return found, bits(seen)

    assert run(wrap) == run(plain)
    assert len(run(wrap)[1]) == 4


def _stale_logs(wrap: Wrap) -> Any:
    """State is not in a log's signature: where its shapes change the log is stale, and full replay takes over."""
    return pytest.warns(ullage.UllageWarning, match="a stale op log") if wrap is selective else nullcontext()


class Cache:
    """Keys and values of the past, as generation code keeps them."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.length = 0

    def update(self, key: Tensor) -> Tensor:
        self.keys.append(key)
        self.length += key.shape[0]
        return torch.cat(self.keys)


@both
def test_a_cache_object(wrap: Wrap) -> None:
    def f(x: Tensor, w: Tensor, cache: Cache) -> Tensor:
        keys = cache.update((x @ w).sin())
        return torch.softmax(x @ keys.t(), -1) @ keys

    def run(call: Wrap) -> Any:
        seen = []
        for _ in range(3):
            cache = Cache()
            x, w = inputs(*XW)
            y = call(f, x, w, cache)
            z = call(f, y, w, cache)
            z.sum().backward()
            seen.append((bits(z), bits(x.grad), bits(w.grad), bits(cache.keys), cache.length))
        return seen

    with _stale_logs(wrap):
        assert run(wrap) == run(plain)


@both
def test_the_cache_of_transformers(wrap: Wrap) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils")

    def f(x: Tensor, w: Tensor, past: Any) -> Tensor:
        h = (x @ w).view(1, 1, 4, 4).sin()
        keys, values = past.update(h, h.exp(), 0)
        return (torch.softmax(h @ keys.transpose(-1, -2), -1) @ values).view(4, 4)

    def run(call: Wrap) -> Any:
        seen = []
        for _ in range(3):
            past = cache_utils.DynamicCache()
            x, w = inputs(*XW)
            call(f, call(f, x, w, past=past), w, past=past).sum().backward()
            seen.append((bits(x.grad), bits(w.grad), past.get_seq_length(), bits(past.layers[0].keys)))
        return seen

    assert run(wrap) == run(plain)  # an empty cache and one with layers are units of their own: no log is stale


class Lazy(nn.Module):
    """Its state is made by its first forward, and changed in place by the later ones."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "count"):
            self.register_buffer("count", torch.zeros(4))
            self.total, self.seen = torch.zeros(()), []
        self.count += 1
        self.total += 1
        self.seen.append(self.total.item())
        return (self.linear(x) * (self.count + self.total).clone() * len(self.seen)).sin().exp()


@both
def test_state_made_by_the_first_forward(wrap: Wrap) -> None:
    models: list[Any] = []

    def make() -> nn.Module:
        models.append(Lazy())
        return models[-1]

    def loss(model: nn.Module, call: Wrap) -> Tensor:
        return call(model, torch.randn(2, 4)).sum()

    with _stale_logs(wrap):
        assert steps(make, loss, wrap, 5) == steps(make, loss, plain, 5)
    assert bits([models[0].total, models[0].seen]) == bits([models[1].total, models[1].seen])


@both
def test_a_cache_that_only_some_calls_are_given(wrap: Wrap) -> None:
    def f(x: Tensor, w: Tensor, caches: Any) -> Tensor:
        keys = (x @ w).sin()
        for cache in caches or ():
            keys = cache.update(keys)
        return torch.softmax(x @ keys.t(), -1) @ keys

    def run(call: Wrap) -> Any:
        seen = []
        for n in (0, 1, 2, 1, 0):
            caches = [Cache() for _ in range(n)]
            x, w = inputs(*XW)
            call(f, x, w, caches if n else None).sum().backward()
            seen.append((bits(x.grad), bits(w.grad), [bits(c.keys) for c in caches]))
        return seen

    assert run(wrap) == run(plain)


# --- what a replay can't have: kept, and said ------------------------------------------------------------------------


class WritesParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(4)), nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.mul_(0.5)
        return (x @ self.weight * self.scale).sin().exp()


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
def test_a_parameter_written_in_forward(keep: str | None) -> None:
    def loss(model: nn.Module, call: Wrap) -> Tensor:
        return call(model, torch.randn(2, 4)).sum()

    site = Site("unit")
    match = "unit: its forward writes parameter scale, which a replay would write again; its activations are kept"
    with pytest.warns(ullage.UllageWarning, match=match):
        seen = steps(WritesParameter, loss, unit(site, keep))
    assert seen == steps(WritesParameter, loss, plain)
    assert site.replays == 0


@pytest.mark.parametrize("keep", [None, "matmul_attention"])
@pytest.mark.parametrize("name", ["argument 1", "into", "argument 1['k']"])
def test_an_input_written_in_place(keep: str | None, name: str) -> None:
    def f(x: Tensor, bag: Any = None, into: Any = None) -> Tensor:
        t = into if into is not None else bag["k"] if isinstance(bag, dict) else bag
        t += 1
        return (x * t).sin().exp()

    site = Site("unit")
    call = unit(site, keep)

    def run(call: Wrap) -> Any:
        (t,) = inputs((4, 4), grad=False)
        given = {"argument 1": ((t,), {}), "into": ((), {"into": t}), "argument 1['k']": (({"k": t},), {})}[name]
        return gradients(lambda x: call(f, x, *given[0], **given[1]), inputs((4, 4)), plain, 3), bits(t)

    with pytest.warns(ullage.UllageWarning, match=f"unit: its forward writes {re.escape(name)} in place, .* are kept"):
        seen = run(call)
    assert seen == run(plain)
    assert site.replays == 0


def test_an_input_written_in_place_by_a_nested_unit() -> None:
    """The inner unit keeps everything; its argument is a tensor of the outer unit's own, which makes it again."""

    def inner(x: Tensor, t: Tensor) -> Tensor:
        t.add_(1)
        return (x * t).sin().exp()

    def unit_around(x: Tensor, w: Tensor) -> Tensor:
        return ullage.checkpoint(inner, x, (x @ w).detach().clone()).cos()

    with pytest.warns(ullage.UllageWarning, match="its forward writes argument 1 in place"):
        seen = gradients(unit_around, inputs(*XW), ours, 1)
    assert seen == gradients(unit_around, inputs(*XW), lambda fn, *a: fn(*a), 1)


# --- is_recomputing --------------------------------------------------------------------------------------------------


class _Log(Apart):
    """No state of a unit's: no replay puts it back."""

    def __init__(self) -> None:
        self.seen: list[bool] = []


_log = _Log()


@both
def test_is_recomputing(wrap: Wrap) -> None:
    def f(x: Tensor) -> Tensor:
        _log.seen.append(ullage.is_recomputing())
        return x.exp().sin().cos()

    _log.seen.clear()
    (x,) = inputs((4, 4))
    out = wrap(f, x)
    out.register_hook(lambda g: _log.seen.append(ullage.is_recomputing()))
    out.sum().backward()
    assert _log.seen == [False, False, True]
    assert not ullage.is_recomputing()
