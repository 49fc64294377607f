"""What loggers are given, by tag; TensorBoard for real, W&B and MLflow as they document their calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import ullage as ul
from tests.monitor.running import Clock, monitor, steps
from ullage.monitor import Logger, MLflowLogger, StepRecord, TensorBoardLogger, WandbLogger
from ullage.monitor._records import TAGS, metrics


class Recording:
    """A logger that remembers."""

    def __init__(self) -> None:
        self.started: Mapping[str, Any] = {}
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.closed = 0

    def start(self, header: Mapping[str, Any]) -> None:
        self.started = header

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.logged.append((step, metrics))

    def close(self) -> None:
        self.closed += 1


def test_steps_are_joined_into_one_call() -> None:
    found = metrics(
        [
            StepRecord(step=1, time=0.0, step_time_s=0.5, wait_s=0.25, samples=4, tokens=16, mfu=0.25, max_allocated_bytes=2**30,
                       alloc_retries=1, ooms=0, recomputed_units=2, recomputed_bytes=2**29, loss=1.0, gpu_joules=6.0, energy_steps=3),
            StepRecord(step=2, time=0.0, failed="OutOfMemoryError", max_allocated_bytes=2**40),
            StepRecord(step=3, time=0.0, step_time_s=1.5, wait_s=0.75, samples=4, tokens=16, mfu=0.75, max_allocated_bytes=2**29,
                       alloc_retries=1, ooms=0, recomputed_units=2, recomputed_bytes=2**29, loss=2.0, cpu_joules=8.0, energy_steps=2,
                       energy_samples=16, nonfinite_loss=True),
        ]
    )  # fmt: skip
    assert found == {
        "memory/max_allocated_gib": 1.0, "perf/step_time_s": 1.0, "perf/wait_s": 0.5, "throughput/device/mfu": 0.5, "recompute/units": 2.0,
        "recompute/gib": 0.5, "train/loss": 1.5, "memory/num_alloc_retries": 2.0, "memory/num_ooms": 0.0, "stability/nonfinite_losses": 1.0,
        "throughput/samples_per_sec": 4.0, "throughput/tokens_per_sec": 16.0, "energy/gpu_joules_per_step": 2.0,
        "energy/cpu_joules_per_step": 4.0, "energy/cpu_joules_per_sample": 0.5, "stability/failed_steps": 1.0,
    }  # fmt: skip
    assert set(found) <= set(TAGS)


def test_a_logger_of_ones_own() -> None:
    clock, logger = Clock(), Recording()
    assert isinstance(logger, Logger)
    with monitor(clock, loggers=[logger], log_every=2, first_step=5) as m:
        steps(m, clock, [1.0, 3.0, 5.0])
        m.summary()
        assert [step for step, _ in logger.logged] == [6]
    assert [(step, found["perf/step_time_s"]) for step, found in logger.logged] == [(6, 2.0), (7, 5.0)]
    assert logger.started["device"] == "cpu" and logger.closed == 1
    assert all(type(v) is float for _, found in logger.logged for v in found.values())


def test_one_that_raises_is_left_out() -> None:
    class Broken(Recording):
        def log(self, metrics: Mapping[str, float], step: int) -> None:
            raise ConnectionError("no route to host")

    clock, whole = Clock(), Recording()
    m = monitor(clock, loggers=[Broken(), whole], log_every=1)
    with pytest.warns(
        ul.UllageWarning, match=r"Broken.log raised ConnectionError: no route to host; the monitor goes on without it"
    ):
        steps(m, clock, [2.0])
    steps(m, clock, [2.0])
    m.close()
    assert len(whole.logged) == 2 and whole.closed == 1


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    clock = Clock()
    with SummaryWriter(str(tmp_path / "theirs")) as theirs:
        loggers = [TensorBoardLogger(tmp_path / "ours"), TensorBoardLogger(theirs)]
        with monitor(clock, loggers=loggers, log_every=1, samples_per_step=2) as m:
            steps(m, clock, [0.5, 0.25])
        theirs.add_scalar("still/open", 1.0, 0)
    for folder in ("ours", "theirs"):
        events = EventAccumulator(str(tmp_path / folder)).Reload()
        assert [(e.step, e.value) for e in events.Scalars("throughput/samples_per_sec")] == [(0, 4.0), (1, 8.0)]
        assert set(events.Tags()["scalars"]) - {"still/open"} <= set(TAGS)
    with pytest.raises(ul.ArgumentError, match="writer: expected a SummaryWriter or a folder, got int"):
        TensorBoardLogger(3)


class Run:
    """What of a W&B run is called: `define_metric`, `config.update`, `log`, `finish`."""

    def __init__(self) -> None:
        self.defined: dict[str, str | None] = {}
        self.configured: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.finished = 0
        self.config = SimpleNamespace(update=self._update)

    def _update(self, d: dict[str, Any], allow_val_change: bool | None = None) -> None:
        assert allow_val_change
        self.configured |= d

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.defined[name] = step_metric

    def log(self, data: dict[str, Any]) -> None:
        self.logged.append(data)

    def finish(self) -> None:
        self.finished += 1


def test_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, theirs, ours = Clock(), Run(), Run()
    package: Any = ModuleType("wandb")
    package.init = lambda **given: ours if given == {"project": "p", "mode": "offline"} else None
    monkeypatch.setitem(sys.modules, "wandb", package)
    with monitor(
        clock, loggers=[WandbLogger(theirs), WandbLogger(project="p", mode="offline")], log_every=1, first_step=3
    ) as m:
        steps(m, clock, [2.0])
    for run in (theirs, ours):
        assert run.logged[0]["trainer/global_step"] == 3 and run.logged[0]["perf/step_time_s"] == 2.0
        assert run.defined == {"trainer/global_step": None, **dict.fromkeys(TAGS, "trainer/global_step")}
        assert run.configured["ullage"]["device"] == "cpu"
    assert (theirs.finished, ours.finished) == (0, 1)
    with pytest.raises(ul.ArgumentError, match="run: project is for a new run"):
        WandbLogger(theirs, project="p")
    with pytest.raises(ul.ArgumentError, match="run: expected what wandb.init returned, got int"):
        WandbLogger(3)


class Client:
    """What of `mlflow.MlflowClient` is called."""

    made: list[Client] = []

    def __init__(self, tracking_uri: str | None = None) -> None:
        self.uri, self.tags, self.logged, self.ended = tracking_uri, dict[str, str](), list[Any](), list[str]()
        Client.made.append(self)

    def create_run(self, experiment_id: str) -> Any:
        assert experiment_id == "0"
        return SimpleNamespace(info=SimpleNamespace(run_id="new"))

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self.tags[f"{run_id}:{key}"] = value

    def log_batch(self, run_id: str, metrics: Any = ()) -> None:
        self.logged += [(run_id, *m) for m in metrics]

    def set_terminated(self, run_id: str) -> None:
        self.ended.append(run_id)


@pytest.mark.parametrize(
    "active, given, run_id, ended", [(None, None, "new", ["new"]), ("on", None, "on", []), ("on", "mine", "mine", [])]
)
def test_mlflow(
    monkeypatch: pytest.MonkeyPatch, active: str | None, given: str | None, run_id: str, ended: list[str]
) -> None:
    package: Any = ModuleType("mlflow")
    package.MlflowClient = Client
    package.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id=active)) if active else None
    entities: Any = ModuleType("mlflow.entities")
    entities.Metric = lambda key, value, timestamp, step: (key, value, step)
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    clock = Clock()
    with monitor(clock, loggers=[MLflowLogger(given, tracking_uri="file:x")], log_every=1) as m:
        steps(m, clock, [2.0])
    client = Client.made.pop()
    assert client.uri == "file:x" and client.ended == ended
    assert (run_id, "perf/step_time_s", 2.0, 0) in client.logged
    assert client.tags[f"{run_id}:ullage.device"] == "cpu"


def test_tags_are_names_that_mlflow_takes() -> None:
    assert all(set(tag) <= set("abcdefghijklmnopqrstuvwxyz0123456789_/") for tag in TAGS)


@pytest.mark.parametrize(
    "package, make, extra",
    [
        ("tensorboard", lambda: TensorBoardLogger("x"), "tensorboard"),
        ("wandb", WandbLogger, "wandb"),
        ("mlflow", MLflowLogger, "mlflow"),
    ],
)
def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch, package: str, make: Any, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(
        ul.ArgumentError, match=rf"loggers: {package} is not installed: pip install 'ullage\[{extra}\]'"
    ):
        make()


def test_it_takes_part_in_no_graph() -> None:
    """A loss that is given does not keep its graph alive."""
    clock = Clock()
    m = monitor(clock)
    x = torch.ones(3, requires_grad=True)
    with m.step() as s:
        loss = (x * 2).sum()
        s.loss(loss)
    assert all(
        not isinstance(cell.cell_contents, torch.Tensor)
        for run in m._pending
        for f in run.losses
        for cell in f.__closure__ or ()
    )
