"""Forms of what a narrowed hidden value leaves: against dense weights, and in every use."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import fxcompress
from fxcompress import LoadError, RuleError
from fxcompress.plans.plan import SitePlan
from fxcompress.rules import LoadedRules, parse_rules
from tests.hidden import trained
from tests.test_narrow import BLOCKS, TEXT, data, network


def rules(
    keep: float = 0.5,
    then: str = "pivoted",
    forms: str = "narrow, pivoted",
    more: str = "",
    metric: str = "kfac",
    **extra: object,
) -> LoadedRules:
    text = TEXT.format(keep=keep, form=forms, more=more, metric=metric)
    keys = "".join(f", {key}: {value}" for key, value in extra.items())
    text = text.replace(f"[{forms}]}}", f"[{forms}], then: {then}{keys}}}")
    return parse_rules(text, "then.yaml")


def factorized(small: nn.Module) -> list[SitePlan]:
    found = [site for site in fxcompress.plan_of(small).sites if site.then is not None]
    assert found, "the solver took no form beside a narrowing"
    return found


def widened(small: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model that a compressed one stands for, written down by what a layer computes."""
    reference = copy.deepcopy(model)
    for at in (0, 1):
        block, own = small[at], reference[at]
        names = [name for name in ("gate", "up") if hasattr(own, name)]
        kept = kept_channels(fxcompress.plan_of(small), at)
        width = len(kept)
        for name in names:
            layer, dense = getattr(block, name), getattr(own, name)
            zero = layer(torch.zeros(1, dense.in_features).double())[0]
            eye = torch.eye(dense.in_features).double()
            dense.weight.data[kept] = (layer(eye) - zero).T
            if dense.bias is not None:
                dense.bias.data[kept] = zero
        zero = block.down(torch.zeros(1, width).double())[0]
        dense = torch.zeros_like(own.down.weight)
        dense[:, kept] = (block.down(torch.eye(width).double()) - zero).T
        own.down.weight.data = dense
    return reference


def kept_channels(plan: fxcompress.Plan, at: int) -> list[int]:
    """The channels that a hidden value keeps, by narrowing the model to the same widths alone."""
    width = {int(s.rank) for s in plan.sites if s.name.startswith(f"{at}.") and s.rank}
    (width,) = width
    text = TEXT.format(keep=1.0, form="narrow", more="", metric="kfac")
    text = text.replace("[narrow]}", f"[narrow], min_rank: {width}, max_rank: {width}}}")
    text = text.replace('"*.down"', f'"{at}.down"').replace("keep: 1.0", "keep: 0.999")
    model = network(CURRENT[0])
    alone = fxcompress.compile(model, parse_rules(text, "r.yaml"), data())
    rows, own = alone[at].up.weight, model[at].up.weight
    return [int((own - row).abs().sum(1).argmin()) for row in rows]


CURRENT = ["gated"]


@pytest.mark.parametrize("keep", [0.6, 0.35])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_dense_model_with_these_weights_says_the_same(block: str, keep: float) -> None:
    CURRENT[0] = block
    model = network(block)
    small = fxcompress.compile(model, rules(keep, forms="narrow"), data())
    factorized(small)
    x = data(1)[0]
    torch.testing.assert_close(small(x), widened(small, model)(x), rtol=1e-9, atol=1e-9)
    plan = fxcompress.plan_of(small)
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    for site in plan.sites:
        held = small.get_submodule(site.name)
        assert site.after.parameters == sum(p.numel() for p in held.parameters())
        assert site.parts


def test_it_loses_less_than_without() -> None:
    """The solver has more to choose from, so that it predicts no more."""
    for keep in (0.7, 0.5, 0.3):
        lost = fxcompress.plan(network(), rules(keep), data()).budget.predicted
        without = rules(keep, forms="narrow, pivoted", then="pivoted").rules.model_dump()
        del without["rules"][0]["rewrite"]["then"]
        more = fxcompress.plan(network(), parse_rules(json.dumps(without), "r.json"), data())
        assert lost < more.budget.predicted
        assert lost > 0


def test_at_full_rank_nothing_more_is_lost() -> None:
    """Factors of full rank are what they stand for: the model is the narrowed one to rounding."""
    text = TEXT.format(keep=0.999, form="narrow", more="", metric="kfac")
    text = text.replace("[narrow]}", "[narrow], max_rank: 21, min_rank: 12, then: low_rank}")
    model = network()
    small = fxcompress.compile(model, parse_rules(text, "r.yaml"), data())
    for site in fxcompress.plan_of(small).sites:
        assert site.then is None or site.then.rank == site.then.full_rank == 12


@pytest.mark.parametrize("metric", ["euclidean", "diagonal", "activation", "kfac", "elementwise"])
def test_every_metric_has_forms_for_what_is_left(metric: str) -> None:
    small = fxcompress.compile(network(), rules(0.2, metric=metric, forms="narrow"), data())
    factorized(small)
    assert bool(small(data(1)[0]).isfinite().all())


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = fxcompress.compile(network("gated with biases"), rules(0.35), data())
    factorized(small)
    fxcompress.save(small, tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", network("gated with biases"))
    x = data(1)[0]
    assert torch.equal(again(x), small(x))
    assert fxcompress.plan_of(again).sites == fxcompress.plan_of(small).sites


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 1}, "they are not what the form has at this rank"),
        ({"form": "nosuch"}, "nosuch"),
        ({"form": "embedding"}, "is no form for one linear"),
        ({"full_rank": 9, "rank": 1}, "full_rank is 9"),
        (None, "they are not what the form has at this rank"),
    ],
)
def test_an_altered_plan_is_refused(tmp_path: Path, change: object, message: str) -> None:
    small = fxcompress.compile(network(), rules(0.35), data())
    fxcompress.save(small, tmp_path / "out")
    path = tmp_path / "out" / "plan.json"
    plan = json.loads(path.read_text())
    site = next(site for site in plan["sites"] if site["then"])
    site["then"] = {**site["then"], **change} if isinstance(change, dict) else None
    path.write_text(json.dumps(plan))
    with pytest.raises(LoadError, match=message):
        fxcompress.load(tmp_path / "out", network())


def test_in_an_fx_graph() -> None:
    model = fx.symbolic_trace(network())
    small = fxcompress.compile(model, rules(0.35), data())
    assert isinstance(small, fx.GraphModule)
    x = data(1)[0]
    torch.testing.assert_close(
        small(x), fxcompress.compile(network(), rules(0.35), data())(x), rtol=1e-12, atol=1e-12
    )
    forms = {n.meta["fxcompress"]["form"] for n in small.graph.nodes if "fxcompress" in n.meta}
    assert "pivoted" in forms


def test_rounds_descend() -> None:
    more = "solver: {rounds: 2, steps: 3}"
    small = fxcompress.compile(network(), rules(0.4, more=more), data(8))
    factorized(small)
    once = fxcompress.compile(network(), rules(0.4), data(8))
    model, x = network(), torch.cat(data(2))
    with torch.no_grad():
        lost = [float((made(x) - model(x)).square().mean()) for made in (small, once)]
    assert lost[0] < lost[1]


@pytest.mark.parametrize("make", [network, lambda: fx.symbolic_trace(network())])
def test_while_training(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    small = trained(model, rules(0.4), data())
    factorized(small)
    x = data(1)[0]
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_measured_and_shown() -> None:
    model = network()
    small = fxcompress.compile(model, rules(0.35), data())
    factorized(small)
    found = fxcompress.measure(model, small, data(2))
    assert {one.name for one in found.sites} == {"0.down and its input", "1.down and its input"}
    assert found.measured > 0
    told = str(fxcompress.diff(model, small))
    assert "linear r→k" in told, told
    assert "add_ (the pivots, as they are)" in told, told
    assert "refitted, then pivoted, r " in told, told
    assert "narrow, pivoted" in str(fxcompress.plan_of(small))


def test_in_a_unit_of_time_or_of_bytes() -> None:
    for unit in ("latency", "bytes", "macs"):
        keep = 1.0 if unit == "latency" else 0.4  # time is that of a busy machine
        text = TEXT.format(keep=keep, form="narrow", more="", metric="kfac")
        text = text.replace("unit: parameters", f"unit: {unit}").replace(
            "[narrow]}", "[narrow], then: pivoted}"
        )
        plan = fxcompress.plan(network(), parse_rules(text, "r.yaml"), data())
        if unit != "latency":
            assert plan.budget.cost == sum(site.after[unit] for site in plan.sites)


def test_then_needs_a_narrowing() -> None:
    with pytest.raises(RuleError, match="'then' is about what narrow leaves"):
        rules(forms="pivoted")
    with pytest.raises(RuleError, match="no form for one operator"):
        rules(then="joint")
    with pytest.raises(RuleError, match="did you mean 'pivoted'"):
        rules(then="pivotd")
