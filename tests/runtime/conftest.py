"""Every test starts with nothing remembered, and leaves nothing in force."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.runtime.steps import assert_clean
from ullage.runtime.forward import _checkpoint


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    _checkpoint._sites.clear()  # a function made anew by each test is one function to the runtime
    yield
    assert_clean()
