"""The page in a browser: what clicks and keys do, on a phone, and with ten thousand operators."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fxcompress.report import diff_plan
from tests.report.plans import llama, measured
from tests.report.ten_thousand import large
from tests.report.test_html import HOSTILE, hostile

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")

LINES = "#operators tbody tr.row"
DENSE = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = measured(llama(layers=3, dense=[DENSE], spectra=True, rewritten=True))
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(diff_plan(made).to_html(), encoding="utf-8")
    return path


def visit(browser: Any, path: Path, at: str = "", width: int = 1400) -> Any:
    """An open page that raises what its script does."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on("console", lambda told: told.type == "error" and page.errors.append(told.text))
    page.on("request", lambda asked: asked.url.startswith("http") and page.errors.append(asked.url))
    page.goto(path.as_uri() + at)
    return page


@pytest.fixture
def page(browser: Any, source: Path) -> Iterator[Any]:
    opened = visit(browser, source)
    yield opened
    assert opened.errors == []
    opened.close()


def names(page: Any) -> list[str]:
    found: list[str] = page.eval_on_selector_all(
        f"{LINES} button.path", "all => all.map((one) => one.title)"
    )
    return found


def cells(page: Any, head: str) -> list[str]:
    """Texts of a column of the lines that are there."""
    found: list[str] = page.eval_on_selector_all(
        f'{LINES} td[data-label="{head}"]', "all => all.map((one) => one.textContent)"
    )
    return found


def test_what_lost_most_stands_first(page: Any) -> None:
    losses = [float(text) for text in cells(page, "predicted KL")]
    assert len(losses) == 21
    assert losses == sorted(losses, reverse=True)
    assert names(page)[-1] == DENSE
    assert page.inner_text("[aria-sort]").strip().startswith("share of loss")
    widths = page.eval_on_selector_all(
        f'{LINES} td[data-label="share of loss"] .bar',
        "all => all.map((one) => one.getBoundingClientRect().left)",
    )
    assert len({*widths}) == 1  # bars begin on one edge


def test_heads_sort_by_click_and_by_key(page: Any) -> None:
    head = page.locator("#operators thead button", has_text="operator")
    head.click()
    assert names(page)[:2] == [f"model.layers.0.mlp.{one}_proj" for one in ("down", "gate")]
    assert page.get_attribute('th[data-key="name"]', "aria-sort") == "ascending"
    page.keyboard.press("Enter")  # the head has kept the focus
    assert page.get_attribute('th[data-key="name"]', "aria-sort") == "descending"
    assert names(page)[0] == "model.layers.2.self_attn.v_proj"
    assert page.locator("#operators [aria-sort]").count() == 1


def test_search_and_filters(page: Any) -> None:
    page.keyboard.press("/")
    page.keyboard.type("*.q_proj")
    assert len(names(page)) == 3
    assert all(name.endswith("q_proj") for name in names(page))
    assert page.inner_text('[role="status"]') == "3 of 21 operators"
    page.fill("input[type=search]", "layers.1.")
    assert len(names(page)) == 7
    page.select_option('select[aria-label="every form"]', "dense")
    assert names(page) == [DENSE]
    page.select_option('select[aria-label="every rule"]', "attention")
    assert names(page) == []


def test_a_sheet_opens_with_its_spectrum_and_its_reason(page: Any) -> None:
    assert page.locator("svg").count() == 0  # nothing is drawn before it is seen
    page.locator(f"{LINES} button").first.click()
    assert page.locator(".sheet svg polyline").count() == 1
    assert "#operators/model.layers." in page.url
    page.fill("input[type=search]", DENSE)
    page.locator(f"{LINES} button").click()
    assert "left dense by the budget" in page.locator(".sheet").inner_text()


def test_a_hash_leads_to_a_site_and_back(browser: Any, source: Path) -> None:
    page = visit(browser, source, f"#operators/{DENSE}")
    assert DENSE in page.locator(".sheet").inner_text()
    page.click("#tab-rules")
    assert page.url.endswith("#rules")
    assert page.locator("#rules tr.total").inner_text().split("\t")[2] == "21"
    page.evaluate("location.hash = '#unchanged'")
    assert page.locator("#unchanged tbody tr").count() == 3
    page.close()


def test_a_tree_adds_up_and_is_walked_by_keys(page: Any) -> None:
    page.get_by_role("button", name="Tree").click()
    assert names(page) == ["model.layers", *(f"model.layers.{at}" for at in range(3))]
    assert cells(page, "share of loss")[0] == "100.0%"
    page.locator(f"{LINES} button").nth(1).focus()
    page.keyboard.press("ArrowRight")
    assert names(page)[2:4] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert names(page)[3] == "model.layers.0.self_attn.q_proj"
    page.keyboard.press("ArrowLeft")
    assert len(names(page)) == 6


def test_columns_are_behind_a_menu(page: Any) -> None:
    assert cells(page, "bytes before") == []
    page.click("#operators summary")
    page.get_by_label("bytes, before").check()
    assert len(cells(page, "bytes before")) == 21


def test_tabs_by_keys_and_every_one_is_drawn(page: Any) -> None:
    page.focus("#tab-operators")
    for _ in range(page.locator('[role="tab"]').count()):
        chosen = page.locator('[role="tab"][aria-selected="true"]')
        section = chosen.get_attribute("aria-controls")
        assert page.locator('[role="tabpanel"]:visible').count() == 1
        assert page.locator(f"#{section}").inner_text().strip()
        page.keyboard.press("ArrowRight")
    assert page.locator("#tab-operators").get_attribute("aria-selected") == "true"
    assert page.locator("#prediction svg circle").count() == 20
    assert page.locator("#graph svg").count() > 0


def test_lines_are_cards_on_a_phone(browser: Any, source: Path) -> None:
    page = visit(browser, source, width=400)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    line = page.locator(LINES).first
    assert line.evaluate("one => getComputedStyle(one).display") == "grid"
    box = line.bounding_box()
    assert box["width"] <= 400
    assert box["height"] > 60
    assert "share of loss" in line.locator("td").nth(3).evaluate(
        "one => getComputedStyle(one, '::before').content"
    )
    page.close()


def test_what_is_hostile_is_shown_and_does_nothing(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "hostile.html"
    path.write_text(diff_plan(hostile()).to_html(), encoding="utf-8")
    page = visit(browser, path)
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    for tab in page.locator('[role="tab"]').all():
        tab.click()
    page.click("#tab-operators")
    page.locator(f"{LINES} button").first.click()
    assert page.locator("img").count() == 0
    assert HOSTILE in page.locator(".sheet").inner_text()
    assert page.errors == []
    page.close()


def test_from_a_row_to_the_graph(browser: Any, source: Path) -> None:
    page = visit(browser, source)
    page.locator(f"{LINES} button").first.click()
    page.get_by_role("button", name="show in graph").click()
    assert page.locator("#graph").is_visible()
    assert page.locator("#graph svg").count() > 0
    assert page.errors == []
    page.close()


CLICKS = """() => {
  const timed = (act) => {
    const start = performance.now();
    act();
    return performance.now() - start;
  };
  const all = [...document.querySelectorAll("#operators button")];
  const button = (text) => all.find((one) => one.textContent.startsWith(text));
  return {
    sort: timed(() => button("rank").click()),
    sheet: timed(() => document.querySelector("#operators tbody button").click()),
    tree: timed(() => button("Tree").click()),
    all: timed(() => button("Expand all").click()),
  };
}"""


def test_ten_thousand_operators(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "large.html"
    path.write_text(diff_plan(large()).to_html(), encoding="utf-8")
    assert path.stat().st_size < 8e6
    page = visit(browser, path)
    assert page.inner_text('[role="status"]') == "10,000 operators"
    # Work, not seconds: however many operators, few lines are elements.
    assert 10 < page.locator(LINES).count() < 80
    assert page.evaluate("document.querySelectorAll('*').length") < 2500
    took = page.evaluate(CLICKS)
    assert max(took.values()) < 1000, took  # a tenth of that where nothing else runs
    page.evaluate("document.querySelector('.scroll.tall').scrollTop = 1e9")
    page.wait_for_function("[...document.querySelectorAll('#operators tbody tr.row')].length > 5")
    assert 10 < page.locator(LINES).count() < 80
    page.evaluate("location.hash = '#operators/model.layers.700.mlp.up_proj'")
    page.wait_for_selector(".sheet")
    page.wait_for_function(
        "document.querySelector('.sheet').innerText.includes('layers.700.mlp.up')"
    )
    assert page.errors == []
    page.close()
