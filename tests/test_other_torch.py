"""Which versions of torch CI tries."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "other_torch")


def _script() -> Any:
    loader = importlib.machinery.SourceFileLoader("other_torch", SCRIPT)
    spec = importlib.util.spec_from_loader("other_torch", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ("2.15.0, 2.13.0+cpu, 2.13.0, 2.11.1, 2.11.0, 2.10.0", {"2.11.1": "", "2.15.0": ""}),
        ("2.15.0+cpu, 2.15.0, 2.11.0+cpu, 2.11.0", {"2.11.0": "2.11.0+cpu", "2.15.0": "2.15.0+cpu"}),
        ("2.13.0+cpu", {"2.13.0": "2.13.0+cpu"}),
        ("2.10.0", {}),
        ("", {}),
    ],
)
def test_the_ends_of_what_is_allowed(versions: str, found: dict[str, str]) -> None:
    assert _script().wanted([v.strip() for v in versions.split(",") if v], "2.11") == found
