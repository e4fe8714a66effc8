import re
from html.parser import HTMLParser

import pytest

from fxcompress.plans.plan import Plan
from fxcompress.report import diff_plan
from fxcompress.report.html import DECADES, HEIGHT, WIDTH, spectrum_plot, tree_lines
from fxcompress.report.scatter import SIDE, fidelity_scatter
from tests.report.plans import llama, measured, plan, shared, site, unmatched

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements and texts of a page; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def compressed() -> Plan:
    return llama(layers=3, dense=["model.layers.1.mlp.up_proj"], spectra=True, rewritten=True)


@pytest.fixture(scope="module")
def page(compressed: Plan) -> Page:
    return Page(diff_plan(compressed).to_html())


def test_page_needs_nothing_else(compressed: Plan) -> None:
    source = diff_plan(compressed).to_html()
    assert not re.search(r"https?://|url\(|@import|(?<![\w-])(src|href)=", source)
    page = Page(source)
    assert len(page.all("script")) == len(page.all("style")) == 1
    assert not page.all("link")
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'")


def test_every_site_has_a_row_and_a_spectrum(page: Page, compressed: Plan) -> None:
    buttons = [one for one in page.all("button") if one.get("data-opens") == "detail"]
    assert [one["title"] for one in buttons] == [one.name for one in compressed.sites]
    assert all(one["aria-expanded"] == "false" for one in buttons)
    details = {row["id"] for row in page.all("tr") if row.get("class") == "detail"}
    assert {one["aria-controls"] for one in buttons} == details
    assert len(page.all("svg")) == len(compressed.sites)
    cuts = [line for line in page.all("line") if line.get("class") == "cut"]
    assert len(cuts) == len(compressed.rewritten) == len(compressed.sites) - 1


def test_identifiers_are_unique_and_references_hold(page: Page) -> None:
    identifiers = [one["id"] for _, one in page.elements if "id" in one]
    assert len(set(identifiers)) == len(identifiers)
    references = {one["aria-controls"] for _, one in page.elements if "aria-controls" in one}
    assert references <= set(identifiers)


def test_rows_carry_a_number_for_every_sortable_column(page: Page) -> None:
    columns = [int(str(one["data-at"])) for one in page.all("button") if "data-at" in one]
    assert columns == list(range(10))
    for row in page.all("tr"):
        if "data-sort" in row:
            numbers = [float(number) for number in str(row["data-sort"]).split(" ")]
            assert len(numbers) == len(columns)


def test_reasons_and_the_text_are_on_the_page(page: Page, compressed: Plan) -> None:
    for one in compressed.unmatched:
        assert one.reason in page.text
    assert "left dense by the budget" in page.text
    assert str(diff_plan(compressed)) in page.text


HOSTILE = "<script>alert('x')</script>\"><img/src=x onerror=alert(1)>&amp;"


def test_everything_hostile_is_escaped() -> None:
    sites = [
        site(f"h.0.{HOSTILE}", 64, 64, 8, rule=HOSTILE, location=HOSTILE, spectrum=(2.0, 1.0, 0.5)),
        site(f"h.1.{HOSTILE}", 64, 64, None, reason=HOSTILE),
    ]
    base = plan(sites, [unmatched(HOSTILE, 8, 8, HOSTILE, op=HOSTILE)])
    nasty = base.model_copy(
        update={
            "model_class": HOSTILE,
            "rules": HOSTILE,
            "metric": HOSTILE,
            "loss_unit": HOSTILE,
            "calibration": {HOSTILE: HOSTILE},
            "warnings": (HOSTILE,),
            "expanded": (HOSTILE,),
        }
    )
    nasty = measured(nasty)
    source = diff_plan(nasty).to_html()
    assert "<script>alert" not in source
    assert "<img" not in source
    page = Page(source)
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, one in page.elements for name in one)
    # Escaped, not dropped: the page shows the very characters.
    assert page.text.count(HOSTILE) > 10


@pytest.mark.parametrize(
    "empty",
    [plan(), plan([], [unmatched("fc", 8, 8, "no")]), plan([site("", 8, 8, 2)], model_class="Net")],
    ids=["nothing", "all unmatched", "the model is one layer"],
)
def test_small_plans_have_a_page(empty: Plan) -> None:
    page = Page(diff_plan(empty).to_html())
    assert ("No rule matched any operator." in page.text) == (not empty.sites)


def test_tree_sums_up_and_skips_modules_with_one_child(compressed: Plan) -> None:
    lines = tree_lines(compressed.sites)
    assert [line.label for line in lines[:4]] == ["model.layers", "0", "self_attn", "q_proj"]
    assert (lines[0].open, lines[1].open) == (True, False)
    for line in lines:
        below = [one for one in lines if one.above == line.key]
        if below:
            assert line.after.macs == sum(one.after.macs for one in below)
            assert line.predicted == pytest.approx(sum(one.predicted for one in below))
    assert lines[0].form == "20 of 21"
    assert [line.key for line in lines] == list(range(len(lines)))


def test_tree_keeps_a_site_that_has_sites_below_and_two_weights_of_one_module() -> None:
    sites = (site("a", 8, 8, 2), site("a.b", 8, 8, 2), site("c", 8, 8, 2), site("c", 8, 8, 4))
    lines = tree_lines(sites)
    assert sorted(line.rank for line in lines if line.site is not None) == [
        *("2 / 8", "4 / 8", "mean 25%", "mean 38%"),
    ]
    assert [line.site for line in lines if line.site is not None] == list(sites)


def test_spectrum_is_logarithmic_and_cut_between_components() -> None:
    plot = spectrum_plot(site("a", 3, 3, 1, spectrum=(100.0, 10.0, 1.0)))
    assert plot is not None
    half = WIDTH / 2
    assert plot.points == f"0.0,0.0 {half},{HEIGHT / 2} {WIDTH}.0,{HEIGHT}.0"
    assert plot.decades == ((HEIGHT, 0), (HEIGHT / 2, 1), (0.0, 2))
    assert plot.cut == half / 2


def test_spectrum_that_falls_to_zero_stays_on_the_page() -> None:
    plot = spectrum_plot(site("a", 3, 3, 3, spectrum=(1.0, 0.0, 0.0)))
    assert plot is not None
    heights = [float(point.split(",")[1]) for point in plot.points.split(" ")]
    assert heights == [0.0, HEIGHT, HEIGHT]
    assert min(exponent for _, exponent in plot.decades) == -DECADES
    assert plot.cut == WIDTH


def test_no_cut_where_it_stays_dense_and_no_plot_without_values() -> None:
    dense = spectrum_plot(site("a", 3, 3, None, spectrum=(2.0, 1.0)))
    assert dense is not None
    assert dense.cut is None
    assert spectrum_plot(site("a", 3, 3, 1)) is None
    assert spectrum_plot(site("a", 3, 3, 1, spectrum=(0.0, 0.0))) is None


# ---- measured losses ------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_against(compressed: Plan) -> Page:
    return Page(diff_plan(measured(compressed)).to_html())


def test_measured_losses_have_a_column_and_a_drawing(held_against: Page, compressed: Plan) -> None:
    columns = [int(str(one["data-at"])) for one in held_against.all("button") if "data-at" in one]
    assert columns == list(range(11))
    found = measured(compressed).fidelity
    assert found is not None
    lines = {line.path: line for line in tree_lines(compressed.sites, found.by_site)}
    rows = [str(one["data-sort"]) for one in held_against.all("tr") if "data-sort" in one]
    for row, line in zip(rows, lines.values(), strict=True):
        assert float(row.split(" ")[10]) == pytest.approx(line.measured or 0.0)
    assert lines["model.layers"].measured == pytest.approx(found.singly)
    assert lines["model.layers.1.mlp.up_proj"].measured is None  # left dense
    marks = [one for one in held_against.all("circle") if one.get("class") == "mark"]
    assert len(marks) == len(found.sites)
    assert len(held_against.all("svg")) == len(compressed.sites) + 1
    assert f"rank correlation of predicted and measured {found.rank_correlation:.2f}" in (
        held_against.text
    )


def test_a_page_without_measurement_says_nothing_of_one(page: Page, compressed: Plan) -> None:
    assert "not measured (no calibration batch was held back)" in page.text
    assert "Predicted and measured" not in page.text
    assert not [one for one in page.all("section") if one.get("id") == "fidelity"]
    assert fidelity_scatter(compressed) is None
    assert [line.measured for line in tree_lines(compressed.sites)] == [None] * len(
        tree_lines(compressed.sites)
    )


def test_identifiers_hold_with_a_measurement(held_against: Page) -> None:
    test_identifiers_are_unique_and_references_hold(held_against)


def test_a_bundle_counts_once_in_the_tree() -> None:
    made = measured(shared())
    assert made.fidelity is not None
    lines = {line.path: line for line in tree_lines(made.sites, made.fidelity.by_site)}
    block = "model.layers.0.self_attn"
    assert lines[f"{block}.k_proj"].measured is None
    both = [lines[f"{block}.{name}"].measured or 0.0 for name in ("q_proj", "o_proj")]
    assert lines[block].measured == pytest.approx(sum(both))
    text = Page(diff_plan(made).to_html()).text
    assert text.count(f"{block}.q_proj, {block}.k_proj, {block}.v_proj together") == 3


def test_the_scatter_has_equality_on_its_diagonal() -> None:
    sites = [site(f"h.{i}.fc", 8, 8, 2, predicted=p) for i, p in enumerate((1e-4, 1e-2, 0.0))]
    made = measured(plan(sites))
    assert made.fidelity is not None
    ones = [
        one.model_copy(update={"measured": value, "error": 0.1 * value})
        for one, value in zip(made.fidelity.sites, (1e-4, 1e-3, 0.0), strict=True)
    ]
    exact = made.model_copy(
        update={"fidelity": made.fidelity.model_copy(update={"sites": tuple(ones)})}
    )
    drawn = fidelity_scatter(exact)
    assert drawn is not None
    assert drawn.diagonal
    assert drawn.x == drawn.y
    assert [(mark.x, mark.y) for mark in drawn.marks] == [(0, 0), (SIDE, SIDE / 2), (0, 0)]
    assert drawn.marks[1].low < SIDE / 2 < drawn.marks[1].high
    assert drawn.marks[1].text == "h.1.fc: predicted 0.0100, measured 0.0010 ± 10.0%"
    other = fidelity_scatter(exact.model_copy(update={"loss_unit": "squared error"}))
    assert other is not None
    assert not other.diagonal
    assert (other.x.low, other.x.high, other.y.low, other.y.high) == (-4, -2, -4, -3)
