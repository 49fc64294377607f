"""Training steps that are run plain, under torch's checkpoint and under ullage's, and compared bit for bit."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import ullage
from ullage.runtime import Options, Site, level_rule, run
from ullage.runtime.ambient._local import local
from ullage.runtime.forward._frame import Frame

Wrap = Callable[..., Any]
aten = torch.ops.aten


def plain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return fn(*args, **kwargs)


def torchs(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return torch_checkpoint(fn, *args, use_reentrant=False, **kwargs)


def ours(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ullage.checkpoint(fn, *args, **kwargs)


def selective(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return ullage.checkpoint(fn, *args, keep="matmul_attention", **kwargs)


def unit(site: Site, keep: str | None = "matmul_attention", **options: Any) -> Wrap:
    """A wrapper whose site the test can read."""
    options = {"rule": level_rule(keep, routing=False) if keep else None, **options}
    return lambda fn, *args, **kwargs: run(site, Options(**options), fn, args, kwargs)


def seed(n: int = 0) -> None:
    torch.manual_seed(n)
    random.seed(n)
    np.random.seed(n)


def rng() -> tuple[Any, ...]:
    """What the generators of torch, Python and numpy would give next."""
    numpys = np.random.get_state()
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), numpys[1].tobytes(), numpys[2]


def bits(value: Any) -> Any:
    """Something equal exactly where all tensors in it are equal bit for bit."""
    if isinstance(value, Tensor):
        t = value.detach().contiguous()
        return tuple(t.shape), t.dtype, t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""
    if isinstance(value, dict):
        return {k: bits(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [bits(v) for v in value]
    return value


def state(model: nn.Module) -> Any:
    """Gradients, buffers and generators after a step."""
    grads = {n: bits(p.grad) for n, p in model.named_parameters()}
    return grads, {n: bits(b) for n, b in model.named_buffers()}, rng()


def steps(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module, Wrap], Tensor], wrap: Wrap, n: int = 3
) -> list[Any]:
    """State and loss after each of `n` steps, from the same start each time."""
    seed()
    model = make()
    seen = []
    for _ in range(n):
        model.zero_grad()
        value = loss(model, wrap)
        value.backward()
        seen.append((bits(value), state(model)))
    return seen


def gradients(fn: Callable[..., Any], inputs: list[Tensor], wrap: Wrap, n: int = 1) -> list[Any]:
    """Outputs and gradients of `n` calls of `fn` on copies of the inputs; the outputs' sum goes backward."""
    seen = []
    for _ in range(n):
        own = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
        out = wrap(fn, *own)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, Tensor) and o.requires_grad]
        sum((o.double() * o.double()).sum() for o in outs).backward()  # type: ignore[union-attr]
        seen.append((bits(out), [bits(t.grad) for t in own]))
    return seen


def inputs(*shapes: tuple[int, ...], grad: bool = True) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(s, generator=generator).requires_grad_(grad) for s in shapes]


class Count(TorchDispatchMode):
    """Counts ops by overload."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[Any, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[func] = self.ops.get(func, 0) + 1
        return func(*args, **(kwargs or {}))


def ops_in(fn: Callable[[], Any]) -> dict[Any, int]:
    with Count() as count:
        fn()
    return count.ops


def frames() -> int:
    """Live frames of the runtime."""
    gc.collect()
    return sum(type(o) is Frame for o in gc.get_objects())


def tensors() -> int:
    """Live tensors that Python knows of."""
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def assert_clean() -> None:
    """Nothing of the runtime is left in force on this thread."""
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    assert _len_torch_dispatch_stack() == 0
    assert torch._C._len_torch_function_stack() == 0
    assert not ullage.is_recomputing() and not local.quiet
    assert torch.is_grad_enabled()
