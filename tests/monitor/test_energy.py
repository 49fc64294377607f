"""Joules from counters that a test turns: exact, over windows, around their end; and why there are none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import ullage as ul
from tests.monitor.running import Clock, monitor, steps
from ullage.monitor import _energy
from ullage.monitor._energy import Energy

RANGE = 262_143_328_850  # microjoules: that of many sockets


class Sockets:
    """A powercap folder."""

    def __init__(self, root: Path, sockets: int = 2, extent: int = RANGE) -> None:
        self.root = root
        for k in range(sockets):
            self._zone(f"intel-rapl:{k}", f"package-{k}", extent)
            self._zone(f"intel-rapl:{k}:0", "dram", extent)  # a part: not added
        self._zone("intel-rapl:9", "psys", extent)  # the whole board: not added

    def _zone(self, folder: str, name: str, extent: int) -> None:
        (self.root / folder).mkdir()
        (self.root / folder / "name").write_text(name + "\n")
        (self.root / folder / "max_energy_range_uj").write_text(f"{extent}\n")
        (self.root / folder / "energy_uj").write_text("0\n")

    def set(self, *joules: float) -> None:
        for k, j in enumerate(joules):
            (self.root / f"intel-rapl:{k}" / "energy_uj").write_text(f"{int(j * 1e6)}\n")


@pytest.fixture
def sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sockets:
    monkeypatch.setattr(_energy, "POWERCAP", tmp_path)
    return Sockets(tmp_path)


def test_joules_per_step_and_sample(sockets: Sockets) -> None:
    clock = Clock()
    sockets.set(5000, 6000)
    m = monitor(clock, samples_per_step=8)
    assert m.header.energy == ["package-0", "package-1"] and "processor energy" not in m.header.not_available
    sockets.set(5010, 6010)  # before the first step: not counted
    steps(m, clock, [0.25] * 3)
    with m.step():
        sockets.set(5110, 6030)
        clock.now += 0.25
    steps(m, clock, [0.5])
    assert [(r.cpu_joules, r.gpu_joules, r.energy_steps, r.energy_samples) for r in (m.summary() and m._tally.ring)] == [
        *[(None, None, None, None)] * 3, (120.0, None, 4, 32), (None, None, None, None),
    ]  # fmt: skip
    s = m.summary()
    assert (s.cpu_joules_per_step, s.cpu_joules_per_sample, s.gpu_joules_per_step) == (30.0, 3.75, None)
    assert "  processor energy         30 J per step, 3.75 J per sample" in str(m).splitlines()


def test_a_counter_that_comes_around(sockets: Sockets) -> None:
    clock = Clock()
    sockets.set(RANGE / 1e6 - 3, 0)
    m = monitor(clock)
    with m.step():
        sockets.set(2, 0)
        clock.now += 2
    assert m.summary().cpu_joules_per_step == pytest.approx(5, abs=1e-5)


def test_windows_in_which_it_may_have_come_around_twice(sockets: Sockets) -> None:
    clock = Clock()
    m = monitor(clock)
    with m.step():
        sockets.set(2, 0)
        clock.now += 300  # 262 s at 1000 W
    assert m.summary().cpu_joules_per_step is None
    with m.step():
        sockets.set(6, 0)
        clock.now += 2
    assert m.summary().cpu_joules_per_step == 4.0


def test_samples_that_are_not_known(sockets: Sockets) -> None:
    clock = Clock()
    m = monitor(clock)
    steps(m, clock, [0.5], samples=3)
    with m.step():
        sockets.set(2, 2)
        clock.now += 1
    s = m.summary()
    assert (s.cpu_joules_per_step, s.cpu_joules_per_sample) == (2.0, None)


def test_files_are_closed(sockets: Sockets) -> None:
    energy = Energy(None)
    assert len(energy.names) == 2
    energy.close()
    assert energy.end(1, 1e9) is None


def test_a_counter_that_fails_is_said_and_training_goes_on(sockets: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    m = monitor(clock)
    steps(m, clock, [2.0])

    def gone(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(_energy.RaplPackage, "_now", gone)
    steps(m, clock, [2.0, 2.0])
    s = m.summary()
    assert s.steps == 3 and s.not_available["energy"] == "a counter failed: OSError: [Errno 5] Input/output error"


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda root: None, "this machine shows no energy counter of its processor (RAPL) under {root}"),
        (
            lambda root: (Sockets(root), (root / "intel-rapl:1" / "energy_uj").unlink()),
            "the processor's energy counter can't be read: ",
        ),
        (
            lambda root: (Sockets(root), (root / "intel-rapl:0" / "energy_uj").write_text("")),
            "the processor's energy counter can't be read: ",
        ),
    ],
)
def test_no_counters(tmp_path: Path, spoil: Any, why: str) -> None:
    spoil(tmp_path)
    energy = Energy(None, tmp_path)
    assert energy.names == [] and energy.not_available["processor energy"].startswith(why.format(root=tmp_path))


def test_counters_for_root_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Sockets(tmp_path)

    def refuse(path: Any, *_: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(_energy.os, "open", refuse)
    why = Energy(None, tmp_path).not_available["processor energy"]
    assert why == f"{tmp_path}/intel-rapl:0/energy_uj is readable by root only"


class Nvml(ModuleType):
    """`pynvml` with one GPU."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.millijoules, self.open, self.works = 7_000, 0, True

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        if not self.works:
            raise Nvml.NVMLError("Not Supported")
        return self.millijoules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="1234"))
    return found


def test_a_gpu(nvml: Nvml, tmp_path: Path) -> None:
    energy = Energy(2, tmp_path)
    assert energy.names == ["cuda:2"] and list(energy.not_available) == ["processor energy"]
    energy.begin(0.0)
    nvml.millijoules += 2_500
    assert energy.end(4, 0.5) is None
    assert energy.end(4, 1.0) == _energy.Spent(2.5, None, 2, 8)
    nvml.works = False
    assert energy.end(4, 2.0) is None and energy.failed == "a counter failed: NVMLError: Not Supported"
    assert nvml.open == 0 and energy.end(4, 9.0) is None


def test_a_gpu_without_a_counter(nvml: Nvml, tmp_path: Path) -> None:
    nvml.works = False
    assert Energy(0, tmp_path).not_available["GPU energy"] == "NVML gives no energy of this GPU: Not Supported"
    assert nvml.open == 0


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert (
        Energy(0, tmp_path).not_available["GPU energy"] == "nvidia-ml-py is not installed: pip install 'ullage[energy]'"
    )


def test_the_real_pynvml_has_what_is_called() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs the extra energy")
    for name in (
        "nvmlInit",
        "nvmlShutdown",
        "nvmlDeviceGetHandleByUUID",
        "nvmlDeviceGetTotalEnergyConsumption",
        "NVMLError",
    ):
        assert hasattr(pynvml, name)


def test_a_monitor_without_meters_says_so() -> None:
    m = ul.Monitor(torch.nn.Linear(1, 1))
    if not m.header.energy:
        assert m.header.not_available["processor energy"]
