"""The device table: a data file with its sources, never code."""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import re

import msgspec

from ullage._errors import DeviceError


class Device(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One device: memory in bytes, rates in FLOP/s, bandwidths in bytes/s, times in seconds.

    `context_bytes` of the memory are a process's CUDA context's, not its tensors'.
    """

    title: str
    kind: str
    memory_bytes: int
    memory_bandwidth_bytes_per_s: float
    flops: dict[str, float]
    host_link_bytes_per_s: float
    launch_seconds: float
    context_bytes: int
    blas_workspace_bytes: int
    margin: float
    sources: list[str]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    devices: dict[str, Device]


@functools.cache
def devices() -> dict[str, Device]:
    """Return every device of the table, by name.

    Memory is in bytes, rates in FLOP/s by dtype, bandwidths in bytes/s, times in seconds. The table is read once.
    """
    text = importlib.resources.files("ullage.cost").joinpath("devices.json").read_bytes()
    return msgspec.json.decode(text, type=_Table).devices


def find_device(name: str) -> Device:
    """The device of this name; see `device_name`."""
    return devices()[device_name(name)]


def device_name(name: str) -> str:
    """The name in the table that a name means: "H100", "nvidia a100 40gb" and "rtx4090" do; of two sizes of memory, the larger.

    Raises:
        DeviceError: no such device; the message lists the names.
    """
    table = devices()
    plain = re.sub(r"(?<=rtx)(?=\d)", "-", re.sub(r"[\s_]+", "-", str(name).strip().lower()))
    if plain in table:
        return plain
    asked = set(plain.split("-")) - _VENDORS
    meant = [known for known in table if _model(known) <= asked <= set(known.split("-"))]
    if meant:
        return max(meant, key=lambda known: table[known].memory_bytes)
    near = difflib.get_close_matches(plain, table, 3, 0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    raise DeviceError(f"device={name!r}: not in the table; {hint}known: {', '.join(sorted(table))}")


_VENDORS = {"nvidia", "amd", "geforce", "instinct", "tesla", "sxm", "pcie"}


def _model(known: str) -> set[str]:
    """The words of a name that tell the model: not its memory, nor its series."""
    return {word for word in known.split("-") if word != "rtx" and not re.fullmatch(r"\d+gb", word)}
