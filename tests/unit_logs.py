"""Op logs to judge the choice inside a unit by: random ones made up from numbers, and those of real units."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from tests.zoo import FAMILIES
from ullage.levels._graph import Graph
from ullage.runtime.ambient._local import quiet
from ullage.runtime.ops._log import Log, Op, Recorder, Value
from ullage.runtime.ops._select import Flow

aten = torch.ops.aten
Choose = Callable[[int], int]  # a number from 0 to n - 1; 0 is the simplest

_PLAIN = [aten.mm.default, aten.gelu.default, aten.add.Tensor, aten.exp.default]
_ROUTING = [aten.topk.default, aten.max.dim]


class _Maker:
    def __init__(self, choose: Choose) -> None:
        self.choose, self.log = choose, Log()
        self.storages = itertools.count()
        self.live: list[Value] = [self.fresh() for _ in range(1 + choose(2))]
        self.log.outside = {v[0] for v in self.live}
        self.log.dynamic = choose(6) == 5

    def fresh(self) -> Value:
        size = 1 + self.choose(6)
        return next(self.storages), 0, (size,), (1,), torch.float32, 0

    def pick(self) -> Value:
        return self.live[-1 - self.choose(min(len(self.live), 6))]

    def add(self) -> None:
        choose = self.choose
        kind, inputs = choose(12), [self.pick() for _ in range(1 + choose(3))]
        given = inputs[0]
        func, writes, draws = _PLAIN[choose(len(_PLAIN))], list[Value](), False
        if kind < 4:
            made: list[Value | None] = [self.fresh()]
        elif kind < 6:
            func, made = _ROUTING[choose(2)], [self.fresh() for _ in range(2 + choose(2))]
        elif kind < 8:  # a view, perhaps one that was taken before
            func, made = aten.view.default, [(given[0], 0, (1, *given[2]), (1, *given[3]), given[4], 0)]
            inputs = [given]
        elif kind == 8:
            func, made, writes = aten.mul_.Tensor, [given], [given]
        elif kind == 9:
            func, made, draws = aten.bernoulli.default, [self.fresh()], True
        elif kind == 10:  # something new, a view of what it was given, and a number
            func, made = aten.native_layer_norm.default, [self.fresh(), given, None]
        else:  # something new, and running statistics
            func, made, writes = aten.native_batch_norm.default, [self.fresh(), self.fresh()], [inputs[-1]]
        outputs: list[tuple[Value | None, Any]] = [
            (v, (v[2], v[3], v[4], torch.device("cpu")) if v is not None else 3) for v in made
        ]
        spec = tree_flatten(0 if len(made) == 1 else [0] * len(made))[1]
        self.log.ops.append(Op(func, inputs, outputs, spec, [-1] * len(made), writes, draws))
        self.live += [v for v in made if v is not None]
        for _ in range(choose(3)):
            self.log.saved.append(self.pick())
            self.log.saved_at.append(len(self.log.ops))


def random_log(choose: Choose, most: int = 10) -> Log:
    """A log of numbers that `choose` gives: views, in-place writes, draws, several outputs, shapes that depend on data."""
    maker = _Maker(choose)
    for _ in range(1 + choose(most)):
        maker.add()
    return maker.log


def log_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Log:
    """The log of a real call, as the runtime writes it."""
    recorder = Recorder()

    def pack(t: Tensor) -> Tensor:
        recorder.saved(t)
        with quiet():
            return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), recorder:
        fn(*args, **kwargs)
    return recorder.log


UNITS: dict[str, Callable[[Any], nn.Module]] = {
    "gpt": lambda m: m.blocks[1],
    "llama": lambda m: m.model.layers[1],
    "resnet": lambda m: m[1][2],
    "moe": lambda m: m.blocks[1],
    "mixtral": lambda m: m.model.layers[1],
}


def unit_of(family: str) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A block of a family of the zoo, and what it is called with."""
    torch.manual_seed(0)
    case = FAMILIES[family]()
    module, calls = UNITS[family](case.model), list[Any]()
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    case.model(**case.batch) if isinstance(case.batch, dict) else case.model(case.batch)
    handle.remove()
    args, kwargs = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, calls[0])
    return module, (args[0].requires_grad_(), *args[1:]), kwargs


def subsets(graph: Graph, choose: Choose, most: int = 64) -> Iterator[frozenset[int]]:
    """All choices, or that many."""
    n = len(graph.groups)
    if 2**n <= most:
        yield from (frozenset(c) for k in range(n + 1) for c in itertools.combinations(range(n), k))
        return
    yield frozenset()
    yield frozenset(range(n))
    for _ in range(most - 2):
        odds = 1 + choose(5)
        yield frozenset(g for g in range(n) if choose(6) < odds)


def indices_of(log: Log, graph: Graph, kept: Sequence[int] | frozenset[int]) -> frozenset[int]:
    """The saved tensors in the storages that the groups' ops allocate."""
    flow, calls, seen = Flow(log), {graph.groups[g].call for g in kept}, dict[str, int]()
    named = set()
    for k, op in enumerate(log.ops):
        name = str(op.func).removeprefix("aten.").removesuffix(".default")
        name = "scaled_dot_product_attention" if name.startswith("_scaled_dot_product") else name
        seen[name] = seen.get(name, -1) + 1
        if (name, seen[name]) in calls:
            named.add(k)
    return frozenset(i for i, v in enumerate(log.saved) if flow.born.get(v[0]) in named and v[0] not in flow.dirty)
