"""The page in a real browser: no error, hover and switches work, names from outside run nothing and break no layout.

Screenshots stay in pytest's folder of each test, or in $BFM_SCREENSHOTS.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest

from bfm.report.law_fits import sweep_laws
from bfm.report.render import LIBRARY, read_file
from tests.report import planted_laws
from tests.report.planted import compare, large_sweep, page_of, planted_sweep
from tests.report.test_report_page import data_of

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
OPEN_S, MOST_WORK = 2.0, 6.0
NAMES = {
    "image": "<img src=x onerror=window.hit=1>",
    "script": "</script><script>window.hit=1</script>",
    "quotes": "\"'><svg onload=window.hit=1>",
    "link": '<a href="javascript:window.hit=1">here</a><b>bold</b>',
    "folder": "../../../etc/passwd%2e%2e%00",
    "template": "{{ 7 * 7 }}${7*7}%{x}",
    "right-to-left": "\u202e\u0645\u0631\u062d\u0628\u0627 abc \u05e9\u05dc\u05d5\u05dd",
    "long": "t" * 300,
}


@pytest.fixture(scope="module")
def browser():
    # CI runs as root in containers, where Chromium's own sandbox does not start.
    options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
    with sync_api.sync_playwright() as playwright, playwright.chromium.launch(**options) as browser:
        yield browser


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a page's HTML at a size and theme; whatever the console or the network says of it fails the test."""
    said: list[str] = []
    contexts = []

    def opened(html: str, width: int = 1180, theme: str = "light"):
        file = tmp_path / "index.html"
        file.write_text(html, encoding="utf-8")
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
        page.on("request", lambda request: said.append(request.url) if request.url != file.as_uri() else None)
        page.goto(file.as_uri(), wait_until="commit")
        for one in page.locator("figure, section > .scroll:empty").all():
            one.scroll_into_view_if_needed()
        page.locator("section > .scroll:empty, .plot:empty").wait_for(state="detached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert said == []


@pytest.fixture(scope="module")
def share_page() -> str:
    rows = planted_laws.share_rows()
    sweep = planted_sweep(4)
    return page_of(sweep | {"rows": rows}, laws=sweep_laws(rows, "embedder_share"))


def keep(page, tmp_path: Path, name: str) -> None:
    folder = Path(os.environ.get("BFM_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def overflow(page) -> int:
    """Pixels that the page is wider than its window."""
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def resized(page) -> None:
    """Wait until the plots are as wide as their frames; the page's policy forbids to hand it a condition."""
    for _ in range(100):
        if page.evaluate("[...document.querySelectorAll('.plot')].every(p => p._fullLayout.width === p.clientWidth)"):
            return
        page.wait_for_timeout(100)
    raise AssertionError("plots kept their width")


def hovered(page, figure: str, place: int, trace: int = 0) -> str:
    """What plotly says of a point when the mouse is over it."""
    plot = page.locator(f"#{figure} .plot").first
    plot.scroll_into_view_if_needed()
    at = plot.evaluate(
        """(plot, [trace, place]) => { const box = plot.getBoundingClientRect(), layout = plot._fullLayout;
        const found = plot.data[trace];
        return [box.x + layout._size.l + layout.xaxis.d2p(found.x[place]),
                box.y + layout._size.t + layout.yaxis.d2p(found.y[place])]; }""",
        [trace, place],
    )
    page.mouse.move(at[0] + 3, at[1] + 3)
    page.mouse.move(*at)
    shown = page.locator(f"#{figure} .hovertext").first
    shown.wait_for()
    text = shown.text_content()
    page.mouse.move(0, 0)
    shown.wait_for(state="hidden")
    return text


@pytest.mark.parametrize(("width", "theme"), [(1180, "light"), (1180, "dark"), (390, "light")])
def test_the_page_opens_without_an_error_on_any_screen(visit, share_page, tmp_path, width, theme):
    page = visit(share_page, width, theme)
    assert page.locator(".plot .main-svg").count() >= 6
    assert overflow(page) == 0
    keep(page, tmp_path, f"share-{width}-{theme}")


def test_figures_and_lists_are_drawn_when_they_come_near(browser, sweep, tmp_path):
    file = tmp_path / "index.html"
    file.write_text(page_of(sweep))
    page = browser.new_page(viewport={"width": 1180, "height": 600})
    page.goto(file.as_uri())
    drawn, listed = page.locator("#scatter .main-svg"), page.locator("#trials tbody tr")
    page.locator("#frontier .main-svg").first.wait_for()
    assert drawn.count() == listed.count() == 0
    page.locator("#scatter").scroll_into_view_if_needed()
    drawn.first.wait_for()
    page.get_by_role("link", name="Trials").click()
    listed.first.wait_for()
    assert listed.count() == 24
    page.close()
    page = browser.new_page()
    page.goto(file.as_uri())
    page.pdf(path=tmp_path / "page.pdf")
    assert page.locator("#scatter .main-svg").count() > 0, "a print shows all"
    assert page.locator("#trials tbody tr").count() == 24
    page.close()


def test_a_print_is_on_white_with_figures_that_fit(visit, share_page, tmp_path):
    page = visit(share_page, theme="dark")
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.plot svg')].map(s => s.clientWidth))") == 680
    ink = page.evaluate("document.querySelector('.plot .xtick text').style.fill")
    assert sum(map(int, ink.removeprefix("rgb(").removesuffix(")").split(","))) < 330, "dark on white"
    folder = Path(os.environ.get("BFM_SCREENSHOTS") or tmp_path)
    assert page.pdf(path=folder / "share.pdf", prefer_css_page_size=True).startswith(b"%PDF")


def test_a_point_says_who_it_is(visit, sweep):
    html = page_of(sweep, compare=compare)
    page = visit(html)
    told = data_of(html)["sweep"]
    columns = {column["name"]: column for column in told["columns"]}
    row = 20
    text = hovered(
        page, "scatter", [r for r in range(len(sweep["rows"])) if columns["nll"]["value"][r] is not None].index(row)
    )
    for name in ("trial", "C", "N", "D", "nll"):
        assert columns[name]["text"][row] in text
    assert f"{columns['nll']['remark'][row]} (to the best of its rung)" in text
    for rung, best in enumerate(told["metrics"]["nll"]["frontier"][1:3], 1):
        text = hovered(page, "frontier", rung, trace=2)
        assert f"{best['change']} against the rung below" in text
        assert best["floor"] in text


def test_metric_colour_and_axis_are_a_persons_choice(visit, sweep, tmp_path):
    html = page_of(sweep)
    page, told = visit(html), data_of(html)["sweep"]
    columns = {column["name"]: column for column in told["columns"]}
    figure = page.locator("#frontier")
    figure.get_by_label("Metric").select_option("recall@10")
    assert figure.locator(".said").inner_text() == told["metrics"]["recall@10"]["said"]
    assert told["metrics"]["recall@10"]["said"] in figure.locator(".plot").get_attribute("aria-label")
    shown = page.evaluate("[0, 2].flatMap(trace => document.querySelector('#frontier .plot').data[trace].y)")
    assert sorted(shown) == sorted(value for value in columns["recall@10"]["value"] if value is not None)
    figure.get_by_label("Colour").select_option("learning rate")
    assert "learning rate" in figure.locator(".cbtitle").text_content()
    figure = page.locator("#scatter")
    figure.get_by_label("Against").select_option("s")
    shown = page.evaluate("document.querySelector('#scatter .plot').data[0].x")
    assert shown == [
        s for s, nll in zip(columns["s"]["value"], columns["nll"]["value"], strict=True) if nll is not None
    ]
    keep(page, tmp_path, "chosen")
    with page.expect_download() as saved:
        figure.get_by_role("button", name="Save as SVG").click()
    assert Path(saved.value.path()).read_text().startswith("<svg")
    assert saved.value.suggested_filename == "scatter.svg"


def test_a_law_is_shown_by_the_metric_that_is_chosen(visit, share_page):
    page = visit(share_page)
    figure, told = page.locator("#law-share"), data_of(share_page)["figures"]["law-share"]
    figure.get_by_label("Metric").select_option(label="recall@10")
    assert figure.locator(".said").inner_text().lower() == told[1]["said"].lower()
    assert figure.locator(".panel p").first.inner_text() == "recall@10 \u2191"
    assert "arXiv 2606.05257" in figure.locator(".plot").nth(1).text_content()


def test_the_theme_switches(visit, sweep):
    page = visit(page_of(sweep))
    colour = "getComputedStyle(document.querySelector('#frontier .xtitle')).fill"
    light = page.evaluate(colour)
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(colour) != light
    assert page.locator("#theme").get_attribute("aria-pressed") == "true"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 28)"


def test_all_that_can_be_used_is_reached_by_keys_and_has_a_name(visit, share_page):
    page = visit(share_page)
    wanted = page.evaluate(
        """[...document.querySelectorAll('select, button, summary, a, .plot, .scroll')]
        .filter(found => found.checkVisibility()).length"""
    )
    names = []
    for _ in range(wanted + 1):
        page.keyboard.press("Tab")
        names.append(page.evaluate(
            """(() => { const found = document.activeElement, labels = found.labels && found.labels[0];
            return found.getAttribute('aria-label') || (labels || found).innerText; })()"""
        ))  # fmt: skip
        page.evaluate("document.activeElement.dataset.seen = 1")
    assert all(names[:wanted])
    assert page.evaluate("document.querySelectorAll('[data-seen]').length") >= wanted
    page.locator("#law-share .plot").first.focus()
    page.keyboard.press("ArrowRight")
    assert "nll " in page.locator("#live").inner_text()
    assert page.locator("#law-share .hovertext").count() == 1
    roles = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(plot => [plot.getAttribute('role'), plot.ariaLabel])"
    )
    assert all(role == "img" and label for role, label in roles)
    assert page.evaluate(
        "[...document.querySelectorAll('table')].every(t => t.caption && t.querySelector('th[scope]'))"
    )


def test_heads_sort_and_every_result_is_listed_when_asked_for(visit, sweep):
    page = visit(page_of(sweep))
    page.locator("#trials").get_by_role("button", name="nll").first.click()
    column = page.evaluate(
        """[...document.querySelectorAll('#trials table')[0].tBodies[0].rows].map(row => row.cells[5].dataset.value)"""
    )
    known = [float(value) for value in column if value]
    assert known == sorted(known)
    assert column[len(known) :] == [""] * 2, "what diverged stands last"
    page.get_by_text("Every result at every rung").click()
    sync_api.expect(page.locator("#every tbody tr")).to_have_count(len(sweep["rows"]))
    assert page.locator("#every tbody small").count() > len(sweep["rows"])


@pytest.mark.parametrize("kind", NAMES)
def test_names_from_outside_run_nothing_and_break_no_layout(visit, tmp_path, kind):
    evil, sweep = NAMES[kind], planted_sweep(12)
    # A dot would make it a metric of a kind of queries, which the page does not show.
    metric = f"{evil}@10".replace(".", "")
    rows = [
        row
        | {"trial": f"{evil}{row['trial']}", "device": evil, "engine": evil}
        | {"config": {**row["config"], evil: 10.0 ** (place % 3), "kind": f"{evil}{place % 2}"}}
        | {"metrics": {**row["metrics"], metric: 1.0 + place} if row["metrics"] else {}}
        for place, row in enumerate(sweep["rows"])
    ]
    state = sweep["state"]
    state.spec["name"] = evil
    state.losses = [{"trial": evil, "rung": 1, "reason": evil, "charged_flops": 1}]
    state.rejected = Counter({evil: 3})
    baselines = {**sweep["baselines"], evil: {"nll": 7.5, metric: 2.0}}
    page = visit(page_of({"rows": rows, "state": state, "baselines": baselines}, {"provenance": {evil: evil}}))
    assert page.locator("h1").inner_text().strip() == evil.replace("\u202e", "").strip()
    page.evaluate("document.querySelectorAll('details').forEach(found => { found.open = true; })")
    page.locator("#frontier").get_by_label("Metric").select_option(metric.replace("\u202e", ""))
    page.locator("#scatter").get_by_label("Against").select_option(evil.replace("\u202e", ""))
    page.locator("#scatter").get_by_label("Colour").select_option("kind")
    assert (evil[:20] if kind != "right-to-left" else "abc") in hovered(page, "curves", 2, trace=12)
    assert page.locator("main img, main a[href^=javascript], .plot a").count() == 0
    for width in (1180, 390):
        page.set_viewport_size({"width": width, "height": 900})
        resized(page)
        assert overflow(page) == 0
        keep(page, tmp_path, f"{kind}-{width}")
    assert page.evaluate("window.hit") is None
    assert "\u202e" not in page.locator("main").inner_text(), "nothing turns the text around"


def opening(browser, file: Path) -> float:
    """Seconds of work of the page's own process until it can be read, its first figure included, the least of three:
    what other processes take is not the page's."""
    taken = []
    for _ in range(3):
        page = browser.new_page()
        session = page.context.new_cdp_session(page)
        session.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(file.as_uri(), wait_until="commit")
        page.wait_for_selector("html[data-ready]", timeout=120_000)
        work = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
        taken.append(work["TaskDuration"])
        page.close()
    return min(taken)


def test_600_trials_at_5_rungs_open_in_two_seconds(browser, tmp_path):
    """What the page adds is bounded by what the library alone takes in the same run, whatever the machine."""
    library, file = tmp_path / "library.html", tmp_path / "large.html"
    ready = "document.documentElement.dataset.ready = ''"
    library.write_text(f"<!doctype html><script>{read_file(LIBRARY)}</script><script>{ready}</script>")
    file.write_text(page_of(large_sweep(), compare=compare))
    alone, taken = opening(browser, library), opening(browser, file)
    print(f"opened in {taken:.2f} s of work, {alone:.2f} s of it the library's")
    assert taken < OPEN_S
    assert taken < MOST_WORK * alone
