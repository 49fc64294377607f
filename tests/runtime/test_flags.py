"""Every flag that decides which kernel runs or what it rounds to: the replay's is the forward's, and none stays half-way."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests.runtime.steps import Wrap, inputs, ours, selective
from ullage.runtime import Apart
from ullage.runtime.ambient._ambient import put_back, read_flags
from ullage.runtime.ambient._settings import read_settings, settings_of

both = pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
_C: Any = torch._C


class Flag(NamedTuple):
    """How to read and set it, and two values of it."""

    get: Callable[[], Any]
    put: Callable[[Any], Any]
    usual: Any
    other: Any


def _of_c(name: str, usual: Any, other: Any) -> Flag:
    put = getattr(_C, f"_set_{name}")
    return Flag(getattr(_C, f"_get_{name}"), lambda v: put(*v) if isinstance(v, tuple) else put(v), usual, other)


def _switched(name: str) -> Flag | None:
    get = getattr(_C, f"_get_{name}", None)
    if get is None or not hasattr(_C, f"_set_{name}"):
        return None
    usual = get()
    return _of_c(name, usual, tuple(not v for v in usual) if isinstance(usual, tuple) else not usual)


def _kernel(name: str) -> Flag:
    return Flag(getattr(_C, f"_get_{name}_sdp_enabled"), getattr(_C, f"_set_sdp_use_{name}"), True, False)


def _flushes() -> bool:
    return 2.0**-1022 * 0.5 == 0.0


def _precision(backend: str, op: str) -> Flag | None:
    if not hasattr(_C, "_get_fp32_precision_getter"):
        return None
    return Flag(
        lambda: _C._get_fp32_precision_getter(backend, op),
        lambda v: _C._set_fp32_precision_setter(backend, op, v),
        "none",
        "tf32" if backend == "generic" else "bf16",
    )


_variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=1)
_SWITCHES = [
    "mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled", "cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "cudnn_allow_tf32",
    "cublas_allow_tf32", "cublas_allow_fp16_reduced_precision_reduction", "cublas_allow_bf16_reduced_precision_reduction",
    "cublas_allow_fp16_accumulation", "cpu_allow_fp16_reduced_precision_reduction", "math_sdp_allow_fp16_bf16_reduction",
    "deterministic_fill_uninitialized_memory",
]  # fmt: skip
FLAGS: dict[str, Flag | None] = {
    **{name: _switched(name) for name in _SWITCHES},
    **{f"{name}_sdp": _kernel(name) for name in ("flash", "mem_efficient", "math", "cudnn")},
    **{f"fp32_precision {b}.{o}": _precision(b, o) for b, o in (("generic", "all"), ("mkldnn", "all"), ("mkldnn", "conv"), ("mkldnn", "rnn"), ("mkldnn", "matmul"))},
    "float32_matmul_precision": Flag(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest", "medium"),
    "threads": Flag(torch.get_num_threads, torch.set_num_threads, torch.get_num_threads(), torch.get_num_threads() + 1),
    "denormals": Flag(_flushes, torch.set_flush_denormal, False, True),
    "default dtype": Flag(torch.get_default_dtype, torch.set_default_dtype, torch.float32, torch.float64),
    "default device": Flag(lambda: torch.empty(0).device.type, lambda v: torch.set_default_device(None if v == "cpu" else v), "cpu", "meta"),
    "deterministic": Flag(torch.are_deterministic_algorithms_enabled, lambda v: torch.use_deterministic_algorithms(v, warn_only=True), False, True),
    "warn only": Flag(
        torch.is_deterministic_algorithms_warn_only_enabled, lambda v: torch.use_deterministic_algorithms(v, warn_only=v), False, True
    ),
    "autocast": Flag(lambda: torch.is_autocast_enabled("cpu"), lambda v: (torch.set_autocast_enabled("cpu", v), torch.clear_autocast_cache()), False, True),
    "autocast dtype": Flag(
        lambda: torch.get_autocast_dtype("cpu"), lambda v: torch.set_autocast_dtype("cpu", v), torch.bfloat16, torch.float16
    ),
    "autocast cache": Flag(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled, True, False),
}  # fmt: skip
flags = pytest.mark.parametrize("name", FLAGS)


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    before = read_flags()
    yield
    put_back(before)


def _flag(name: str) -> Flag:
    flag = FLAGS[name]
    if flag is None:
        pytest.skip("not in this torch")
    if name == "denormals" and not torch.set_flush_denormal(False):
        pytest.skip("this CPU can't flush denormals")
    assert flag.get() == flag.usual
    try:
        flag.put(flag.other)
        flag.put(flag.usual)
    except RuntimeError:
        pytest.skip("this CPU does not know it")
    return flag


class Seen(Apart):
    """What forwards and replays saw; no state of a unit's."""

    def __init__(self) -> None:
        self.values: list[Any] = []


@both
@flags
def test_changed_between_forward_and_backward(name: str, wrap: Wrap) -> None:
    """The replay has the forward's; afterwards there is what was there before backward. And the other way round."""
    flag, seen = _flag(name), Seen()

    def f(x: Tensor, w: Tensor) -> Tensor:
        seen.values.append(flag.get())
        return ((x @ w).sin() @ w).exp()

    for at, then in ((flag.other, flag.usual), (flag.usual, flag.other)):
        for _ in range(2):
            x, w = inputs((4, 4), (4, 4))
            one = torch.ones(())
            seen.values.clear()
            flag.put(at)
            out = wrap(f, x, w).float().sum()
            flag.put(then)
            out.backward(one)
            assert flag.get() == then
            assert seen.values == [at, at]
    flag.put(flag.usual)


@both
@flags
def test_toggled_half_way(name: str, wrap: Wrap) -> None:
    """The unit's last tensor is saved while the flag is set."""
    flag, seen = _flag(name), Seen()
    before = read_settings()

    def f(x: Tensor, w: Tensor) -> Tensor:
        h = (x @ w).sin()
        flag.put(flag.other)
        seen.values.append(flag.get())
        h = h.float().exp()
        flag.put(flag.usual)
        return h

    for _ in range(2):
        x, w = inputs((4, 4), (4, 4))
        seen.values.clear()
        wrap(f, x, w).sum().backward()
        assert flag.get() == flag.usual
        assert seen.values == [flag.other, flag.other]
    assert read_settings() == before or name == "float32_matmul_precision"
    assert torch._C._len_torch_function_stack() == 0


@both
def test_context_variables_half_way(wrap: Wrap) -> None:
    def f(x: Tensor, w: Tensor) -> Tensor:
        token = _variable.set(3)
        h = ((x @ w) * _variable.get()).exp()
        _variable.reset(token)
        return h

    x, w = inputs((4, 4), (4, 4))
    wrap(f, x, w).sum().backward()
    assert _variable.get() == 1


def test_settings_of_accelerators_are_read_and_set() -> None:
    for get, put in settings_of(True):
        value = get()
        put(*value) if isinstance(value, tuple) else put(value)
        assert get() == value
        hash(value)


class Moded(nn.Module):
    """Its forward hangs on the modes of a module below it, of a module in a list and of itself; the last it flips and puts back."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.listed = nn.Dropout(0.25), [nn.Dropout(0.5)]

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        was = self.training
        self.eval() if was else self.train()
        h = (x @ w).sin() * (2.0 if self.training else 0.5)
        self.train(was)
        return self.listed[0](self.below(h.exp()).cos()) * h


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrap", [ours, selective], ids=["full", "selective"])
def test_modes_of_modules_change_between_forward_and_backward(wrap: Wrap, training: bool) -> None:
    def step(wrap: Wrap) -> list[Tensor]:
        torch.manual_seed(0)
        model, (x, w), found = Moded().train(training), inputs((4, 4), (4, 4)), []
        for turned in (False, True, True):
            out = wrap(model, x, w).sum()
            modes = [model, model.below, model.listed[0]]
            for m in modes:
                m.training = m.training is not turned
            now = [m.training for m in modes]
            out.backward()
            assert [m.training for m in modes] == now
            for m in modes:
                m.training = m.training is not turned
            found += [x.grad.clone(), w.grad.clone()]
        return found

    assert all(torch.equal(a, b) for a, b in zip(step(wrap), step(lambda f, *a: f(*a)), strict=True))
