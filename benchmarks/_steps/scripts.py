"""Code as scripts have it: globals of this and of an imported module, helpers, closures, bound methods, decorators."""

from __future__ import annotations

import contextlib
import functools
import logging
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ullage as ul
from _steps import _shared
from _steps._idiom import adamw, idiom, net, xs, ys
from _steps._shared import criterion, distilled, normalized

logger = logging.getLogger(__name__)
model = net()
teacher = net(seed=5).eval()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
scaler = torch.amp.GradScaler("cpu", enabled=False)
CLASS_WEIGHTS = torch.ones(5)
ARGS = SimpleNamespace(clip=1.0, model=model)
history: list[float] = []
seen = 0


def step(model: nn.Module, batch: Any) -> None:
    x, y = batch
    optimizer.zero_grad()
    F.cross_entropy(model(x), y, weight=CLASS_WEIGHTS).backward()
    optimizer.step()


def compute_loss(output: Tensor, batch: Any) -> Tensor:
    with torch.no_grad():
        target = teacher(batch[0])
    return F.mse_loss(output, target) + F.cross_entropy(output, batch[1])


def update(loss: Tensor) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(ARGS.model.parameters(), ARGS.clip)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)


def with_helpers(model: nn.Module, batch: Any) -> None:
    global seen
    seen += 1
    update(compute_loss(model(batch[0]), batch))


def without_the_argument(_: nn.Module, batch: Any) -> None:
    update(compute_loss(model(batch[0]), batch))


def imported(model: nn.Module, batch: Any) -> None:
    x = normalized(batch[0])
    output = model(x)
    (criterion(output, batch[1]) + distilled(output, x) + _shared.distilled(output, x)).backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = fn(*args, **kwargs)
        logger.debug("%s took %.3f s", fn.__name__, time.perf_counter() - begin)
        return result

    return wrapped


@timed
def decorated(model: nn.Module, batch: Any) -> None:
    step(model, batch)


@torch.enable_grad()
def decorated_by_torch(model: nn.Module, batch: Any) -> None:
    step(model, batch)


def with_scaler(model: nn.Module, batch: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(batch[0]), batch[1])
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def defaults(model: nn.Module, batch: Any, opt: Any = optimizer, weights: Tensor = CLASS_WEIGHTS) -> None:
    F.cross_entropy(model(batch[0]), batch[1], weight=weights).backward()
    opt.step()
    opt.zero_grad()


def pair() -> Any:
    return xs(), ys()


for _name, _step in {
    "a global step called step": step,
    "helpers with a global teacher optimizer and scheduler": with_helpers,
    "a step that uses the global model": without_the_argument,
    "globals of an imported module": imported,
    "a decorated step": decorated,
    "a step decorated by torch": decorated_by_torch,
    "a global scaler": with_scaler,
    "an optimizer and a tensor as default arguments": defaults,
}.items():

    def _make(chosen: Callable[..., Any] = _step) -> ul.Workload:
        return ul.Workload(model, pair(), step=chosen)

    _make.__name__ = _name
    idiom("script")(_make)


@idiom("script")
def a_closure() -> ul.Workload:
    net_, weights = net(), torch.ones(5)
    opt, count = adamw(net_), 0

    def train_step(model: nn.Module, batch: Any) -> None:
        nonlocal count
        count += 1
        F.cross_entropy(model(batch[0]), batch[1], weight=weights).backward()
        opt.step()
        opt.zero_grad()

    return ul.Workload(net_, pair(), step=train_step)


@idiom("script")
def a_partial() -> ul.Workload:
    net_ = net()

    def train_step(model: nn.Module, batch: Any, opt: Any, criterion: Any) -> None:
        criterion(model(batch[0]), batch[1]).backward()
        opt.step()
        opt.zero_grad()

    bound = functools.partial(train_step, opt=adamw(net_), criterion=nn.CrossEntropyLoss())
    return ul.Workload(net_, pair(), step=bound)


class Trainer:
    """As trainers are: model, optimizer, counters, a logger, and a method per step."""

    clip = 1.0
    weights = torch.ones(5)

    def __init__(self) -> None:
        self.model = net()
        self.opt = adamw(self.model)
        self.global_step, self.log = 0, logging.getLogger("trainer")
        self.losses: deque[Tensor] = deque(maxlen=1)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1], weight=self.weights)

    def training_step(self, model: nn.Module, batch: Any) -> None:
        loss = self.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), Trainer.clip)
        self.opt.step()
        self.opt.zero_grad()
        self.losses.append(loss.detach())
        self.global_step += 1
        self.log.debug("step %d", self.global_step)

    def __call__(self, model: nn.Module, batch: Any) -> None:
        self.training_step(model, batch)

    @staticmethod
    def static(model: nn.Module, batch: Any) -> None:
        step(model, batch)


@idiom("script")
def a_bound_method_of_a_trainer() -> ul.Workload:
    trainer = Trainer()
    return ul.Workload(trainer.model, pair(), step=trainer.training_step)


@idiom("script")
def a_callable_trainer() -> ul.Workload:
    trainer = Trainer()
    return ul.Workload(trainer.model, pair(), step=trainer)


@idiom("script")
def a_static_method() -> ul.Workload:
    return ul.Workload(model, pair(), step=Trainer.static)


@idiom("script")
def a_lambda_over_a_trainer() -> ul.Workload:
    trainer = Trainer()
    return ul.Workload(trainer.model, pair(), step=lambda m, b: trainer.training_step(m, b))


class Registry:
    """Everything is an attribute of a class."""

    model = net(seed=9)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)


@idiom("script")
def model_and_optimizer_as_class_attributes() -> ul.Workload:
    def train_step(model: nn.Module, batch: Any) -> None:
        F.cross_entropy(Registry.model(batch[0]), batch[1]).backward()
        Registry.opt.step()
        Registry.opt.zero_grad()

    return ul.Workload(Registry.model, pair(), step=train_step)


@dataclass
class TrainState:
    model: nn.Module
    opt: torch.optim.Optimizer
    step: int = 0
    metrics: dict[str, list[Any]] = field(default_factory=lambda: {"loss": []})


@idiom("script")
def a_dataclass_of_training_state() -> ul.Workload:
    net_ = net()
    state = TrainState(net_, adamw(net_))

    def train_step(model: nn.Module, batch: Any) -> None:
        loss = F.cross_entropy(state.model(batch[0]), batch[1])
        loss.backward()
        state.opt.step()
        state.opt.zero_grad()
        state.step += 1

    return ul.Workload(net_, pair(), step=train_step)


@idiom("script")
def a_step_in_a_context_manager() -> ul.Workload:
    net_ = net()
    opt = adamw(net_)

    @contextlib.contextmanager
    def zeroed() -> Iterator[None]:
        opt.zero_grad()
        yield
        opt.step()

    def train_step(model: nn.Module, batch: Any) -> None:
        with zeroed(), torch.autograd.set_detect_anomaly(False):
            F.cross_entropy(model(batch[0]), batch[1]).backward()

    return ul.Workload(net_, pair(), step=train_step)


class Tracker:
    """Like an experiment tracker: a file, a lock and a thread's event, none of which can be copied."""

    def __init__(self) -> None:
        self.file = tempfile.NamedTemporaryFile("w")  # noqa: SIM115
        self.lock, self.done = threading.Lock(), threading.Event()

    def add(self, **values: Any) -> None:
        with self.lock:
            self.last = values


@idiom("script")
def a_tracker_with_a_file_and_a_lock() -> ul.Workload:
    net_, tracker = net(), Tracker()
    opt = adamw(net_)

    def train_step(model: nn.Module, batch: Any) -> None:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        opt.step()
        opt.zero_grad()
        tracker.add(rate=opt.param_groups[0]["lr"])

    return ul.Workload(net_, pair(), step=train_step)


@idiom("script")
def an_open_file_and_a_lock() -> ul.Workload:
    net_, log, lock = net(), tempfile.TemporaryFile("w"), threading.RLock()  # noqa: SIM115
    opt = adamw(net_)

    def train_step(model: nn.Module, batch: Any) -> None:
        with lock:
            F.cross_entropy(model(batch[0]), batch[1]).backward()
            opt.step()
            opt.zero_grad()
        if log.closed:
            raise OSError("closed")

    return ul.Workload(net_, pair(), step=train_step)


@idiom("script")
def a_model_that_holds_a_logger_and_a_lock() -> ul.Workload:
    net_ = net()
    net_.log, net_.lock = logging.getLogger("model"), threading.Lock()  # type: ignore[assignment]
    return ul.Workload(net_, pair(), loss=lambda o, b: F.cross_entropy(o, b[1]), optimizer=adamw(net_))


@idiom("script")
def a_model_that_holds_an_open_file() -> ul.Workload:
    net_ = net()
    net_.file = tempfile.TemporaryFile("w")  # type: ignore[assignment]  # noqa: SIM115
    return ul.Workload(net_, pair(), loss=lambda o, b: F.cross_entropy(o, b[1]), optimizer=adamw(net_))


@idiom("script")
def a_generator_held_by_a_trainer() -> ul.Workload:
    class Fed(Trainer):
        def __init__(self) -> None:
            super().__init__()
            self.batches = iter([1, 2, 3])

    trainer = Fed()
    return ul.Workload(trainer.model, pair(), step=trainer.training_step)


@idiom("script")
def a_loader_held_by_a_trainer() -> ul.Workload:
    class Fed(Trainer):
        def __init__(self) -> None:
            super().__init__()
            self.loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair()), batch_size=8)
            self.batches = iter(self.loader)
            self.hook = lambda: (x for x in self.batches)
            self.running = (x for x in [1, 2])  # a running generator can't be copied

    trainer = Fed()
    return ul.Workload(trainer.model, pair(), step=trainer.training_step)
