"""The page as data: what it tells of a plan, and that nothing in it is markup."""

from __future__ import annotations

import math
import re

import pytest
import torch

import fxcompress
from fxcompress.plans.plan import Batch, Plan
from fxcompress.report import diff_plan
from fxcompress.report.comparison import comparison_text
from fxcompress.report.page_data import MOVES, VALUES
from fxcompress.report.plot import Plot
from fxcompress.report.scatter import SIDE, fidelity_scatter
from tests.report.pages import Page
from tests.report.plans import llama, measured, plan, shared, site, unmatched
from tests.report.ten_thousand import large
from tests.small import Net, rules


@pytest.fixture(scope="module")
def compressed() -> Plan:
    return llama(layers=3, dense=["model.layers.1.mlp.up_proj"], spectra=True, rewritten=True)


@pytest.fixture(scope="module")
def page(compressed: Plan) -> Page:
    return Page(diff_plan(compressed).to_html())


@pytest.fixture(scope="module")
def held_against(compressed: Plan) -> Page:
    return Page(diff_plan(measured(compressed)).to_html())


def test_page_needs_nothing_else(compressed: Plan) -> None:
    source = diff_plan(compressed).to_html()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", source)
    page = Page(source)
    assert not page.all("link")
    assert not any("src" in one or "href" in one for _, one in page.elements)
    policies = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert len(policies) == 1
    assert str(policies[0]).startswith("default-src 'none'")


def test_the_script_makes_no_markup_of_text(compressed: Plan) -> None:
    source = diff_plan(compressed).to_html()
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", source
    )


def test_without_a_script_there_are_totals(page: Page, compressed: Plan) -> None:
    assert len(page.all("noscript")) == 1
    assert f"{compressed.model_after.parameters:,}" in page.text
    assert "KL to the dense model: not measured" in page.text


def real() -> Plan:
    torch.manual_seed(0)
    return fxcompress.plan(Net().eval(), rules(0.6), [torch.randn(32, 24) for _ in range(2)])


HOSTILE = "<script>alert('x')</script>\"><img/src=x onerror=alert(1)>&amp;<!--"


def hostile() -> Plan:
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
    return measured(nasty)


def test_everything_hostile_is_data() -> None:
    source = diff_plan(hostile()).to_html()
    assert "<script>alert" not in source
    assert "<img" not in source
    assert source.count("<!--") == 0
    page = Page(source)
    usual = Page(diff_plan(llama(layers=1)).to_html())
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in usual.elements]
    assert not any(name.startswith("on") for _, one in page.elements for name in one)
    # Not dropped: the data are the very characters.
    assert page.data["sites"]["name"] == [f"h.{at}.{HOSTILE}" for at in (0, 1)]
    assert page.data["warnings"][0] == HOSTILE


@pytest.mark.parametrize(
    "empty",
    [plan(), plan([], [unmatched("fc", 8, 8, "no")]), plan([site("", 8, 8, 2)], model_class="Net")],
    ids=["nothing", "all unmatched", "the model is one layer"],
)
def test_small_plans_have_a_page(empty: Plan) -> None:
    data = Page(diff_plan(empty).to_html()).data
    assert data["sites"]["name"] == [one.name for one in empty.sites]
    assert len(data["unchanged"]) == len(empty.unmatched)


def test_every_site_is_there_with_its_spectrum(page: Page, compressed: Plan) -> None:
    data = page.data["sites"]
    assert data["name"] == [one.name for one in compressed.sites]
    assert page.words("form") == [one.form_text for one in compressed.sites]
    for found, one in zip(data["spectrum"], compressed.sites, strict=True):
        assert len(found) == VALUES
        ends = [one.spectrum[0], one.spectrum[-1]]
        assert [found[0], found[-1]] == pytest.approx(ends, rel=5e-3)
    (dense,) = [at for at, stays in enumerate(data["dense"]) if stays]
    assert page.words("reason")[dense] == "left dense by the budget"
    assert data["rank"][dense] == ""


def test_reasons_and_the_text_are_on_the_page(page: Page, compressed: Plan) -> None:
    told = {one["reason"] for one in page.data["unchanged"]}
    assert told == {one.reason for one in compressed.unmatched} | {"left dense by the budget"}
    assert page.data["text"] == str(diff_plan(compressed))


# ---- totals equal their parts ---------------------------------------------------------


@pytest.mark.parametrize("made", [llama(layers=3), shared(), measured(shared())])
def test_rules_and_columns_add_up_to_the_totals(made: Plan) -> None:
    page = Page(diff_plan(made).to_html())
    told, data = page.data["rules"], page.data["sites"]
    for when, size in (("before", made.model_before), ("after", made.model_after)):
        parameters = sum(data["parameters"][when])
        assert parameters == sum(page.column(when, "parameters"))
        assert parameters == sum(rule[when] for rule in told)
        rest = size.parameters - parameters
        assert rest == made.model_before.parameters - sum(s.before.parameters for s in made.sites)
    assert sum(rule["matched"] for rule in told) == len(made.sites)
    assert sum(rule["rewritten"] for rule in told) == len(made.rewritten)
    lost = made.budget.predicted
    assert math.fsum(rule["predicted"] for rule in told) == pytest.approx(lost)
    assert math.fsum(data["predicted"]) == pytest.approx(lost)
    if made.fidelity is not None:
        alone = [x for x in page.column("measured KL, alone") if x is not None]
        assert math.fsum(alone) == pytest.approx(made.fidelity.singly, rel=1e-3)
        assert math.fsum(rule["measured"] for rule in told) == pytest.approx(made.fidelity.singly)


def test_what_is_bought_adds_up_to_the_frontier() -> None:
    """Of a plan with more moves than are shown one by one."""
    made = large(3 * MOVES)
    trade = made.tradeoff
    assert trade is not None
    data = Page(diff_plan(made).to_html()).data["budget"]
    rows = data["more"]["rows"]
    assert len(rows) == MOVES + 1
    assert rows[-1][0] == f"{2 * MOVES} others"
    costs = [float(row[3].replace(",", "")) for row in rows]
    assert sum(costs) == pytest.approx(trade.costs[1] - trade.costs[0])
    assert math.fsum(row[4] for row in rows) == pytest.approx(trade.losses[1] - trade.losses[0])
    assert data["less"] is None


def test_the_budget_of_a_real_model_has_a_price() -> None:
    planned = real()
    budget = Page(diff_plan(planned).to_html()).data["budget"]
    trade = planned.tradeoff
    assert trade is not None
    assert budget["frontier"]["keep"][trade.now] <= 0.6 + 1e-3
    assert "more parameters" in budget["more"]["text"]
    assert budget["more"]["text"].endswith("% of what is lost now")
    assert "less parameters" in budget["less"]["text"]
    assert budget["more"]["loss"] < 0 < budget["less"]["loss"]
    again = Plan.model_validate_json(planned.model_dump_json())
    assert again == planned


def test_a_plan_without_a_frontier_says_why() -> None:
    for made, why in (
        (llama(layers=1), "the plan is an older one"),
        (plan([site("fc", 8, 8, 2)], uniform=True), "ranks are uniform"),
    ):
        budget = Page(diff_plan(made).to_html()).data["budget"]
        assert budget["frontier"] is None
        assert why in budget["why"]


# ---- measured losses ------------------------------------------------------------------


def test_measured_losses_have_a_column_and_a_drawing(held_against: Page, compressed: Plan) -> None:
    found = measured(compressed).fidelity
    assert found is not None
    values = dict(
        zip(
            held_against.data["sites"]["name"],
            held_against.column("measured KL, alone"),
            strict=True,
        )
    )
    assert values["model.layers.1.mlp.up_proj"] is None  # left dense
    for one in found.sites:
        assert values[one.name] == pytest.approx(one.measured, rel=1e-3)
    drawing = held_against.data["prediction"]["scatter"]
    assert len(drawing["marks"]) == len(found.sites)
    lines = " ".join(held_against.data["prediction"]["lines"])
    assert f"rank correlation of predicted and measured {found.rank_correlation:.2f}" in lines


def test_the_whole_is_not_the_sum_over_single_sites(held_against: Page) -> None:
    rows = {row[0]: row[1] for row in held_against.data["prediction"]["rows"]}
    assert rows["measured, the whole model on batches held back"].startswith("0.1729")
    whole, alone = (
        rows[f"measured, {what}"]
        for what in ("the whole model on other data", "sites one at a time, in sum")
    )
    assert whole != alone


def test_a_page_without_measurement_says_nothing_of_one(page: Page, compressed: Plan) -> None:
    first = page.data["cards"][0]
    assert first["big"] == "not measured"
    assert first["lines"][0] == "no calibration batch was held back"
    assert "measured KL, alone" not in [one["head"] for one in page.data["sites"]["columns"]]
    assert page.data["prediction"]["scatter"] is None
    assert fidelity_scatter(compressed) is None


def test_times_have_a_card(held_against: Page, page: Page) -> None:
    told, missing = (one.data["cards"][1] for one in (held_against, page))
    assert told["title"] == "forward pass"
    assert told["big"] == "1.06 times as fast"
    assert told["lines"] == [
        "1.42 s → 1.34 s for the recorded batch",
        "1.04..1.08; cpu, 2 threads, float32",
    ]
    assert missing["big"] == "not measured"


def test_amounts_of_the_batch_are_per_sample(page: Page, compressed: Plan) -> None:
    (card,) = [one for one in page.data["cards"] if one["title"].startswith("MACs")]
    before, after = compressed.model_before.macs // 2, compressed.model_after.macs // 2
    assert card["title"] == "MACs of the model per sample"
    assert card["lines"][0] == f"{before:,} → {after:,}"
    assert card["lines"][-1] == "the recorded batch: 2 samples of 50"
    whole = sum(one.before.macs for one in compressed.sites)
    assert sum(page.column("before", "MACs per sample")) == pytest.approx(whole / 2, rel=1e-3)
    unknown = diff_plan(compressed.model_copy(update={"batch": Batch()})).to_html()
    assert "MACs of the model per batch" in unknown
    assert "per sample" not in unknown


def test_a_bundle_counts_once() -> None:
    made = measured(shared())
    page = Page(diff_plan(made).to_html())
    names, values = page.data["sites"]["name"], page.column("measured KL, alone")
    told = dict(zip(names, values, strict=True))
    block = "model.layers.0.self_attn"
    assert told[f"{block}.k_proj"] is None
    assert told[f"{block}.q_proj"] > 0
    assert page.data["sites"]["bundles"][f"qkv@{block}.q_proj"]["sites"] == [
        *(f"{block}.{name}_proj" for name in "qkv")
    ]


def test_what_is_known_of_how_it_was_made(page: Page) -> None:
    data = page.data["reproduce"]
    assert data["compile"] == 'fxcompress.compile(model, "decoder.yaml", calibration, keep=0.8)'
    assert data["load"] == 'fxcompress.load("DIRECTORY")'
    assert ["seed", "0"] in data["facts"]
    assert data["stages"] == [["calibrate", 93.2]]
    planned = real()
    data = Page(diff_plan(planned).to_html()).data["reproduce"]
    assert ["fxcompress", fxcompress.__version__] in data["facts"]
    assert data["load"] == 'fxcompress.load("DIRECTORY", model)'


def test_two_plans_are_aligned_by_names(compressed: Plan) -> None:
    other = llama(layers=2, spectra=True)
    sites = (*other.sites[1:], site("extra", 8, 8, 2))
    other = other.model_copy(update={"sites": sites, "rules": "other.yaml"})
    data = Page(diff_plan(compressed).to_html(other)).data
    told = data["other"]
    there = {one.name: one for one in sites}
    for at, name in enumerate(data["sites"]["name"]):
        one = there.get(name)
        assert told["predicted"][at] == (None if one is None else one.predicted)
        assert told["parameters"][at] == (None if one is None else one.after.parameters)
    assert told["only"] == ["extra"]
    assert told["there"] == "other.yaml, keep 0.8"
    lines = comparison_text(compressed, other).split("operators differ\n")[1].splitlines()
    assert (
        [line.split()[0] for line in lines]
        == [
            compressed.sites[0].name,
            "model.layers.1.mlp.up_proj",  # dense here
            *(one.name for one in compressed.sites[14:]),  # the third block
            "extra",
        ]
    )
    assert lines[0].split()[-2:] == lines[-1].split()[1:3] == ["not", "matched"]


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
    assert isinstance(drawn, Plot)
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
