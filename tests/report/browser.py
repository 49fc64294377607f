"""A Chromium that tests drive. Where there is none they are skipped, but for CI: with ULLAGE_NEEDS_BROWSER=1 they fail."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_MISSING = {
    "a page needs plotly, of the extra `report`": importlib.util.find_spec("plotly") is None,
    "playwright is not installed": importlib.util.find_spec("playwright") is None,
    "there is no Chromium or Chrome here": CHROMIUM is None,
}
_MAY_SKIP = os.environ.get("ULLAGE_NEEDS_BROWSER") != "1"
NEEDS_BROWSER = [pytest.mark.skipif(missing and _MAY_SKIP, reason=reason) for reason, missing in _MISSING.items()]


def needs_browser(test: Any) -> Any:
    """Mark one test, where `pytestmark` would mark a whole file."""
    for mark in NEEDS_BROWSER:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    missing = [reason for reason, so in _MISSING.items() if so]
    assert not missing, "; ".join(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Opened:
    """A page of a browser that has what it complained of, and what it asked for."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        self.page.on("console", lambda m: self.said.append(f"{m.type}: {m.text}"))
        self.page.on("pageerror", lambda e: self.said.append(str(e)))
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".plot .main-svg")

    def js(self, code: str) -> Any:
        return self.page.evaluate(code)

    def check(self) -> None:
        assert not self.said
        assert self.asked and all(u.startswith(("file:", "data:", "blob:")) for u in self.asked)
