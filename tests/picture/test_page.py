"""The picture in a browser: what is drawn, by mouse and by keyboard, and that texts stay texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxcompress
from fxcompress.picture import graph_data
from fxcompress.plans.plan import Plan
from tests.picture.graphs import compressed, only_planned, uniform
from tests.picture.test_exports import HOSTILE, hostile

PAGE = Path(fxcompress.__file__).parent / "report" / "page"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        one = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield one
        one.close()


class Drawn:
    """A page with the picture of a plan, and what went wrong in it."""

    def __init__(self, browser: Any, plan: Plan, width: int = 1400) -> None:
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900})
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        data = json.dumps(graph_data(plan)).replace("<", "\\u003c")
        scripts = "\n".join(
            (PAGE / name).read_text(encoding="utf-8") for name in ("graph-boxes.js", "graph.js")
        )
        style = (PAGE / "graph.css").read_text(encoding="utf-8")
        self.page.set_content(
            f"<!doctype html><style>{style}</style><section id=graph></section><script>{scripts}\n"
            "window.chosen = [];"
            f"drawGraph(document.getElementById('graph'), {data}, (name) => chosen.push(name));"
            "</script>"
        )

    def boxes(self, side: str) -> list[str]:
        """Titles of what is drawn on a side, in order."""
        found = self.page.locator(f'[data-side="{side}"] > .title').all()
        return [
            each.evaluate("node => node.firstChild.textContent").lstrip("▸▾ ") for each in found
        ]

    def keys(self, side: str) -> list[str]:
        """Keys of what is drawn on a side, in order."""
        found = self.page.locator(f'[data-side="{side}"]')
        return list(found.evaluate_all("nodes => nodes.map(node => node.dataset.key)"))

    def box(self, side: str, title: str) -> Any:
        """One box by its title."""
        found = self.page.locator(f'[data-side="{side}"]').filter(
            has=self.page.locator(f'xpath=./*[local-name()="text"][contains(., "{title}")]')
        )
        return found.first

    def show(self, name: str) -> bool:
        return bool(self.page.evaluate("name => showInGraph(name)", name))

    def detail(self) -> str:
        return str(self.page.locator(".graph-detail").inner_text())


def test_both_sides_are_drawn_with_what_took_operators_places(browser: Any) -> None:
    drawn = Drawn(browser, compressed("joint"))
    before, after = drawn.boxes("before"), drawn.boxes("after")
    assert before[:3] == ["input", "0", "1 … 3"]
    assert {"gate", "up", "down", "silu", "mul"} <= {*before}
    assert "shared.down" not in before
    assert "shared.down" in after
    assert [key for key in drawn.keys("after") if key in drawn.keys("before")] == drawn.keys(
        "before"
    )
    assert not drawn.errors
    assert not drawn.requests


def test_matched_operators_stand_in_line(browser: Any) -> None:
    drawn = Drawn(browser, compressed("joint"))
    script = """([key, side]) => {
      const box = document.querySelector(`[data-key="${key}"][data-side="${side}"] > rect`);
      const value = (name) => Number(box.getAttribute(name));
      return [value("x") + value("width") / 2, value("y") + value("height") / 2];
    }"""
    shifts = set()
    for key in drawn.keys("before"):
        (x, y), (other, below) = (
            drawn.page.evaluate(script, [key, side]) for side in ("before", "after")
        )
        assert y == pytest.approx(below)
        shifts.add(round(other - x, 3))
    assert len(shifts) == 1


def test_boxes_open_and_close_by_click_and_by_key(browser: Any) -> None:
    drawn = Drawn(browser, compressed("joint"))
    drawn.page.get_by_role("button", name="Close all").click()
    assert drawn.boxes("before") == ["input", "0", "1 … 3", "4", "output"]
    drawn.box("before", "1 … 3").click()
    assert "gate" in drawn.boxes("after")
    assert drawn.box("after", "1 … 3").get_attribute("aria-expanded") == "true"
    # Enter closes it again, where the keyboard is.
    drawn.page.keyboard.press("Tab")
    drawn.box("before", "1 … 3").focus()
    drawn.page.keyboard.press("Enter")
    assert "gate" not in drawn.boxes("after")
    drawn.page.keyboard.press("ArrowRight")
    active = "() => [document.activeElement.dataset.side, document.activeElement.dataset.key]"
    side, key = drawn.page.evaluate(active)
    assert side == "after"
    drawn.page.keyboard.press("ArrowDown")
    assert drawn.page.evaluate(active)[1] != key
    drawn.page.keyboard.press("ArrowUp")
    assert drawn.page.evaluate(active) == ["after", key]
    assert drawn.page.locator('[data-key][tabindex="0"]').count() == 1
    assert not drawn.errors


def test_an_operator_is_shown_by_its_name(browser: Any) -> None:
    made = compressed("joint")
    drawn = Drawn(browser, made)
    for one in made.sites:
        assert drawn.show(one.name)
        assert one.name in drawn.detail()
        assert f"{one.before.parameters:,} → {one.after.parameters:,}" in drawn.detail()
        if one.form is not None:
            assert f"{one.form}, r {one.rank} of {one.full_rank}" in drawn.detail()
        assert drawn.page.locator('[data-side="after"].selected').count() == 1
    assert drawn.page.evaluate("chosen") == [one.name for one in made.sites]
    assert not drawn.show("no.such.operator")
    assert not drawn.errors


def test_one_of_the_alike_blocks_can_be_looked_at(browser: Any) -> None:
    drawn = Drawn(browser, uniform(4, [4, 8, 12, 16]))
    drawn.page.get_by_role("button", name="Close all").click()
    drawn.box("after", "blocks.0 … 3").click()
    assert "r 4..16 of 64" in drawn.box("after", "fc").text_content()
    drawn.box("before", "fc").click()
    drawn.page.get_by_label("which of the alike blocks").select_option("blocks.2")
    assert "blocks.2.fc" in drawn.detail()
    assert "r 12 of 64" in drawn.detail()
    assert "blocks.2" in drawn.boxes("before")
    assert not drawn.errors


def test_names_are_texts_whatever_is_in_them(browser: Any) -> None:
    drawn = Drawn(browser, hostile())
    titles = drawn.boxes("after")
    for name in HOSTILE:
        assert drawn.show(name)
        assert name in drawn.detail()
        assert any(title in name for title in titles)
    assert drawn.page.locator("img").count() == 0
    assert not drawn.errors
    assert not drawn.requests


def test_a_narrow_window_shows_one_side(browser: Any) -> None:
    drawn = Drawn(browser, compressed("narrow"), width=500)
    assert not drawn.boxes("before")
    drawn.page.get_by_role("button", name="Before").click()
    assert drawn.boxes("before")
    assert not drawn.boxes("after")
    drawn.page.get_by_role("button", name="Side by side").click()
    assert drawn.boxes("before")
    assert drawn.boxes("after")


def test_a_plan_that_is_not_carried_out_says_so(browser: Any) -> None:
    drawn = Drawn(browser, only_planned())
    assert drawn.page.locator(".pane").all_text_contents() == ["before", "after, as planned"]


def test_nothing_is_shown_before_it_is_drawn(browser: Any) -> None:
    page = browser.new_page()
    scripts = "".join((PAGE / f"{name}.js").read_text() for name in ("graph-boxes", "graph"))
    page.set_content(f"<script>{scripts}</script>")
    assert page.evaluate("showInGraph('a')") is False
