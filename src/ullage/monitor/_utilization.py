"""Compare a step's FLOPs with a device's best rate: MFU and HFU."""

from __future__ import annotations

from typing import Any

from ullage._errors import ArgumentError
from ullage.cost import devices, find_device
from ullage.monitor._flops import OpCounter

# What `torch.cuda.get_device_name` says of devices of the table. Variants with other rates (PCIe, laptops) are not there.
_NAMES = {
    "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100-80gb", "NVIDIA A100-SXM4-80GB": "a100-80gb", "NVIDIA A100 80GB PCIe": "a100-80gb",
    "NVIDIA A100-SXM4-40GB": "a100-40gb", "NVIDIA A100-PCIE-40GB": "a100-40gb", "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx-4090-24gb",
    "NVIDIA GeForce RTX 3090": "rtx-3090-24gb", "Tesla V100-SXM2-32GB": "v100-32gb", "Tesla T4": "t4-16gb",
}  # fmt: skip


class Peak:
    """The most FLOP/s a device can do: one number, or one per dtype.

    Args:
        given: FLOP/s, the name of a device of the table, or None: that of the device the model is on.
        device_name: what the system calls that one; "" on a CPU.

    Raises:
        ArgumentError: `given` is no positive number.
        DeviceError: no such device.
    """

    def __init__(self, given: float | str | None, device_name: str) -> None:
        self.number: float | None = None
        self.rates: dict[str, float] = {}
        self.why = ""
        if isinstance(given, str):
            self.rates = find_device(given).flops
        elif given is not None:
            if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < float("inf"):
                raise ArgumentError(
                    f"peak_flops={given!r}: expected FLOP/s above zero, or the name of a device of `ullage devices`"
                )
            self.number = float(given)
        elif device_name in _NAMES:
            self.rates = devices()[_NAMES[device_name]].flops
        else:
            what = repr(device_name) if device_name else "this processor"
            self.why = f"the peak FLOP/s of {what} are not known; pass peak_flops="

    def seconds(self, flops: dict[str, int]) -> float | str:
        """The least seconds for these FLOPs by name of rate, or why that is not known."""
        if self.why:
            return self.why
        if self.number is not None:
            return sum(flops.values()) / self.number
        missing = next((name for name in flops if name not in self.rates), None)
        if missing is not None:
            return f"the device table has no rate for {missing}; pass peak_flops="
        return sum(n / self.rates[name] for name, n in flops.items())


Counters = tuple[int, int, int]  # replays, skipped ops, stale logs of a step


class Utilization:
    """Share of the device's best rate that steps reach, from one step whose ops were counted or from FLOPs as given.

    Args:
        peak: of the device.
        flops_per_step: the model's, as given, or None.
        why_not: why no step is counted, or "".
    """

    def __init__(self, peak: Peak, flops_per_step: float | None, why_not: str) -> None:
        self.peak, self.given, self.wanted = peak, flops_per_step, not why_not
        self.not_available: dict[str, str] = {}  # not told yet
        self.model_flops: int | None = None
        self.replay_flops: int | None = None
        self._step: int | None = None  # the counted one
        self._key: Any = None
        self._counters: Counters | None = None
        self._replays = (0, 0)  # ops, bytes
        self._seconds: float | None = None  # the least for the model's FLOPs
        self._with_replays: float | None = None
        why = why_not if flops_per_step is None or peak.number is None else ""
        if peak.why or why:
            self.not_available["MFU"] = peak.why or why

    def take(self, counter: OpCounter, step: int, key: Any, counters: Counters) -> None:
        """A step of this number went well and was counted; `key`: what its FLOPs depend on, `counters`: what its replays ran."""
        self.wanted = False
        self._step, self._key, self._counters = step, key, counters
        self._replays = counter.replay_ops, counter.replay_bytes
        why = ""
        if counter.unknown:
            why = f"no formula gives the FLOPs of {', '.join(counter.unknown)}; pass flops_per_step="
        elif not counter.flops:
            why = "no op with FLOPs was seen in the counted step; pass flops_per_step="
        else:
            self.model_flops, self.replay_flops = sum(counter.flops.values()), sum(counter.again.values())
        least = why or self.peak.seconds(counter.flops)
        if isinstance(least, str):
            if self.given is None or self.peak.number is None:
                self.not_available.setdefault("MFU", least)
            return
        self._seconds = least
        again = self.peak.seconds(counter.again)
        self._with_replays = None if isinstance(again, str) else least + again

    def of(
        self, seconds: float, flops: float | None, step: int, key: Any, counters: Counters
    ) -> tuple[float | None, float | None]:
        """(MFU, HFU) of a step of this many seconds; None: not known."""
        flops = flops if flops is not None else self.given
        if not seconds:
            return None, None
        if flops is not None:
            if self.peak.number is not None:
                return flops / self.peak.number / seconds, None
            if self._seconds is None or not self.model_flops:  # what dtype they are of is not known
                return None, None
            return flops / self.model_flops * self._seconds / seconds, None
        if self._seconds is None or not self._knows(step):
            return None, None
        if key != self._key:
            self.not_available["MFU of some steps"] = (
                "they differ from the counted step in samples or tokens; pass flops= to them"
            )
            return None, None
        hfu = self._with_replays / seconds if self._with_replays is not None and counters == self._counters else None
        return self._seconds / seconds, hfu

    def _knows(self, step: int) -> bool:
        """Is it the counted step or a later one? What came before is not judged by it: first steps learn."""
        return self._step is not None and step >= self._step

    def replays(self, step: int, counters: Counters) -> tuple[int | None, int | None]:
        """(ops that a step's replays ran, bytes they made); None: it replayed otherwise than the counted step."""
        if not counters[0]:
            return 0, 0
        return self._replays if counters == self._counters and self._knows(step) else (None, None)

    def news(self) -> dict[str, str]:
        """Facts found not to be available since the last call."""
        found, self.not_available = self.not_available, {}
        return found
