"""A factory that is called while capturing leaves no fake tensor where it keeps things, built or not; its model finds them all the same."""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import ullage as ul
from ullage_cli._main import run

TABLE: Any = None
CACHE: dict[str, Any] = {"mine": torch.ones(2)}
NESTED: dict[str, list[Any]] = {"tables": [torch.ones(2)]}
RECENT: deque[Any] = deque([torch.ones(2)], maxlen=2)
STATE = SimpleNamespace(table=torch.ones(2))


class Registry:
    tables: ClassVar[dict[str, Any]] = {}
    last: ClassVar[Any] = torch.ones(2)


@functools.lru_cache
def cached(n: int) -> Tensor:
    return torch.arange(float(n))


def _global(t: Tensor) -> Callable[[], Tensor]:
    global TABLE
    TABLE = t
    return lambda: TABLE


def _dict(t: Tensor) -> Callable[[], Tensor]:
    CACHE["t"] = t
    return lambda: CACHE["t"]  # type: ignore[no-any-return]


def _nested(t: Tensor) -> Callable[[], Tensor]:
    NESTED["tables"].append(t)
    NESTED["more"] = [t]
    return lambda: NESTED["tables"][-1]  # type: ignore[no-any-return]


def _deque(t: Tensor) -> Callable[[], Tensor]:
    RECENT.extend([t, t])
    return lambda: RECENT[0]  # type: ignore[no-any-return]


def _object(t: Tensor) -> Callable[[], Tensor]:
    STATE.table = t
    return lambda: STATE.table


def _class(t: Tensor) -> Callable[[], Tensor]:
    Registry.tables["t"] = t
    Registry.last = t
    return lambda: Registry.last * Registry.tables["t"]  # type: ignore[no-any-return]


def _lru(t: Tensor) -> Callable[[], Tensor]:
    cached(8)
    return lambda: cached(8)


def _default(t: Tensor, made: list[Any] = []) -> Callable[[], Tensor]:  # noqa: B006
    made.append(t)
    return lambda: _default.__defaults__[0][-1]  # type: ignore[index,no-any-return]


def _own(t: Tensor) -> Callable[[], Tensor]:
    _own.table = t  # type: ignore[attr-defined]
    return lambda: _own.table  # type: ignore[attr-defined,no-any-return]


KINDS = [_global, _dict, _nested, _deque, _object, _class, _lru, _default, _own]


class Scaled(nn.Module):
    def __init__(self, look: Callable[[], Tensor], fails: bool) -> None:
        super().__init__()
        self.look, self.fails, self.linear = look, fails, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise ArithmeticError("in forward")
        return (self.linear(x) * self.look()).sum()


def _factory(keep: Callable[[Tensor], Callable[[], Tensor]], where: str) -> Callable[[], ul.Workload]:
    count = [0]

    def build() -> ul.Workload:
        count[0] += 1
        look = keep(torch.ones(8))
        if where == "factory":
            raise ArithmeticError("in factory")
        if where == "result":
            return None  # type: ignore[return-value]
        return ul.Workload(Scaled(look, where == "forward"), torch.ones(4, 8))

    return build


def _found() -> list[Any]:
    """What is in all those places; ids of tensors that are there."""
    places = [
        TABLE, CACHE, NESTED, list(RECENT), vars(STATE), Registry.tables, Registry.last, _default.__defaults__, vars(_own),
        cached(8),
    ]  # fmt: skip
    assert "FakeTensor" not in repr(places)
    return [str(places), id(CACHE["mine"]), id(NESTED["tables"][0]), id(RECENT[0]), id(STATE.table), id(Registry.last)]


@pytest.mark.parametrize("where", ["", "factory", "forward", "result"])
@pytest.mark.parametrize("keep", KINDS, ids=lambda k: k.__name__.strip("_"))
def test_what_a_factory_keeps(keep: Any, where: str) -> None:
    before = _found()
    cached.cache_clear()
    work = ul.Workload.from_factory(_factory(keep, where))
    if where:
        with pytest.raises(ul.UllageError, match=f"in {where}|NoneType"):
            ul.profile(work, costs="roofline")
    else:
        assert ul.profile(work, costs="roofline").peak_bytes > 0
    assert not isinstance(cached(8), FakeTensor)
    assert _found() == before


BUILDS = [0]
SEEN: dict[str, int] = {}
LAST = 0


def _counting() -> ul.Workload:
    global LAST
    LAST = BUILDS[0] = BUILDS[0] + 1
    SEEN.setdefault("first", LAST)
    return ul.Workload(Scaled(lambda: torch.full((8,), float(LAST)), fails=False), torch.ones(4, 8))


def test_numbers_in_globals_of_a_factory() -> None:
    ul.profile(ul.Workload.from_factory(_counting), costs="roofline")
    assert (BUILDS, SEEN, LAST) == ([0], {}, 0)


def test_what_another_thread_does_meanwhile_stays() -> None:
    seen: list[float] = []
    count = [0]

    def elsewhere() -> None:
        nonlocal count
        seen.append(1.0)
        count = [count[0] + 1]

    class Meets(Scaled):
        def forward(self, x: Tensor) -> Tensor:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return super().forward(x)

    work = ul.Workload.from_factory(lambda: ul.Workload(Meets(lambda: torch.ones(8), fails=False), torch.ones(4, 8)))
    ul.profile(work, costs="roofline")
    assert len(seen) == count[0] >= 2


def test_an_optimizer_that_is_made_while_capturing() -> None:
    made: list[Any] = []

    def optimizer(params: Any) -> torch.optim.Optimizer:
        CACHE["parameters"] = list(params)
        made.append(torch.optim.SGD(CACHE["parameters"], lr=0.1))
        return made[-1]  # type: ignore[no-any-return]

    before = _found()
    ul.profile(ul.Workload(nn.Linear(8, 1), torch.ones(2, 8), loss=lambda y, b: y.sum(), optimizer=optimizer))
    assert _found() == before and made == []


NEIGHBOUR = "SIZE = 8"
SCRIPT = """
import torch, ullage as ul
from torch import nn
{at_import}
TABLES = []

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 1)
    def forward(self, x):
        {at_step}
        return self.linear(x).sum()

def workload(batch: int = 2):
    from {neighbour} import SIZE
    TABLES.append(torch.ones(SIZE))
    return ul.Workload(Model(), torch.ones(batch, SIZE))
"""


def _script(folder: Path, name: str, at_import: str = "", at_step: str = "pass") -> str:
    (folder / f"{name}_neighbour.py").write_text(NEIGHBOUR)
    path = folder / f"{name}.py"
    path.write_text(SCRIPT.format(at_import=at_import, at_step=at_step, neighbour=f"{name}_neighbour"))
    return str(path)


@pytest.fixture
def no_modules_left() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.usefixtures("no_modules_left")
def test_a_target_leaves_the_search_path(tmp_path: Path) -> None:
    before = list(sys.path)
    path = _script(tmp_path, "fine", at_import="import fine_neighbour; import sys; sys.path.append('/mine')")
    work = ul.load_target(f"{path}:workload")
    assert sys.path == [*before, "/mine"]  # what the script itself adds stays
    sys.path.remove("/mine")
    assert ul.profile(work, costs="roofline").peak_bytes > 0  # its factory imports a neighbour
    assert sys.path == before
    tables = sys.modules["ullage_target_fine"].TABLES
    assert tables == []
    ul.measure(work, steps=1)
    assert sys.path == before


@pytest.mark.usefixtures("no_modules_left")
@pytest.mark.parametrize(
    "at_import", ["raise ValueError('no')", "import not_there", "not python", "raise SystemExit(3)"]
)
def test_a_target_that_fails_leaves_it_too(at_import: str, tmp_path: Path) -> None:
    before = list(sys.path)
    good = ul.load_target(f"{_script(tmp_path, 'twice')}:workload")
    module = sys.modules["ullage_target_twice"]
    (tmp_path / "other").mkdir()
    with pytest.raises(ul.WorkloadError):
        ul.load_target(f"{_script(tmp_path / 'other', 'twice', at_import)}:workload")
    assert sys.path == before and sys.modules["ullage_target_twice"] is module
    for target in ("no.such.module:workload", f"{tmp_path}/twice.py:other", f"{tmp_path}/none.py:workload"):
        with pytest.raises(ul.WorkloadError):
            ul.load_target(target)
    assert sys.path == before
    assert good.build().model is not None


@pytest.mark.usefixtures("no_modules_left")
@pytest.mark.parametrize("verb", ["profile", "fit"])
def test_steps_of_a_command_import_what_lies_beside_its_target(verb: str, tmp_path: Path) -> None:
    before = list(sys.path)
    path = _script(tmp_path, f"late_{verb}", at_step=f"import late_{verb}_neighbour")
    options = ["--budget", "1MiB", "--at-most", "2"] if verb == "fit" else []
    assert run([verb, f"{path}:workload", "--costs", "roofline", *options]) == 0
    assert sys.path == before


def test_fits_leave_no_tensor_either() -> None:
    before = _found()

    def make(batch: int) -> ul.Workload:
        CACHE[f"of {batch}"] = torch.ones(8)
        return ul.Workload(Scaled(lambda: CACHE[f"of {batch}"], fails=False), torch.ones(batch, 8))

    along = lambda batch: ul.Workload.from_factory(functools.partial(make, batch))  # noqa: E731
    assert ul.fit(along, "1MiB", costs="roofline", at_most=2).value == 2
    assert _found() == before
