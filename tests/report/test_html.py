import re
from html.parser import HTMLParser

import pytest

from fxcompress.plans.plan import Batch, Plan
from fxcompress.report import diff_plan
from fxcompress.report.columns import (
    FORM,
    MEASURED,
    PAGE,
    PREDICTED,
    RANK,
    SIZES,
    Column,
    measured_sites,
    shown,
)
from fxcompress.report.html import HEIGHT, WIDTH, Row, spectrum_plot, tree_rows
from fxcompress.report.plot import DECADES, Plot
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


def sortable(plan: Plan) -> list[Column | None]:
    """The columns that a page sorts by; the first one is the module."""
    return [None, *(column for column in shown(PAGE, plan) if column.order is not None)]


def test_rows_carry_a_number_for_every_sortable_column(page: Page, compressed: Plan) -> None:
    columns = [int(str(one["data-at"])) for one in page.all("button") if "data-at" in one]
    assert columns == list(range(len(sortable(compressed))))
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


def tree(made: Plan) -> list[Row]:
    return tree_rows(made.sites, measured_sites(made))


def test_tree_sums_up_and_skips_modules_with_one_child(compressed: Plan) -> None:
    rows = tree(compressed)
    assert [row.label for row in rows[:4]] == ["model.layers", "0", "self_attn", "q_proj"]
    assert (rows[0].open, rows[1].open) == (True, False)
    for row in rows:
        below = [one for one in rows if one.above == row.key]
        for column in (*shown(SIZES, compressed), PREDICTED) if below else ():
            assert column.order is not None
            assert column.order(row.entry) == pytest.approx(
                sum(column.order(one.entry) for one in below)
            )
    assert FORM.below(rows[0].entry) == "20 of 21"
    assert [row.key for row in rows] == list(range(len(rows)))


def test_tree_keeps_a_site_that_has_sites_below_and_two_weights_of_one_module() -> None:
    sites = (site("a", 8, 8, 2), site("a.b", 8, 8, 2), site("c", 8, 8, 2), site("c", 8, 8, 4))
    rows = [row for row in tree_rows(sites, {}) if row.site is not None]
    assert sorted(RANK.below(row.entry) for row in rows) == [
        *("2 / 8", "4 / 8", "mean 25%", "mean 38%"),
    ]
    assert [row.site for row in rows] == list(sites)


def points(plot: Plot) -> list[tuple[float, float]]:
    return [(plot.x.place(x), plot.down(y)) for x, y in plot.curve]


def test_spectrum_is_logarithmic_and_cut_between_components() -> None:
    plot = spectrum_plot(site("a", 3, 3, 1, spectrum=(100.0, 10.0, 1.0)))
    assert plot is not None
    half = WIDTH / 2
    assert points(plot) == [(0, 0), (half, HEIGHT / 2), (WIDTH, HEIGHT)]
    assert [text for _, text in plot.y.ticks] == ["1", "2", "5", "10", "20", "50", "100"]
    assert plot.x.ticks == ((0, "1"), (half, "2"), (WIDTH, "3"))
    assert plot.shade is not None
    assert plot.x.place(plot.shade) == half / 2
    assert [line.text for line in plot.lines] == ["rank 1"]


def test_spectrum_that_falls_to_zero_stays_on_the_page() -> None:
    plot = spectrum_plot(site("a", 3, 3, 3, spectrum=(1.0, 0.0, 0.0)))
    assert plot is not None
    assert [y for _, y in points(plot)] == [0.0, HEIGHT, HEIGHT]
    assert plot.y.low == pytest.approx(10.0**-DECADES)
    assert plot.shade is not None
    assert plot.x.place(plot.shade) == WIDTH


def test_no_cut_where_it_stays_dense_and_no_plot_without_values() -> None:
    dense = spectrum_plot(site("a", 3, 3, None, spectrum=(2.0, 1.0)))
    assert dense is not None
    assert dense.shade is None
    assert dense.lines == ()
    assert spectrum_plot(site("a", 3, 3, 1)) is None
    assert spectrum_plot(site("a", 3, 3, 1, spectrum=(0.0, 0.0))) is None


# ---- measured losses ------------------------------------------------------------------


def measured_sum(row: Row) -> float:
    assert MEASURED.order is not None
    return MEASURED.order(row.entry)


@pytest.fixture(scope="module")
def held_against(compressed: Plan) -> Page:
    return Page(diff_plan(measured(compressed)).to_html())


def test_measured_losses_have_a_column_and_a_drawing(held_against: Page, compressed: Plan) -> None:
    columns = [int(str(one["data-at"])) for one in held_against.all("button") if "data-at" in one]
    expected = sortable(measured(compressed))
    assert columns == list(range(len(expected)))
    found = measured(compressed).fidelity
    assert found is not None
    lines = {row.path: row for row in tree(measured(compressed))}
    rows = [str(one["data-sort"]) for one in held_against.all("tr") if "data-sort" in one]
    for row, line in zip(rows, lines.values(), strict=True):
        own = [one.measured for one in line.entry.found]
        assert float(row.split(" ")[expected.index(MEASURED)]) == pytest.approx(sum(own))
    assert measured_sum(lines["model.layers"]) == pytest.approx(found.singly)
    assert MEASURED.below(lines["model.layers.1.mlp.up_proj"].entry) == "–"  # left dense
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
    assert MEASURED not in shown(PAGE, compressed)


def test_times_have_a_card(held_against: Page, page: Page) -> None:
    text = " ".join(held_against.text.split())
    assert "forward pass 1.06 times as fast 1.42 s → 1.34 s 1.04..1.08; cpu, 2 threads" in text
    text = " ".join(page.text.split())
    assert "forward pass not measured no time was taken when it was compressed" in text


def test_amounts_of_the_batch_are_per_sample(page: Page, compressed: Plan) -> None:
    text = " ".join(page.text.split())
    before, after = compressed.model_before.macs // 2, compressed.model_after.macs // 2
    assert "MACs per sample, of the model" in text
    assert f"{before:,} → {after:,}" in text
    assert "the recorded batch: 2 samples of 50" in text
    assert "bytes, of the model" in text
    whole = sum(site.before.macs for site in compressed.sites)
    (top,) = [one for one in page.all("tr") if one.get("id") == "line-0"]
    assert str(whole / 2) in str(top["data-sort"]).split()
    unknown = Page(diff_plan(compressed.model_copy(update={"batch": Batch()})).to_html()).text
    assert "MACs per batch" in unknown
    assert "MACs per sample" not in unknown


def test_identifiers_hold_with_a_measurement(held_against: Page) -> None:
    test_identifiers_are_unique_and_references_hold(held_against)


def test_a_bundle_counts_once_in_the_tree() -> None:
    made = measured(shared())
    rows = {row.path: row for row in tree(made)}
    block = "model.layers.0.self_attn"
    assert MEASURED.below(rows[f"{block}.k_proj"].entry) == "–"
    both = [measured_sum(rows[f"{block}.{name}"]) for name in ("q_proj", "o_proj")]
    assert min(both) > 0
    assert measured_sum(rows[block]) == pytest.approx(sum(both))
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
    assert [(line.x, line.y) for line in drawn.lines] == [((1e-4, 1e-2), (1e-4, 1e-2))]
    assert (drawn.x.ticks, drawn.x.length) == (drawn.y.ticks, SIDE)
    places = [(drawn.x.place(mark.x), drawn.down(mark.y)) for mark in drawn.marks]
    assert places == [(0, SIDE), (SIDE, SIDE / 2), (0, SIDE)]
    assert [mark.spread for mark in drawn.marks] == pytest.approx([2e-5, 2e-4, 0])
    assert drawn.marks[1].text == "h.1.fc: predicted 0.0100, measured 0.0010 ± 10.0%"
    other = fidelity_scatter(exact.model_copy(update={"loss_unit": "squared error"}))
    assert other is not None
    assert not other.lines
    assert (other.x.low, other.x.high) == pytest.approx((1e-4, 1e-2))
    assert (other.y.low, other.y.high) == pytest.approx((1e-4, 1e-3))
