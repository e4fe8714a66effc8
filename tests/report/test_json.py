import json

from fxcompress.plans.plan import Fidelity, SitePlan
from fxcompress.report import diff_plan
from tests.report.plans import llama, measured, plan, site


def test_round_trip() -> None:
    before = diff_plan(llama(layers=2, spectra=True, rewritten=True)).to_json()
    assert json.loads(json.dumps(before, allow_nan=False)) == before


def test_sites_are_complete() -> None:
    made = llama(layers=2, dense=["model.layers.1.mlp.up_proj"], spectra=True)
    entries = diff_plan(made).to_json()["sites"]
    assert tuple(SitePlan.model_validate(entry) for entry in entries) == made.sites


def test_totals_add_up() -> None:
    made = llama(layers=2)
    totals = {(one["unit"], one["of"]): one for one in diff_plan(made).to_json()["totals"]}
    assert len(totals) == 6
    matched = totals["macs", "matched"]
    assert matched["before"] == sum(one.before.macs for one in made.sites)
    assert matched["after"] == sum(one.after.macs for one in made.sites)
    assert matched["kept"] == matched["after"] / matched["before"]
    model = totals["bytes", "model"]
    assert model["before"] - model["after"] == made.model_before.bytes - made.model_after.bytes


def test_what_does_not_exist_is_null() -> None:
    diff = diff_plan(plan([site("fc", 8, 8, 2)], uniform=True)).to_json()
    assert diff["budget"]["gap"] is None
    assert diff["budget"]["multiplier"] is None
    assert diff["graph"] == {"before": 0, "after": None, "operators": {}}


def test_graph_counts_the_operators_that_change() -> None:
    diff = diff_plan(llama(layers=1, rewritten=True)).to_json()
    assert diff["graph"] == {
        "before": 9,
        "after": 14,
        "operators": {"linear": [8, 14], "embedding": [1, 0]},
    }


def test_what_was_measured_is_there_once_it_was() -> None:
    made = measured(llama(layers=2))
    entry = diff_plan(made).to_json()["fidelity"]
    assert Fidelity.model_validate(json.loads(json.dumps(entry))) == made.fidelity
    assert "fidelity" not in diff_plan(llama(layers=2)).to_json()
