"""Pages as a browser shows them: nothing fails, nothing is asked of a network, and what they say is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import ullage as ul
from tests.report import pages
from tests.report.browser import NEEDS_BROWSER, Opened
from tests.small import tiny
from ullage.report import StepReport

pytestmark = NEEDS_BROWSER
LIVE = """() => document.getElementById("timeline").data.filter((t) => t.stackgroup).map((t) => t.y)"""
PICTURE = """() => [...document.querySelectorAll("#timeline .scatterlayer path, #tree path")].map((p) => p.getAttribute("d")).join()"""


@pytest.fixture(scope="module")
def overview() -> StepReport:
    work = tiny()
    plan = ul.plan(work, budget="80% of plain", costs="roofline")
    runs = [ul.measure(work, plan, 3), ul.measure(work, None, 3)]
    return ul.report(work, plan, measured=runs, points=2, title="tiny")


@pytest.fixture(scope="module")
def opened(browser: Any, overview: StepReport, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Each test leaves it as it found it: to open it takes a second or two."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    overview.export(path)
    return Opened(browser, path)


def test_the_peak_and_the_units(opened: Opened, overview: StepReport) -> None:
    at = overview.judged.peak
    said = opened.page.locator("#timeline .annotation-text").all_text_contents()
    peak = next(text for text in said if "peak" in text)
    for wanted in (f"{at.live_bytes:,} bytes", at.phase, at.module or "(root)", at.op, at.source):
        assert wanted and wanted in peak
    assert opened.page.locator("#peak-bytes").inner_text() == f"{overview.judged.peak_bytes:,}"
    assert max(sum(n) for n in zip(*opened.js(LIVE), strict=True)) == overview.judged.peak_bytes
    rows = opened.page.locator("#units tbody tr").all()
    assert len(rows) == len(overview.plan.decisions) == 3
    for row, d in zip(rows, overview.plan.decisions, strict=True):
        cells = row.locator("td").all_inner_texts()
        action = d.words if ":" not in d.label else f"{d.words}\n{d.label}"
        assert (cells[0], cells[1], cells[4]) == (d.unit, action, d.reason)
        assert row.locator("td").nth(2).get_attribute("title") == f"{d.bytes_freed} bytes"
    assert overview.frontier is not None
    drawn = opened.js("() => document.getElementById('frontier').data.map((t) => [t.name, t.x])")
    assert drawn[0] == ["plans", [p.peak_bytes for p in overview.frontier.points]]
    assert drawn[2] == ["this plan", [overview.judged.peak_bytes]]
    assert len(drawn[1][1]) == 5
    times = opened.js("() => document.getElementById('times').data.map((t) => t.x.length)")
    assert times == [3, 3]
    opened.check()


def test_the_toggle_changes_the_picture_and_back(opened: Opened, overview: StepReport) -> None:
    planned = opened.js(PICTURE)
    tree = "() => document.getElementById('tree').data[0].values"
    assert opened.js(tree)[0] == overview.judged.peak_bytes < overview.plain.peak_bytes
    opened.page.get_by_role("button", name="Plain", exact=True).click()
    assert opened.js(PICTURE) != planned
    assert opened.js(tree)[0] == overview.plain.peak_bytes
    assert max(sum(n) for n in zip(*opened.js(LIVE), strict=True)) == overview.plain.peak_bytes
    assert f"{overview.plain.peak_bytes:,} bytes" in opened.page.locator("#timeline-said").inner_text()
    opened.page.get_by_role("button", name="Planned", exact=True).click()
    assert opened.js(PICTURE) == planned
    for name in ("First step", "By op"):
        before = opened.js(PICTURE)
        opened.page.get_by_role("button", name=name).click()
        assert opened.js(PICTURE) != before
    assert max(sum(n) for n in zip(*opened.js(LIVE), strict=True)) == overview.judged.first_step_peak_bytes
    for name in ("Later step", "By time"):
        opened.page.get_by_role("button", name=name).click()
    assert opened.js(PICTURE) == planned
    opened.check()


def test_the_keyboard_reaches_everything(opened: Opened) -> None:
    opened.page.reload()  # Tab starts at the top
    opened.page.wait_for_selector(".plot .main-svg")
    opened.js(
        """() => document.querySelectorAll("button, summary, input, a.skip, .scroll").forEach((x, i) => { x.dataset.n = i; })"""
    )
    wanted = opened.js(
        """() => [...document.querySelectorAll("[data-n]")].filter((x) => x.checkVisibility()).map((x) => x.dataset.n)"""
    )
    assert len(wanted) > 20
    reached = []
    for _ in range(len(wanted) + 5):
        opened.page.keyboard.press("Tab")
        reached.append(opened.js("() => document.activeElement.dataset.n ?? null"))
        if len(reached) == 1:
            assert opened.js("() => document.activeElement.className") == "skip"
        outline = opened.js("() => getComputedStyle(document.activeElement).outlineStyle")
        assert reached[-1] is None or outline != "none"
    assert set(wanted) <= set(reached)
    before = opened.js(PICTURE)
    opened.page.get_by_role("button", name="Plain", exact=True).focus()
    opened.page.keyboard.press("Enter")
    assert opened.js(PICTURE) != before
    opened.page.keyboard.press("Shift+Tab")
    opened.page.keyboard.press("Space")
    assert opened.js(PICTURE) == before
    opened.check()


def test_no_button_sends_anything(opened: Opened) -> None:
    buttons = opened.js("""() => [...document.querySelectorAll(".modebar-btn")].map((x) => x.dataset.title)""")
    assert set(buttons) == {"Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"}
    with opened.page.expect_download() as download:
        opened.page.locator("#tree .modebar-btn").first.dispatch_event("click")
    assert Path(download.value.path()).read_bytes().startswith(b"\x89PNG")
    links = opened.js(
        "() => [...document.querySelectorAll('[href], [src], [action]')].map((x) => x.getAttribute('href'))"
    )
    plan = {link for link in links if link is not None and link.startswith("data:application/json;base64,")}
    assert set(links) - plan == {"data:,", "#main"} and len(plan) == 1


def test_the_answer_comes_first_and_the_plan_can_be_saved(opened: Opened, overview: StepReport, tmp_path: Path) -> None:
    answer = opened.page.locator(".lede strong").inner_text()
    assert answer == overview.answer and answer.endswith(" gradients the same bit for bit.")
    facts = opened.page.locator(".facts").inner_text()
    assert all(text in facts for text in ("GPT", "AdamW", "cpu", "yes, "))
    with opened.page.expect_download() as saved:
        opened.page.get_by_role("link", name="Save plan.json").click()
    saved.value.save_as(tmp_path / "plan.json")
    assert ul.Plan.load(tmp_path / "plan.json").digest == overview.plan.digest
    assert (
        opened.page.locator("#use-title ~ .scroll pre").inner_text().splitlines()[1]
        == 'plan = ul.Plan.load("plan.json")'
    )
    assert opened.page.locator("#levers-title ~ ul li").count() == len(overview.plan.bounds.levers) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(scheme: str, opened: Opened) -> None:
    opened.page.emulate_media(color_scheme=scheme)
    opened.page.set_viewport_size({"width": 390, "height": 844})
    opened.page.reload()
    opened.page.wait_for_selector(".plot .main-svg")
    wide = opened.js("() => document.documentElement.scrollWidth")
    seen = opened.js(
        "() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('pre')).color]"
    )
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(color_scheme="light")
    opened.page.reload()
    opened.page.wait_for_selector(".plot .main-svg")
    assert wide == 390
    assert (
        seen
        == {"light": ["rgb(246, 247, 249)", "rgb(27, 31, 36)"], "dark": ["rgb(20, 23, 27)", "rgb(232, 234, 237)"]}[
            scheme
        ]
    )
    opened.check()


def test_tables_sort_and_filter(opened: Opened) -> None:
    first = "() => document.querySelector('#units tbody tr td').textContent"
    head = opened.page.locator("#units th").nth(0)
    head.locator("button").click()
    assert (opened.js(first), head.get_attribute("aria-sort")) == ("blocks.0", "ascending")
    head.locator("button").click()
    assert (opened.js(first), head.get_attribute("aria-sort")) == ("norm", "descending")
    opened.page.locator("#filter").fill("blocks.0")
    assert opened.page.locator("#units tbody tr:visible").all_inner_texts()[0].startswith("blocks.0")
    assert opened.page.locator("#units-said").inner_text() == "1 of 3 rows."
    opened.page.locator("#filter").fill("")
    assert opened.page.locator("#units tbody tr:visible").count() == 3
    head.locator("button").click()
    opened.check()


def test_colours_follow_the_system_and_the_button(opened: Opened) -> None:
    back = "() => getComputedStyle(document.body).backgroundColor"
    ink = "() => document.getElementById('timeline').layout.font.color"
    shades = {}
    for scheme in ("dark", "light"):
        before = opened.js(ink)
        opened.page.emulate_media(color_scheme=scheme)
        # the browser tells the page of it when it draws its next frame
        opened.page.wait_for_function(f"before => ({ink})() !== before", arg=before)
        shades[scheme] = opened.js(back), opened.js(ink)
    assert shades["light"][0] != shades["dark"][0] and shades["light"][1] != shades["dark"][1]
    button = opened.page.locator("#theme")
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Dark", "false")
    button.click()
    assert (button.inner_text(), button.get_attribute("aria-pressed")) == ("Light", "true")
    assert (opened.js(back), opened.js(ink)) == shades["dark"]
    opened.page.reload()
    assert opened.js(back) == shades["dark"][0]  # it is remembered
    button.click()
    assert (opened.js(back), opened.js(ink)) == shades["light"]
    opened.check()


def test_nothing_is_wider_than_the_window(opened: Opened) -> None:
    for width in (400, 768, 1280):
        opened.page.set_viewport_size({"width": width, "height": 900})
        for _ in range(100):  # plotly draws anew a little later
            if opened.js("() => document.getElementById('timeline')._fullLayout.width") < width:
                break
            opened.page.wait_for_timeout(50)
        assert opened.js("() => document.documentElement.scrollWidth") <= width
    opened.check()


@pytest.mark.slow
def test_a_large_model(browser: Any, tmp_path: Path) -> None:
    """Alone shows that 100,000 events are thinned out on a page of less than 10 MB."""
    plain, planned = pages.timeline(scale=64, micro=4), pages.timeline(scale=16, micro=4, digest="x")
    found, path = pages.overview(plain, planned, budget=plain.peak_bytes // 2), tmp_path / "big.html"
    found.export(path)
    assert path.stat().st_size < 10_000_000 and len(plain) == 100_000
    opened = Opened(browser, path)
    assert opened.page.locator("h1").inner_text() == found.title == "made</script><b>"
    assert opened.page.locator(".notes li").inner_text() == "made for a test, <b>not</b> captured"
    assert 0 < opened.page.locator("#units tbody tr").count() < 126  # equal units share a row
    assert max(sum(n) for n in zip(*opened.js(LIVE), strict=True)) == planned.peak_bytes
    assert len(opened.js(LIVE)[0]) <= 1405
    opened.page.get_by_role("button", name="Plain", exact=True).click()
    assert f"{plain.peak_bytes:,} bytes" in " ".join(
        opened.page.locator("#timeline .annotation-text").all_text_contents()
    )
    opened.check()


def test_a_comparison(browser: Any, overview: StepReport, tmp_path: Path) -> None:
    plan, plain = overview.plan, overview.plain
    found, path = ul.compare(plain, plan, overview.measured[0].measurement), tmp_path / "compare.html"
    found.export(path)
    opened = Opened(browser, path)
    bars = opened.js("() => document.getElementById('bars').data.map((t) => t.x)")
    totals = [sum(n) for n in zip(*bars, strict=True)]
    assert totals[::-1] == [s.peak_bytes for s in found.sides]  # the first bar is the lowest
    assert opened.page.locator("#sides tbody tr").count() == 3
    cells = opened.page.locator("table").nth(1).locator("tbody tr")
    assert cells.count() == len(found.by_category)
    assert opened.page.locator("ul.units li").count() >= 1
    rate = opened.page.locator("#sides tr td:nth-child(6)").all_inner_texts()
    assert rate == ["-", "-", f"{overview.measured[0].measurement.samples_per_second:,.1f}"]
    opened.check()
    sides = [found.sides[0], *(msgspec.structs.replace(s, peak_bytes=None) for s in found.sides[2:])]
    msgspec.structs.replace(found, sides=sides).export(path)  # one whose peak is not known, as of a run on a CPU
    opened.page.reload()
    assert opened.page.locator("#sides tbody tr").nth(1).locator("td").nth(2).inner_text() == "-"
    assert opened.js("() => document.getElementById('bars').data[0].y") == ["A"]
    before = opened.js("() => document.getElementById('bars').layout.font.color")
    opened.page.locator("#theme").click()
    assert opened.js("() => document.getElementById('bars').layout.font.color") != before
    opened.check()
