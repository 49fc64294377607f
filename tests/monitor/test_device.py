"""Events and allocator statistics of CUDA: on a device that is made up, and on a real one where there is one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import ullage as ul
from tests.monitor.running import Clock, SlowProbe
from ullage.monitor import _device
from ullage.monitor._device import CudaProbe, ProcessMemory


class Gpu:
    """What `torch.cuda` says of a device whose allocator and stream a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.reached = 0.0  # ms, on the stream
        self.allocated = self.peak = self.reserved = self.retries = self.ooms = 0
        self.syncs = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Any) -> None:
                assert stream == "stream 3"
                self.at = gpu.now

            def query(self) -> bool:
                return self.at <= gpu.reached

            def synchronize(self) -> None:
                gpu.syncs += 1
                gpu.reached = max(gpu.reached, self.at)

            def elapsed_time(self, other: Event) -> float:
                assert self.query() and other.query()
                return other.at - self.at

        for name, value in {
            "Event": Event,
            "current_stream": lambda index: f"stream {index}",
            "get_device_name": lambda index: "NVIDIA H200",
            "memory_stats_as_nested_dict": self.stats,
            "reset_peak_memory_stats": self.reset,
            "synchronize": self.refuse,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(_device, "_open_steps", {})

    def stats(self, index: int) -> dict[str, Any]:
        assert index == 3
        return {
            "allocated_bytes": {"all": {"peak": self.peak}},
            "reserved_bytes": {"all": {"peak": self.reserved}},
            "num_alloc_retries": self.retries,
            "num_ooms": self.ooms,
        }

    def reset(self, index: int) -> None:
        self.peak = self.allocated

    def refuse(self, *_: Any) -> None:
        raise AssertionError("the device was waited for")

    def allocate(self, nbytes: int) -> None:
        self.allocated += nbytes
        self.peak = max(self.peak, self.allocated)
        self.reserved = max(self.reserved, self.peak)


def watched(monkeypatch: pytest.MonkeyPatch, **given: Any) -> ul.Monitor:
    monkeypatch.setattr("ullage.monitor._monitor.device_of", lambda _: (torch.device("cuda", 3), {}))
    monkeypatch.setattr(
        "ullage.monitor._energy.NvmlGpu",
        lambda index: SimpleNamespace(name="gpu", since=lambda: 1.0, close=lambda: None),
    )
    return ul.Monitor(nn.Linear(1, 1), warmup=0, count_ops=False, **given)


def test_events_and_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    m = watched(monkeypatch, samples_per_step=6)
    assert (m.header.device, m.header.device_name) == ("cuda:3", "NVIDIA H200")
    for size in (100, 40):
        with m.step():
            gpu.allocate(size)
            gpu.allocate(-size)
            gpu.now += 2.0
            gpu.retries += 1
        gpu.now += 1.0
    gpu.ooms += 4  # between steps: not a step's
    gpu.reached = 2.5
    assert m.summary().steps == 1 and gpu.syncs == 0  # the second is not reached
    m.close()
    assert gpu.syncs == 1
    s = m.summary()
    assert [(r.max_allocated_bytes, r.max_reserved_bytes, r.alloc_retries, r.ooms) for r in m._tally.ring] == [
        (100, 100, 1, 0),
        (40, 100, 1, 0),
    ]
    assert (s.step_seconds, s.samples_per_second, s.peak_allocated_bytes, s.peak_reserved_bytes) == (
        0.002,
        3000.0,
        100,
        100,
    )
    assert (s.alloc_retries, s.ooms) == (2, 0)
    assert "peak allocated" not in s.not_available


def test_monitors_at_once_do_not_take_each_others_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    a, b = watched(monkeypatch), watched(monkeypatch)
    with a.step():
        gpu.allocate(100)
        gpu.allocate(-90)
        with b.step():  # resets the allocator's peaks
            gpu.allocate(20)
        gpu.allocate(-20)
    for m in (a, b):
        m.close()
    assert [m.summary().peak_allocated_bytes for m in (a, b)] == [100, 30]
    assert _device._open_steps == {3: []}


def test_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    m = watched(monkeypatch)
    with pytest.raises(torch.cuda.OutOfMemoryError), m.step():
        gpu.allocate(70)
        gpu.ooms += 1
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")
    s = m.summary()
    assert (s.failed_steps, s.ooms, s.peak_allocated_bytes) == (1, 1, 70)
    assert _device._open_steps == {3: []}


def test_a_device_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    m = watched(monkeypatch)
    with pytest.raises(ValueError, match="of the user"), m:
        with m.step():
            gpu.now += 1.0
        with m.step():

            def lost(*_: Any) -> Any:
                raise RuntimeError("CUDA error: device-side assert triggered")

            for name in ("query", "synchronize", "elapsed_time"):
                monkeypatch.setattr(torch.cuda.Event, name, lost)
            monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lost)
            raise ValueError("of the user")
    assert m.summary().failed_steps == 2 and m.summary().steps == 0


def test_rates_by_the_name_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpu(monkeypatch)
    assert "MFU" in watched(monkeypatch, flops_per_step=1e9).header.not_available  # its dtype is not known
    assert "MFU" not in watched(monkeypatch, flops_per_step=1e9, peak_flops=1e12).header.not_available


def test_the_other_device_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Split(nn.Module):
        def parameters(self, recurse: bool = True) -> Any:
            return iter([SimpleNamespace(device=torch.device(d)) for d in ("cpu", "cuda:0", "cuda:1")])

    from ullage.monitor._setup import device_of

    device, more = device_of(Split())
    assert device == torch.device("cuda:0") and more == {"memory and energy of cuda:1": "one device is watched, cuda:0"}


def test_resident_memory_is_the_processes() -> None:
    memory = ProcessMemory()
    now, most = memory.read()
    said = {
        line.split(":")[0]: line.split()[1]
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("Vm")
    }
    assert now is not None and abs(now - int(said["VmRSS"]) * 1024) < 2**22 and most >= now
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    memory.close()
    memory.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1


def test_the_slow_probe_of_the_tests_is_a_probe() -> None:
    probe = SlowProbe(Clock())
    step = probe.begin()
    probe.end(step)
    assert not probe.ready(step)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model = nn.Linear(1024, 1024, device="cuda")
    x = torch.ones(4096, 1024, device="cuda")
    with ul.Monitor(model, samples_per_step=4096) as m:
        assert isinstance(m._probe, CudaProbe)
        for k in range(6):
            with m.step() as step:
                loss = model(x).square().mean() / (k != 4)
                loss.backward()
                step.loss(loss)
    s = m.summary()
    assert s.steps == 6 and s.step_seconds is not None and 0 < s.step_seconds < 1
    assert s.nonfinite_losses == 1
    assert s.peak_allocated_bytes is not None and s.peak_allocated_bytes > x.nbytes
    assert s.flops_per_step == 2 * 2 * 4096 * 1024 * 1024
