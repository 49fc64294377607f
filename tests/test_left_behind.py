"""Real steps leave nothing changed, whatever holds it: before and after `measure` and `verify`, where steps succeed and where one raises."""

from __future__ import annotations

import functools
import gc
import random
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ullage as ul
from ullage.measure._state import preserved

KINDS: dict[str, Callable[[Any, Tensor], Any]] = {}


def kind(change: Callable[[Any, Tensor], Any]) -> Callable[[Any, Tensor], Any]:
    KINDS[change.__name__.strip("_")] = change
    return change


class Slotted:
    __slots__ = ("last", "n")

    def __init__(self) -> None:
        self.n, self.last = 0, torch.zeros(2)


class SlottedMore(Slotted):
    __slots__ = ("more",)


class Shared:
    seen = 0
    log: ClassVar[list[int]] = []
    table: ClassVar[dict[str, Any]] = {"mean": torch.zeros(3)}

    @classmethod
    def note(cls, y: Tensor) -> None:
        cls.seen += 1
        cls.log.append(cls.seen)
        cls.table["mean"] += 1
        cls.table["last"] = y.detach()

    @staticmethod
    def once() -> None:
        Shared.fresh = 1  # type: ignore[attr-defined]


@dataclass
class Data:
    n: int = 0
    rows: dict[str, list[int]] = field(default_factory=lambda: {"a": [1]})


class Pair(NamedTuple):
    h: Tensor
    c: Tensor


class Bag(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, [value])


class Trainer:
    """A plain object with a model's running average, as many scripts have one."""

    def __init__(self) -> None:
        self.average, self.steps, self.inner = torch.zeros(4), 0, SimpleNamespace(best=[9.0])


STEPS = 0
HISTORY: list[float] = []
AVERAGE = torch.ones(3)
HELPER = Trainer()
CACHE: dict[str, Any] = {"kept": [1]}


class Keeper(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
        self.plain, self.slotted, self.data, self.bag = Trainer(), SlottedMore(), Data(), Bag(a=1)
        self.list, self.deque, self.set = [1, [2]], deque([1, 2], maxlen=2), {1}
        self.default: defaultdict[str, list[int]] = defaultdict(list)
        self.ordered, self.counter = OrderedDict(a=1, b=2), Counter(a=1)
        self.array, self.numbers, self.bytes = np.zeros(3), array("i", [1]), bytearray(b"a")
        self.hidden: Any = (torch.zeros(4), torch.zeros(4))
        self.pair = Pair(torch.zeros(4), torch.zeros(4))
        self.tensors, self.states = [torch.zeros(3)], {torch.zeros(1): torch.zeros(2)}
        self.feature = torch.zeros(3)
        if name == "generators":  # torch's can't be copied
            self.rngs = [random.Random(1), np.random.default_rng(1), torch.Generator().manual_seed(1)]
        self.marked = torch.zeros(1)
        self.marked.note = [0]  # type: ignore[attr-defined]
        self.call = functools.partial(_partial, {"n": [0]})
        self.closure = _closure()
        self.register_buffer("table", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        KINDS[self.name](self, x)
        if FAILS:
            raise ArithmeticError("half-way")
        return x


FAILS: list[int] = []


def _partial(state: dict[str, list[int]]) -> None:
    state["n"][0] += 1
    state["m"] = []


def _closure() -> Callable[[], int]:
    n, log = 0, [torch.zeros(1)]

    def call() -> int:
        nonlocal n
        n += 1
        log[0] = log[0] + 1
        return n

    def look() -> Any:
        return n, log

    call.look = look  # type: ignore[attr-defined]
    return call


@kind
def nothing(m: Keeper, y: Tensor) -> None:
    pass


@kind
def plain_object(m: Keeper, y: Tensor) -> None:
    m.plain.steps += 1
    m.plain.average.lerp_(y.detach()[0], 0.5)
    m.plain.inner.best.append(1.0)
    m.plain.fresh = y.detach()  # type: ignore[attr-defined]


@kind
def slots(m: Keeper, y: Tensor) -> None:
    m.slotted.n += 1
    m.slotted.last = y.detach()
    m.slotted.more = [y.detach()]  # type: ignore[attr-defined]


@kind
def dataclass_(m: Keeper, y: Tensor) -> None:
    m.data.n += 1
    m.data.rows["a"].append(2)
    m.data.rows["b"] = []


@kind
def dict_subclass(m: Keeper, y: Tensor) -> None:
    m.bag.update(a=2, b=y.detach())


@kind
def nested_list(m: Keeper, y: Tensor) -> None:
    m.list[1].append(3)
    m.list.append(y.detach())


@kind
def deque_(m: Keeper, y: Tensor) -> None:
    m.deque.append(3)


@kind
def set_(m: Keeper, y: Tensor) -> None:
    m.set ^= {1, 2}


@kind
def dicts(m: Keeper, y: Tensor) -> None:
    m.default["x"].append(1)
    m.ordered.move_to_end("a")
    m.counter.update("ab")


@kind
def arrays(m: Keeper, y: Tensor) -> None:
    m.array += 1
    m.numbers.append(2)
    m.bytes.extend(b"bc")


@kind
def tuple_replaced(m: Keeper, y: Tensor) -> None:
    m.hidden = (y.detach()[0], m.hidden[1] + 1)


@kind
def tuple_written(m: Keeper, y: Tensor) -> None:
    m.hidden[0].add_(1)
    m.pair.h.add_(1)
    m.pair = Pair(m.pair.c, m.pair.h)


@kind
def tensors_in_containers(m: Keeper, y: Tensor) -> None:
    m.tensors[0] = m.tensors[0] + 1
    m.tensors.append(y.detach())
    for key, value in list(m.states.items()):
        del m.states[key]
        m.states[key + 1] = value + 1


@kind
def tensor_replaced(m: Keeper, y: Tensor) -> None:
    m.feature = y.detach()


@kind
def buffer_replaced(m: Keeper, y: Tensor) -> None:
    m.table = m.table + 1
    m.register_buffer("more", y.detach(), persistent=False)


@kind
def generators(m: Keeper, y: Tensor) -> None:
    m.rngs[0].random()
    m.rngs[1].random()
    torch.rand(1, generator=m.rngs[2])


@kind
def tensor_attribute(m: Keeper, y: Tensor) -> None:
    m.marked.note.append(1)  # type: ignore[attr-defined]
    m.marked.fresh = y.detach()  # type: ignore[attr-defined]


@kind
def partial(m: Keeper, y: Tensor) -> None:
    m.call()


@kind
def closure(m: Keeper, y: Tensor) -> None:
    m.closure()


@kind
def default_argument(m: Keeper, y: Tensor, log: list[Any] = []) -> None:  # noqa: B006
    log.append(y.detach())


@kind
def function_attribute(m: Keeper, y: Tensor) -> None:
    function_attribute.calls = getattr(function_attribute, "calls", 0) + 1  # type: ignore[attr-defined]


@kind
def class_attributes(m: Keeper, y: Tensor) -> None:
    Shared.note(y)
    Shared.once()


@kind
def own_class(m: Keeper, y: Tensor) -> None:
    type(m).level = getattr(type(m), "level", 0) + 1  # type: ignore[attr-defined]


@kind
def globals_(m: Keeper, y: Tensor) -> None:
    global STEPS, AVERAGE, FRESH
    STEPS += 1
    AVERAGE = AVERAGE * 2
    FRESH = y.detach()


@kind
def global_containers(m: Keeper, y: Tensor) -> None:
    HISTORY.append(float(y.detach().sum()))
    CACHE["kept"].append(2)
    CACHE["y"] = y.detach()


@kind
def global_object(m: Keeper, y: Tensor) -> None:
    HELPER.steps += 1
    HELPER.average.add_(1)
    HELPER.inner.best.clear()


@kind
def tensor_hooks(m: Keeper, y: Tensor) -> None:
    weight = m.blocks[0][0].weight  # type: ignore[index]
    weight.register_hook(lambda g: g * 2)
    weight.register_post_accumulate_grad_hook(lambda p: None)


@kind
def module_hooks(m: Keeper, y: Tensor) -> None:
    m.blocks[1].register_full_backward_hook(lambda *a: None)
    m.blocks[1].register_forward_pre_hook(lambda *a: None)
    m.blocks[1].eval()


@kind
def modules_swapped(m: Keeper, y: Tensor) -> None:
    m.extra = nn.Linear(2, 2)
    m.plain = Trainer()


def _plain(value: Any, seen: set[int]) -> Any:
    """A value in a form that can be compared, with identities of what is not made anew."""
    if isinstance(value, Tensor):
        hooks = [len(h or ()) for h in (value._backward_hooks, getattr(value, "_post_accumulate_grad_hooks", None))]
        return type(value), value.tolist(), value.requires_grad, hooks, [_plain(v, seen) for v in vars(value).items()]
    if isinstance(value, torch.Generator | random.Random | np.random.Generator):
        state: Any = value.bit_generator.state if isinstance(value, np.random.Generator) else None
        return str(state or (value.get_state() if isinstance(value, torch.Generator) else value.getstate()))
    if id(value) in seen or isinstance(value, type):
        return id(value)
    seen = seen | {id(value)}
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, functools.partial):
        return _plain(value.args, seen)
    if isinstance(value, dict):
        items = [(k if isinstance(k, str) else _plain(k, seen), _plain(v, seen)) for k, v in value.items()]
        return type(value), id(value), items
    if isinstance(value, list | tuple | deque | array):
        return type(value), [_plain(v, seen) for v in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if callable(value) and not isinstance(value, nn.Module):
        look = getattr(value, "look", None)
        return _plain(look(), seen) if look else (id(value), getattr(value, "calls", 0))
    if hasattr(type(value), "__slots__") and not isinstance(value, bytes | set):
        return [_plain(getattr(value, n, "unset"), seen) for n in ("n", "last", "more")]
    return (id(value), _plain(vars(value), seen)) if hasattr(value, "__dict__") else repr(value)


def everything(model: Keeper) -> Any:
    here = {n: globals().get(n, "unset") for n in ("STEPS", "HISTORY", "AVERAGE", "HELPER", "CACHE", "FRESH")}
    of_class = {
        n: v for n, v in vars(Shared).items() if not callable(v) and not isinstance(v, classmethod | staticmethod)
    }
    functions = [default_argument.__defaults__, getattr(function_attribute, "calls", None)]
    return _plain(
        [list(here.values()), list(of_class.values()), functions, getattr(Keeper, "level", None)], set()
    ), _plain(model, set())


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    FAILS.clear()


def _loss(y: Any, batch: Any) -> Tensor:
    return y.square().sum()  # type: ignore[no-any-return]


def _work(name: str) -> ul.Workload:
    torch.manual_seed(0)
    return ul.Workload(Keeper(name), torch.ones(2, 4), loss=_loss, optimizer=functools.partial(torch.optim.SGD, lr=0.1))


@functools.cache
def _plan() -> ul.Plan:
    return ul.plan(_work("nothing"), policy="every_block", costs="roofline")


VERBS: dict[str, Callable[[ul.Workload], Any]] = {
    "measure": lambda w: ul.measure(w, steps=1),
    "measure planned": lambda w: ul.measure(w, _plan(), steps=1),
    "verify": lambda w: ul.verify(w, _plan(), steps=2, scope="step"),
    "verify units": lambda w: ul.verify(w, _plan(), scope="units"),
}


@pytest.mark.parametrize("name", KINDS)
def test_nothing_is_left_behind(name: str) -> None:
    work = _work(name)
    _plan()
    before = everything(work.model)  # type: ignore[arg-type]
    for verb, run in VERBS.items():
        run(work)
        assert everything(work.model) == before, verb  # type: ignore[arg-type]
        FAILS.append(1)
        with pytest.raises(ul.UllageError, match="half-way"):
            run(work)
        FAILS.clear()
        assert everything(work.model) == before, f"{verb} that fails"  # type: ignore[arg-type]


@pytest.mark.parametrize("name", KINDS)
def test_the_kinds_do_change_something(name: str) -> None:
    work = _work(name)
    with preserved(work.instance()):
        before = everything(work.model)  # type: ignore[arg-type]
        work.model(work.batch)
        assert (everything(work.model) != before) is (name != "nothing")  # type: ignore[arg-type]
    gc.collect()
