"""Open the built site from its files, as a reader without a network does: pages load nothing else, and search finds.

python scripts/check_site.py        after `mkdocs build`; skipped where there is no Chromium, but for CI
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

SITE = Path(__file__).resolve().parent.parent / "build/site"
PAGES = ("index.html", "howto/infeasible.html", "reference/plan.html", "errors.html")
WAIT_MS = 15_000
READY = "() => /type/i.test(document.querySelector('.md-search-result__meta').textContent)"  # not "Initializing"


def problems_of(browser: str) -> list[str]:
    """Return a sentence for each thing that is wrong with the site in this browser."""
    from playwright.sync_api import TimeoutError, sync_playwright

    problems: list[str] = []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page()
        page.set_default_timeout(WAIT_MS)
        page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
        page.on(
            "request",
            lambda asked: (
                asked.url.startswith(("file:", "data:")) or problems.append(f"{page.url}: asks for {asked.url}")
            ),
        )
        for name in PAGES:
            page.goto((SITE / name).as_uri())
            try:
                page.focus("input.md-search__input")  # the search reads its index now
                page.wait_for_function(READY)
                page.type("input.md-search__input", "infeasible")
                page.wait_for_selector(".md-search-result__item")
            except TimeoutError:
                problems.append(f"{name}: the search finds nothing")
        chromium.close()
    return problems


def main() -> int:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("the site was not opened: no Chromium or Chrome")
        return os.environ.get("ULLAGE_NEEDS_BROWSER") == "1"
    problems = problems_of(browser)
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
