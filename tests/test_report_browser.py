"""A report in a real browser: it opens from disk, and shows what the store holds and nothing else.

Chromium is taken from the machine. Without one these tests are skipped, but not in CI.
"""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import xarray as xr
from playwright.sync_api import Browser, Page, sync_playwright
from report_stores import HOSTILE, MARKERS, POSITIONS, prompt_of, text_of, write_grid_run

from persona_nns.prompts.markers import marker_spans
from persona_nns.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PERSONAS, TASKS = ["chef", "marx", "yoda"], ["haiku", "policy", "plan"]
READY = "html[data-ready]"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and "CI" not in os.environ, reason="there is no Chromium on this machine"
)


class Opened:
    """A page of the browser, and what it did that a report must not do."""

    def __init__(self, browser: Browser, file: Path, hash_: str = "", **context: Any) -> None:
        self.page: Page = browser.new_context(**context).new_page()
        self.faults: list[str] = []
        self.page.on("console", lambda said: self.faults.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on(
            "request",
            lambda request: (
                None if request.url.startswith(file.as_uri()) else self.faults.append(request.url)
            ),
        )
        self.page.goto(file.as_uri() + hash_)
        self.page.wait_for_selector(READY, timeout=30000)

    def asked(self, what: str, argument: Any = None) -> Any:
        return self.page.evaluate(what, argument)

    def choose(self, name: str, label: str) -> None:
        """Choose from a list, by its id and the text of the option."""
        before = self.asked("document.documentElement.dataset.ready")
        self.page.locator(f"#choose-{name}").select_option(label=label)
        self._wait(before)

    def go(self, hash_: str) -> None:
        before = self.asked("document.documentElement.dataset.ready")
        self.asked("to => { location.hash = to; }", hash_)
        self._wait(before)

    def _wait(self, before: str) -> None:
        self.page.wait_for_function(
            "before => document.documentElement.dataset.ready !== before", arg=before
        )

    def traces(self) -> list[dict[str, Any]]:
        """What plotly draws, but for the bands of quartiles."""
        return self.asked(
            "document.getElementById('figure').data.filter(of => of.meta !== 'quartiles')"
            ".map(({type, name, x, y, z}) => ({type, name, x, y, z}))"
        )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "s.zarr"


@pytest.fixture(scope="module")
def results(store: Path) -> xr.Dataset:
    write_grid_run(store, PERSONAS, TASKS[:2], experiment="localized_positions", prompts=False)
    write_grid_run(store, PERSONAS, TASKS[:2], model="another")
    return write_grid_run(store, PERSONAS, TASKS, missing=[4])


@pytest.fixture(scope="module")
def opened(browser: Browser, store: Path, results: xr.Dataset) -> Opened:
    assert results.sizes["cell"] == 9
    return Opened(browser, write_report(store).file, color_scheme="light")


MINE = "run=behavioral_markers%2Ftiny.g.1&v=kl"


def test_it_opens_from_disk_without_a_fault(opened: Opened) -> None:
    assert opened.faults == []
    assert opened.page.title() == "s.zarr · persona-nns report"
    assert opened.page.locator("#runs tr").count() == 3
    assert "8 of 9" in opened.page.locator("#runs").inner_text()
    opened.go(MINE)
    assert "Not complete: 8 of 9 cells" in opened.page.locator("#warnings").inner_text()
    assert "torch 2.0" in str(opened.page.locator("#provenance").text_content())


def test_what_is_drawn_is_the_selection_of_the_results(opened: Opened, results: xr.Dataset) -> None:
    opened.go(MINE)
    kl = results["kl"].isel(model=0).astype(float)
    lines = opened.traces()
    assert [line["name"] for line in lines] == POSITIONS
    for line in lines:
        assert line["x"] == kl.layer.values.tolist()
        expected = kl.sel(position=line["name"]).median("cell")
        np.testing.assert_allclose(line["y"], expected, rtol=1e-12)
    bands = opened.asked(
        "document.getElementById('figure').data.filter(of => of.meta === 'quartiles')[0].y"
    )
    first = kl.sel(position=POSITIONS[0])
    upper, lower = (first.quantile(q, "cell").values for q in (0.75, 0.25))
    np.testing.assert_allclose(bands, [*upper, *lower[::-1]], rtol=1e-12)
    assert "96 of 108 values measured" in opened.page.locator("#status").inner_text()
    assert "from" in opened.page.locator("#status").inner_text()

    opened.choose("y", "persona")
    opened.choose("kind", "heatmap")
    opened.choose("at-position", "g1")
    (heat,) = opened.traces()
    expected = np.stack(
        [kl.sel(position="g1")[(kl.persona == p).values].median("cell") for p in PERSONAS]
    )
    np.testing.assert_allclose(np.array(heat["z"], dtype=float), expected, rtol=1e-12)

    opened.go(MINE)
    opened.choose("at-persona", "marx")
    opened.choose("at-task", "plan")
    one = kl.sel(cell="marx/plan", position="p_last")
    np.testing.assert_allclose(opened.traces()[0]["y"], one, rtol=1e-12)
    opened.choose("at-task", "policy")  # not measured
    assert opened.traces()[0]["y"] == [None] * 6
    assert "nothing was measured. 0 of 12" in opened.page.locator("#status").inner_text()

    opened.choose("variable", "any_marker")
    opened.choose("at-task", "share of all 3")
    share = results["any_marker"].isel(model=0).astype(float).where(results.completed[0])
    assert opened.traces()[0]["y"] == pytest.approx(
        share[(share.persona == "marx").values].mean("cell").values.tolist()
    )


def test_the_table_says_the_same(opened: Opened, results: xr.Dataset) -> None:
    opened.go(MINE)
    opened.page.locator("#table-part summary").click()
    rows = opened.page.locator("#table tbody tr")
    assert rows.count() == 12
    position, layer, median, _, _, measured, of = rows.nth(1).locator("th, td").all_inner_texts()
    expected = float(results["kl"].sel(position=position, layer=int(layer)).median())
    assert float(median) == pytest.approx(expected, rel=1e-3)
    assert (measured, of) == ("8", "9")
    opened.page.locator("#table-part summary").click()


def test_texts_are_those_of_the_store_with_markers_and_differences(opened: Opened) -> None:
    opened.go(f"{MINE}&text.persona=chef&text.task=plan")
    cards = opened.page.locator("#texts article")
    said = [cards.nth(k).locator(".text").inner_text() for k in range(3)]
    assert said == [text_of("chef/plan", each) for each in ("clean", "none", "additive")]
    for k, text in enumerate(said):
        found = [text[span.start : span.stop] for span in marker_spans(text, MARKERS)]
        marks = cards.nth(k).locator("mark").all_inner_texts()
        assert sorted("".join(marks).split()) == sorted("".join(found).split())
    assert cards.nth(0).locator("ins").count() == 0
    assert cards.nth(1).locator("ins").all_inner_texts() == ["list"]
    assert "1 of 12 words differ from clean" in cards.nth(1).inner_text()
    tokens = opened.page.locator("#texts .token:not(.key *)").all_inner_texts()
    shown = prompt_of("chef", "plan")
    assert "".join(tokens) == shown.text
    assert opened.page.locator("#texts .region.span-persona .token").all_inner_texts() == ["chef, "]
    assert opened.page.locator("#texts .tokens .token.last").inner_text() == "<model>"
    opened.page.locator("#cell-after").click()
    opened.page.wait_for_function(
        "document.querySelector('#texts .text').textContent.includes('marx/haiku')"
    )
    opened.go("run=localized_positions%2Ftiny.g.1")
    assert "keeps no tokens" in opened.page.locator("#texts").inner_text()


@pytest.mark.parametrize(
    ("text", "markers"),
    [
        ("Shipping a menu; MENUS, menu. Écru écrus", ["menu", "MENU", "ship", "écru"]),
        (
            "Capital-efficiently, a pinch of salt (c++) C++!",
            ["capital-efficient", "of salt", "c++"],
        ),
        ("今日は俳句です。ναὶ ναὶ!", ["俳句", "ναὶ", "naïve"]),
    ],
)
def test_markers_are_found_as_python_finds_them(
    opened: Opened, text: str, markers: list[str]
) -> None:
    spans = opened.asked("([text, markers]) => markerSpans(text, markers)", [text, markers])
    found = {(span.start, span.stop) for span in marker_spans(text, markers)}
    assert {tuple(span) for span in spans} == found


def test_a_view_can_be_linked(opened: Opened, browser: Browser, store: Path) -> None:
    opened.go(MINE)
    opened.choose("x", "task")
    opened.choose("at-layer", "8")
    linked = opened.asked("location.hash")
    again = Opened(browser, store.with_name("s.report.html"), linked)
    assert again.traces() == opened.traces()
    assert again.asked("location.hash") == linked
    again.page.context.close()
    opened.go("run=nonesuch%2Fat.all&v=nothing&at.layer=99")
    assert opened.faults == []
    assert opened.page.locator("#figure-title").inner_text() == "causal KL in nat"


def test_the_page_can_be_used_with_the_keyboard_and_be_heard(opened: Opened) -> None:
    opened.go(MINE)
    page = opened.page
    unnamed = opened.asked(
        "[...document.querySelectorAll('select, button, [role=region], section, nav, form')]"
        ".filter(e => !(e.labels?.[0]?.textContent || e.getAttribute('aria-label') || "
        "e.getAttribute('aria-labelledby') || e.textContent.trim() || e.hidden)).length"
    )
    assert unnamed == 0
    for name in ("Experiment", "Model", "Variable", "Along x", "persona"):
        assert page.get_by_label(name, exact=True).first.is_visible()
    levels = opened.asked(
        "[...document.querySelectorAll('h1,h2,h3,h4,h5')].filter(e => e.offsetParent)"
        ".map(e => Number(e.tagName[1]))"
    )
    assert levels[0] == levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.locator("main").count() == page.locator("nav").count() == 1
    assert page.locator("#figure").get_attribute("role") == "img"
    assert "median" in str(page.locator("#figure").get_attribute("aria-label"))
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    first = "document.querySelectorAll('a[href], button, select')[0].id"
    assert opened.asked(first) == "skip"
    page.locator("#skip").focus()
    visited: list[str] = []
    for _ in range(7):
        page.keyboard.press("Tab")
        visited.append(opened.asked("document.activeElement.id"))
    assert visited[0] == "theme"
    assert visited[1:] == [f"choose-{name}" for name in ("experiment", "model", "variable")] + [
        f"choose-{name}" for name in ("kind", "x", "y")
    ]
    page.keyboard.press("ArrowUp")  # the list that has the focus keeps it
    page.wait_for_timeout(300)
    assert opened.asked("document.activeElement.id") == "choose-y"


def luminance(opened: Opened, element: str, what: str) -> float:
    colour = opened.asked(
        "([element, what]) => getComputedStyle(document.querySelector(element))[what]",
        [element, what],
    )
    red, green, blue = (int(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3])
    return (0.3 * red + 0.6 * green + 0.1 * blue) / 255


def test_light_and_dark(opened: Opened, browser: Browser, store: Path) -> None:
    assert luminance(opened, "body", "backgroundColor") > 0.9
    assert luminance(opened, "body", "color") < 0.3
    dark = Opened(browser, store.with_name("s.report.html"), color_scheme="dark")
    assert luminance(dark, "body", "backgroundColor") < 0.2
    assert luminance(dark, "body", "color") > 0.8
    font = "document.getElementById('figure').layout.font.color"
    assert dark.asked(font) != opened.asked(font)
    dark.page.locator("#theme").click()
    dark.page.wait_for_function("getComputedStyle(document.body).color === 'rgb(29, 34, 40)'")
    assert luminance(dark, "body", "backgroundColor") > 0.9
    assert dark.faults == []
    dark.page.context.close()


def test_nothing_is_wider_than_a_telephone(browser: Browser, store: Path, opened: Opened) -> None:
    small = Opened(
        browser,
        store.with_name("s.report.html"),
        f"#{MINE}",
        viewport={"width": 400, "height": 800},
    )
    for summary in small.page.locator("summary").all():
        summary.click()
    for hash_ in (MINE, MINE.replace("kl", "any_marker"), f"{MINE}&x=layer&y=persona&f=position"):
        small.go(f"{hash_}&kind=heatmap")
        assert small.asked("document.documentElement.scrollWidth") == 400
    assert small.faults == opened.faults == []
    small.page.context.close()


def test_a_hostile_store_is_shown_and_runs_nothing(browser: Browser, tmp_path: Path) -> None:
    write_grid_run(tmp_path / "s.zarr", [HOSTILE, "yoda"], TASKS, model=HOSTILE, note=HOSTILE)
    hostile = Opened(browser, write_report(tmp_path / "s.zarr").file)
    for hash_ in ("", "&y=persona&x=layer", "&x=persona&y=task&f=position", "&x=task&y=cell"):
        hostile.go(f"run={quote(f'behavioral_markers/{HOSTILE}.g.1', safe='')}&v=kl{hash_}&a=b")
    assert hostile.asked("window.hacked") is None
    assert hostile.asked("document.querySelectorAll('img[src=x], #figure a').length") == 0
    assert HOSTILE in str(hostile.page.locator("#texts .tokens").text_content())
    assert hostile.page.locator("#figure-about").inner_text() == HOSTILE
    assert HOSTILE in hostile.page.locator("#choose-model").inner_text()
    hostile.asked(
        "() => { const s = document.createElement('script');"
        "s.textContent = 'window.hacked = 2'; document.body.append(s); }"
    )
    assert hostile.asked("window.hacked") is None  # the policy, had something slipped through
    assert all("Content Security Policy" in fault for fault in hostile.faults)
    hostile.page.context.close()


def test_many_cells_are_inflated_as_they_are_chosen(browser: Browser, tmp_path: Path) -> None:
    personas, tasks = [f"p{k}" for k in range(100)], [f"t{k}" for k in range(100)]
    kl = write_grid_run(
        tmp_path / "s.zarr", personas, tasks, layers=list(range(14)), missing=[0, 7]
    )["kl"][0].astype(float)
    many = Opened(browser, write_report(tmp_path / "s.zarr").file)
    np.testing.assert_allclose(
        many.traces()[0]["y"], kl.sel(position="p_last").median("cell"), rtol=1e-12
    )
    assert many.asked("current().blobs.filter(number => inflated.has(number)).length") == 0
    many.choose("at-persona", "p42")
    np.testing.assert_allclose(
        many.traces()[0]["y"], kl.sel(position="p_last")[4200:4300].median("cell"), rtol=1e-12
    )
    assert many.asked("current().blobs.filter(number => inflated.has(number)).length") == 0
    many.choose("at-task", "t17")
    np.testing.assert_allclose(
        many.traces()[0]["y"], kl.sel(position="p_last", cell="p42/t17"), rtol=1e-12
    )
    assert many.asked("current().blobs.filter(number => inflated.has(number)).length") == 1
    assert many.page.locator("#texts .text").first.inner_text() == text_of("p42/t17", "clean")
    assert many.faults == []
    many.page.context.close()
