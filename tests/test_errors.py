"""Every error of planning is ours: the user's line, the module, the cause, a remedy; and nothing of ours is left behind."""

from __future__ import annotations

import functools
import queue
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import ullage as ul
from tests.test_left_as_found import everything
from tests.test_threads import _patches
from ullage.measure import _turns

CACHE: dict[int, Tensor] = {}
FEATURES: list[Tensor] = []
LAST: Any = None
MEAN = torch.zeros(8)
TRAINED = torch.ones(8, requires_grad=True)
SPARSE = torch.eye(8).to_sparse()


@functools.lru_cache
def table(n: int) -> Tensor:
    return torch.linspace(0, 1, n)


class Block(nn.Module):
    """Leaves traces wherever a module can, then does what is asked for."""

    seen: dict[str, Tensor] = {}  # noqa: RUF012
    scale = torch.ones(8)

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.l, self.f, self.calls = nn.Linear(8, 8), f, 0

    def forward(self, x: Tensor) -> Tensor:
        global LAST
        if 8 not in CACHE:
            CACHE[8] = torch.ones(8)
        h = self.l(x) + table(8) + CACHE[8] + MEAN * Block.scale
        LAST, Block.last = h, h  # type: ignore[attr-defined]
        Block.seen["h"] = h.detach()
        FEATURES.append(h.detach())
        self.calls += 1
        return self.f(h)


def _work(f: Callable[[Tensor], Tensor]) -> ul.Workload:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Block(f), nn.Linear(8, 8))
    optimizer = torch.optim.Adam(model.parameters())
    return ul.Workload(model, torch.randn(4, 8), loss=lambda o, b: o.square().mean(), optimizer=optimizer)


def _traces(work: ul.Workload) -> Any:
    outside = dict(CACHE), list(FEATURES), LAST, dict(vars(Block)), dict(Block.seen), table.cache_info()[3]
    mine = everything(work.model, work.optimizer, work.batch), dict(vars(type(work.optimizer))), dict(vars(FakeTensor))
    vf = {n: getattr(torch._VF, n) for n in ("lstm", "gru", "_pad_packed_sequence")}
    return outside, mine, vf, _patches(), dict(vars(random)), dict(vars(np.random))


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    table.cache_clear()
    for left in (CACHE, FEATURES, Block.seen):
        left.clear()


def _raises(h: Tensor) -> Tensor:
    raise KeyError("mine")


def _no_kernel(h: Tensor) -> Tensor:
    return torch.ops.ullage_tests.nothing_fake(h)  # type: ignore[no-any-return]


torch.library.define("ullage_tests::nothing_fake", "(Tensor x) -> Tensor")
torch.library.impl("ullage_tests::nothing_fake", "CPU", lambda x: x.clone())


class Outside:
    """What functions of a class load is not copied."""

    @staticmethod
    def trained(h: Tensor) -> Tensor:
        return h * TRAINED

    @staticmethod
    def sparse(h: Tensor) -> Tensor:
        return torch.sparse.mm(SPARSE, h.t()).t()


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a mistake": (
        lambda h: h @ torch.zeros(7, 7),
        "module 1: the step itself raises RuntimeError: .*run it once|run the step once",
    ),
    "an error": (_raises, "module 1: the step itself raises KeyError: 'mine'"),
    "a wrong call": (lambda h: torch.cat(h.shape), "module 1: the step itself raises TypeError"),
    "nested": (
        lambda h: torch.nested.nested_tensor_from_jagged(h, offsets=torch.tensor([0, 1, 4])).sin().values(),
        "nested .jagged. tensors can't be planned.*pad",
    ),
    "no fake kernel": (_no_kernel, "in module 1: ullage_tests.nothing_fake.default has no fake kernel.*register_fake"),
    "trained outside": (lambda h: Outside.trained(h), "requires grad.*make it a parameter of the model"),
    "sparse outside": (lambda h: Outside.sparse(h), r"torch.sparse_coo.*buffer of the model"),
    "sparse inside": (
        lambda h: h.relu().to_sparse().to_dense(),
        r"layout torch.sparse_coo is used.*use a dense tensor",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refusals(kind: str) -> None:
    f, why = REFUSED[kind]
    work = _work(f)
    before = _traces(work)
    for call in (
        lambda: ul.profile(work, costs="roofline"),
        lambda: ul.plan(work, policy="every_block", costs="roofline"),
    ):
        with pytest.raises(ul.CaptureError, match=rf"(?s)^tests/test_errors.py:\d+: .*{why}"):
            call()
        assert _traces(work) == before


def test_a_nested_tensor_is_refused_in_the_same_words_once_torch_keeps_one() -> None:
    torch.nested.nested_tensor_from_jagged(torch.ones(4, 3), offsets=torch.tensor([0, 1, 4])).sin()
    test_refusals("nested")


@pytest.mark.parametrize("factory", [False, True])
def test_a_captured_step_leaves_nothing(factory: bool) -> None:
    work = _work(torch.tanh)
    before = _traces(work)
    ul.plan(
        ul.Workload.from_factory(lambda: _work(torch.tanh)) if factory else work, policy="every_block", costs="roofline"
    )
    assert _traces(work) == before
    work.model(work.batch).sum().backward()


def test_tensors_outside_the_model_count() -> None:
    outside = torch.zeros(1000)
    peak = [ul.profile(_work(f), costs="roofline").peak_bytes for f in (lambda h: h + 1, lambda h: h + outside[0])]
    assert peak[1] - peak[0] >= 4000


def _interrupts(h: Tensor) -> Tensor:
    raise KeyboardInterrupt


def test_what_is_not_an_error_of_the_step_passes() -> None:
    work = _work(_interrupts)
    before = _traces(work)
    with pytest.raises(KeyboardInterrupt):
        ul.profile(work, costs="roofline")
    assert _traces(work) == before

    def stop(line: str) -> None:
        raise StopIteration(line)

    with pytest.raises(StopIteration):
        ul.profile(_work(torch.tanh), costs="roofline", progress=stop)


class Fails:
    when = ""

    @staticmethod
    def now(h: Tensor) -> Tensor:
        if Fails.when == "plain" or (Fails.when == "planned" and ul.is_recomputing()):
            raise ArithmeticError("half")
        return h.tanh()


class Failing(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Fails.now(super().forward(x))


def test_real_steps_that_raise() -> None:
    model = nn.Sequential(*[nn.Sequential(Failing(8, 8), nn.Linear(8, 8)) for _ in range(2)])
    work = ul.Workload(model, torch.randn(4, 8), loss=lambda o, b: o.square().mean())
    plan = ul.plan(work, policy="every_block", costs="roofline")
    Fails.when = "plain"
    try:
        for call, kind in (
            (lambda: ul.measure(work, steps=1), ul.WorkloadError),
            (lambda: ul.verify(work, plan, 1), ul.VerifyError),
        ):
            with pytest.raises(
                kind, match=r"^tests/test_errors.py:\d+: the step itself raises ArithmeticError: half"
            ) as caught:
                call()
            assert isinstance(caught.value.__cause__, ArithmeticError)
        Fails.when = "planned"
        with pytest.raises(ul.VerifyError, match="the planned step raises, and the plain one does not: .*half"):
            ul.verify(work, plan, 1)
    finally:
        Fails.when = ""


def _elsewhere(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(call())
        except BaseException as error:
            found.append(error)

    return threading.Thread(target=run), found


def _meets(how: str) -> None:
    thread, found = _elsewhere(lambda: ul.profile(_work(torch.tanh), costs="roofline"))
    if how == "itself":
        thread.run()
    elif how == "join":
        thread.start()
        thread.join()
    else:
        done = threading.Event()
        threading.Thread(target=lambda: (thread.run(), done.set())).start()
        done.wait()
    if isinstance(found[0], Exception):
        raise found[0]


@pytest.mark.parametrize("how", ["join", "event", "itself"])
def test_a_step_that_waits_for_a_thread_that_plans(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_turns, "PATIENCE_S", 0.5)

    def step(model: nn.Module, batch: Tensor) -> None:
        model(batch).sum().backward()
        _meets(how)

    work = ul.Workload.from_factory(lambda: ul.Workload(nn.Linear(8, 8), torch.ones(4, 8), step=step))
    with pytest.raises(ul.CaptureError, match="move that call out of the step"):
        ul.profile(work, costs="roofline")


# queues: what a captured step adds to lists is taken out again
DRAWN: queue.SimpleQueue[tuple[float, float]] = queue.SimpleQueue()
MINE: queue.SimpleQueue[Any] = queue.SimpleQueue()


def _draws(h: Tensor) -> Tensor:
    MINE.put((random.random(), float(np.random.rand()), random.randint(0, 9), int(np.random.permutation(9)[0])))
    thread = threading.Thread(target=lambda: DRAWN.put((random.random(), float(np.random.rand()))))
    thread.start()
    thread.join()
    return h.tanh()


def test_draws_of_other_threads_do_not_repeat() -> None:
    random.seed(1)
    np.random.seed(1)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        ul.profile(ul.Workload.from_factory(lambda: _work(_draws)), costs="roofline")
    finally:
        stop.set()
        other.join()
    random.seed(1)
    np.random.seed(1)
    drawn = [DRAWN.get() for _ in range(DRAWN.qsize())]
    assert len(drawn) >= 2 and [(random.random(), float(np.random.rand())) for _ in drawn] == drawn
    random.seed(0)
    np.random.seed(0)
    assert MINE.get() == (
        random.random(),
        float(np.random.rand()),
        random.randint(0, 9),
        int(np.random.permutation(9)[0]),
    )
