"""What every result file says about where it came from."""

from __future__ import annotations

import os
import platform
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def machine() -> dict[str, object]:
    """Processor, cores, versions and date."""
    cpu = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    packages = {name: _version(name) for name in ("ullage", "torch", "transformers")}
    return {
        "date": str(date.today()),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **packages,
    }


def _version(package: str) -> str | None:
    """Of an installed package; ullage may run from a clone."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of this clone" if package == "ullage" else None
