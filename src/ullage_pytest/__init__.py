"""A pytest plugin: the fixture `ullage_check`. It is loaded with every pytest run, so it imports nothing before it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--ullage-update`."""
    group = parser.getgroup("ullage")
    group.addoption("--ullage-update", action="store_true", help="write the baselines of ullage_check anew")


@pytest.fixture
def ullage_check(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """`ullage_check(work, max_peak=..., against=..., ...)`: as `ullage.check`, but the test fails where the gate does.

    `work` may be a target as the command takes it. A baseline's path is relative to the test's folder, as a file target is to
    the one that pytest was started in. Returns the `ullage.CheckResult`.
    """

    def check(work: Any, *, against: str | Path | None = None, **more: Any) -> Any:
        import ullage as ul

        path = request.path.parent / against if against is not None else None
        update = path is not None and request.config.getoption("--ullage-update")
        if isinstance(work, str):
            work = ul.load_target(work)
        gate = ul.check(work, against=None if update else path, **more)
        if not gate.ok:
            pytest.fail(str(gate), pytrace=False)
        if update and path is not None:
            gate.now.save(path)
        return gate

    return check
