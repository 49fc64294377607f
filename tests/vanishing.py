"""Hides one name of torch's after the other from `import ullage`, and tells what of ullage breaks.

Run as a program: `vanishing.py PLAN DISK_PLAN NAME=FEATURE,FEATURE...`. Torch is imported once; each name has a forked process of its own. A name is hidden
while ullage is imported, since ullage looks names up then, and given back to torch, which needs many of them itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

BLOCKS, WIDTH = 2, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return x + self.down(nn.functional.gelu(self.up(x)))


def mean(output: Tensor, batch: Tensor) -> Tensor:
    return output.mean()


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def make_batch() -> Tensor:
    return torch.ones(64, WIDTH)


def make_work(model: nn.Module) -> Any:
    import ullage as ul

    return ul.Workload(model, make_batch(), loss=mean, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def _step(run: Callable[[Tensor], Tensor]) -> None:
    run(make_batch().requires_grad_()).sum().backward()


class Counting(Block):
    """Writes to a buffer, so that a replay puts it back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return super().forward(x * self.calls)


class Named(Tensor):
    """A subclass that only Python's functions know."""


def first_mean(output: tuple[Tensor, Any], batch: Tensor) -> Tensor:
    return output[0].mean()


def _checkpoint(run: Callable[[Tensor], Tensor] | None = None, **options: Any) -> None:
    import ullage as ul

    block = Block() if run is None else run
    for _ in range(2):
        _step(lambda x: ul.checkpoint(block, x, **options))


def _compiled() -> None:
    block = Block()
    block._compiled_call_impl = block._call_impl  # as `block.compile()` would, without a compiler
    _checkpoint(block)


def _sparse() -> None:
    graph = torch.eye(64).to_sparse()
    with torch.autocast("cpu", torch.bfloat16):
        _checkpoint(lambda x: torch.sparse.mm(graph, x).float(), debug=True)


def _in_device() -> None:
    with torch.device("cpu"):
        _checkpoint()


def _recurrent() -> None:
    import ullage as ul

    ul.profile(ul.Workload(nn.LSTM(4, 4), torch.ones(3, 2, 4), loss=first_mean), costs="roofline")


# Of names that the first seven do not use.
SPECIAL: dict[str, Callable[[], None]] = {
    "compiled unit": _compiled,
    "device context": _in_device,
    "digests of a subclass": lambda: _checkpoint(lambda x: Block()(x.as_subclass(Named)), determinism_check="values"),
    "recurrent layers": _recurrent,
    "skipped op": lambda: _checkpoint(lambda x: (x @ x.T * 3).sin() @ x, keep=[torch.ops.aten.mul.Tensor]),
    "sparse product": _sparse,
    "written buffer": lambda: _checkpoint(Counting()),
}
FEATURES = ("checkpoint", "keep", "plan", "apply", "verify", "measure", "offload")


def _features(plan: str, disk_plan: str) -> dict[str, Callable[[], Any]]:
    import ullage as ul

    def applied(path: str) -> None:
        model = make_model()
        with ul.Plan.load(path).apply(model):
            for _ in range(2):
                _step(model)

    def estimate() -> None:
        ul.profile(make_work(make_model()), device="h200", costs="roofline")

    calls = (
        _checkpoint,
        lambda: _checkpoint(keep="matmul_attention"),
        lambda: ul.plan(make_work(make_model()), policy="every_block", costs="roofline"),
        lambda: applied(plan),
        lambda: ul.verify(make_work(make_model()), ul.Plan.load(plan)),
        lambda: ul.measure(make_work(make_model()), steps=1),
        lambda: applied(disk_plan),
    )
    return dict(zip(FEATURES, calls, strict=True)) | SPECIAL | {"estimate": estimate}


def _outcome(call: Callable[[], Any]) -> str:
    import ullage as ul

    try:
        call()
    except ul.UnsupportedTorch as error:
        return error.name if f"`{error.name}`" in str(error) and torch.__version__ in str(error) else repr(error)
    except Exception as error:
        return repr(error)
    return ""


class _Gone:
    """An attribute that a class no longer has, though one that it derives from does."""

    def __get__(self, obj: Any, owner: Any = None) -> Any:
        raise AttributeError


class _Without:
    """An object that nobody can take an attribute from, without that attribute."""

    def __init__(self, obj: Any, name: str) -> None:
        self.__obj, self.__name = obj, name

    def __getattr__(self, name: str) -> Any:
        if name == self.__name:
            raise AttributeError(name)
        return getattr(self.__obj, name)


def _walk(path: str) -> Any:
    first, *rest = path.split(".")
    found: Any = importlib.import_module(first)
    for n, part in enumerate(rest, 2):
        found = getattr(found, part) if hasattr(found, part) else importlib.import_module(".".join(path.split(".")[:n]))
    return found


@contextlib.contextmanager
def hidden(name: str) -> Iterator[None]:
    """Torch without that name."""
    path, _, last = name.rpartition(".")
    owner = _walk(path)
    value = getattr(owner, last)
    with contextlib.ExitStack() as stack:
        if isinstance(value, types.ModuleType) and name in sys.modules:
            stack.callback(sys.modules.__setitem__, name, value)
            sys.modules[name] = None  # type: ignore[assignment]  # "there is no such module"
        if last in getattr(owner, "__dict__", {}):
            stack.callback(setattr, owner, last, value)
            delattr(owner, last)
        elif isinstance(owner, type):
            stack.callback(delattr, owner, last)
            setattr(owner, last, _Gone())
        else:
            above, _, own = path.rpartition(".")
            stack.callback(setattr, _walk(above), own, owner)
            setattr(_walk(above), own, _Without(owner, last))
            if path in sys.modules:
                stack.callback(sys.modules.__setitem__, path, owner)
                sys.modules[path] = _Without(owner, last)  # type: ignore[assignment]
        yield


def _look(name: str, features: list[str], plans: list[str]) -> dict[str, Any]:
    """In a process of its own."""
    if name:
        with hidden(name):
            import ullage
    else:
        import ullage  # noqa: F401
    from ullage import _torch

    if name and not isinstance(_torch.PRIVATE.get(name), _torch.Private):
        return {"import": "not listed"}
    if name and _torch.PRIVATE[name].found:
        return {"import": "was not hidden"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        calls = _features(*plans)
        found = {feature: _outcome(calls[feature]) for feature in features}
    told = [
        str(w.message) for w in said if isinstance(w.message, ullage.UllageWarning) and name and name in str(w.message)
    ]
    return {"import": "", "broken": {k: v for k, v in found.items() if v}, "told": len(told), "notes": _torch.notes()}


def main(plan: str, disk_plan: str, *lines: str) -> None:
    """Print what broke, as JSON by name."""
    torch.set_num_threads(1)
    for module in (
        "msgspec",
        "numpy.random",
        "torch._dynamo",
        "torch.utils.flop_counter",
        "torch.utils.data",
    ):  # once, not in each process
        importlib.import_module(module)
    gc.freeze()
    gc.disable()
    found: dict[str, Any] = {}
    for line in lines:
        name, _, features = line.partition("=")
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                found = _look(name, features.split(","), [plan, disk_plan])
            except BaseException as error:
                found = {"import": repr(error)}
            with os.fdopen(writer, "w") as file:
                json.dump(found, file)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as file:
            text = file.read()
        os.waitpid(child, 0)
        found[name] = json.loads(text or '{"import": "the process died"}')
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
