"""Layers whose influence was not measured: kept as they are, and told of."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxcompress
from fxcompress.errors import CalibrationError
from fxcompress.metric import METRICS
from fxcompress.plans.plan import Plan, plan_of
from fxcompress.rules import LoadedRules, parse_rules

GRADIENTS = ["diagonal", "elementwise", "kfac", "ekfac"]


def rules(metric: str = "kfac", keep: float = 0.8, name: str = "*", **more: Any) -> LoadedRules:
    rewrite = {"any_of": ["pivoted", "low_rank"], **more.pop("rewrite", {})}
    rule = {"id": "r", "match": {"node": {"op": "linear", "name": name}}, "rewrite": rewrite}
    document = {"budget": {"keep": keep}, "metric": {"kind": metric}, "rules": [rule], **more}
    return parse_rules(json.dumps(document), "r.yaml")


def planned(model: nn.Module, loaded: LoadedRules, batches: Any, **more: Any) -> Plan:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxcompress.plan(model, loaded, batches, **more)


class Two(nn.Module):
    """A body, and a side whose result is joined in one of several ways."""

    def __init__(self, join: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.side, self.body, self.head = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 6)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh() + self.join(self.side, x))


@torch.no_grad()
def _no_grad(side: nn.Module, x: Tensor) -> Tensor:
    return side(x)


JOINS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "no_grad": _no_grad,
    "detach": lambda side, x: side(x).detach(),
    "argmax": lambda side, x: F.one_hot(side(x).argmax(-1), 24).to(x.dtype),
    "round": lambda side, x: side(x).round(),
    "reentrant": lambda side, x: checkpoint(side, x, use_reentrant=True),
}
DATA = [torch.randn(64, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("kind", GRADIENTS)
@pytest.mark.parametrize("join", JOINS)
def test_a_layer_that_no_gradient_comes_back_to_stays_dense(join: str, kind: str) -> None:
    plan = planned(Two(JOINS[join]).eval(), rules(kind), DATA)
    sites = {site.name: site for site in plan.sites}
    assert sites["side"].form is None
    assert "no influence was measured" in sites["side"].reason
    (note,) = [note for note in plan.warnings if note.startswith("side")]
    assert "unless" in note
    assert "unmeasured: true" in note
    assert ("no gradient came back" in note) == (join != "round")
    assert sites["body"].form is not None


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_rule_may_ask_for_it(kind: str) -> None:
    loaded = rules(kind, rewrite={"unmeasured": True})
    plan = planned(Two(JOINS["detach"]).eval(), loaded, DATA)
    sites = {site.name: site for site in plan.sites}
    assert sites["side"].form is not None
    assert any(note.startswith("side: rewritten") for note in plan.warnings)


@pytest.mark.parametrize("kind", ["activation", "euclidean"])
def test_metrics_without_gradients_need_none(kind: str) -> None:
    plan = planned(Two(JOINS["no_grad"]).eval(), rules(kind), DATA)
    assert not any("no influence" in note for note in plan.warnings)


def test_a_checkpoint_that_recomputes_is_seen_once() -> None:
    def join(side: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(side, x.requires_grad_(), use_reentrant=False)

    class Inner(Two):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.clone())

    there, here = Inner(join).eval(), Inner(lambda side, x: side(x)).eval()
    there.load_state_dict(here.state_dict())
    a, b = (planned(model, rules(), DATA) for model in (there, here))
    assert [s.rank for s in a.sites] == [s.rank for s in b.sites]
    assert not a.warnings


@pytest.mark.parametrize("solver", [{"rounds": 2, "steps": 2}, {"correct": True}])
def test_rounds_leave_it_dense(solver: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Two(JOINS["detach"]).eval()
        small = fxcompress.compile(model, rules(solver=solver), DATA)
    plan = plan_of(small)
    site = next(site for site in plan.sites if site.name == "side")
    assert site.form is None
    assert "no gradient came back" in site.reason
    assert any(note.startswith("side: left dense") for note in plan.warnings)
    assert torch.equal(small.side.weight, model.side.weight)


def test_nothing_measured_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 6)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1e4, 0, 0, 0, 0, 0]))
    with pytest.raises(
        CalibrationError, match=r"no influence .*(0, 1).*{kind: activation} need no"
    ):
        fxcompress.plan(model, rules(), DATA)


@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_sure_classifier_is_measured(kind: str) -> None:
    """Its gradients are 1e-25; ranks are those of a bound on the same in other words."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).eval()
    with torch.no_grad():
        model[2].bias[0] += 60.0
    plan = planned(model, rules(kind), DATA)
    assert not any("no influence" in note for note in plan.warnings)
    assert all(0 < site.predicted < 1e-20 for site in plan.sites if site.form is not None)
    assert all(site.spectrum[0] > 0 for site in plan.sites)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize(
    ("unit", "dtype"),
    [(2.0**60, torch.float32), (2.0**-83, torch.float32), (2.0**996, torch.float64),
     (2.0**-900, torch.float64)],
)  # fmt: skip
def test_predictions_do_not_depend_on_the_unit_of_inputs(
    kind: str, unit: float, dtype: torch.dtype
) -> None:
    if kind == "euclidean":
        pytest.skip("it looks at the weight alone")

    def run(unit: float) -> Plan:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).to(dtype).eval()
        model[0].weight.data /= unit
        return planned(model, rules(kind, keep=0.6), [unit * batch.to(dtype) for batch in DATA])

    there, here = run(unit), run(1.0)
    assert [site.rank for site in there.sites] == [site.rank for site in here.sites]
    assert there.budget.predicted == pytest.approx(here.budget.predicted, rel=1e-3)
    assert not there.warnings


# ---- which outputs count --------------------------------------------------------------


class Detector(nn.Module):
    def __init__(self, pixels: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.pixels = nn.Linear(12, 24), pixels
        self.cls, self.box = nn.Linear(24, 10), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).relu()
        return {"logits": self.cls(h), "pred_boxes": self.pixels * self.box(h)}


def test_boxes_beside_logits_count_in_any_unit() -> None:
    plans = [planned(Detector(pixels).eval(), rules(), DATA) for pixels in (1.0, 1024.0)]
    for plan in plans:
        assert plan.calibration["output"] == (
            "auto: logits categorical, pred_boxes gaussian of its own scale"
        )
        assert not plan.warnings
    assert [s.rank for s in plans[0].sites] == [s.rank for s in plans[1].sites]


def test_an_output_that_is_not_declared_leaves_its_layers_dense() -> None:
    metric = {"kind": "kfac", "output": {"logits": "categorical"}}
    plan = planned(Detector().eval(), rules(metric=metric["kind"]), DATA)
    assert plan.sites[-1].name == "box"
    document = json.loads(rules().text)
    document["metric"] = metric
    plan = planned(Detector().eval(), parse_rules(json.dumps(document), "r.yaml"), DATA)
    assert plan.sites[-1].form is None
    assert any(note.startswith("box: left dense") for note in plan.warnings)


def test_measure_sees_what_auto_saw() -> None:
    model = Detector().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = fxcompress.compile(model, rules(keep=0.5), DATA)
        found = fxcompress.measure(model, small, DATA)
    assert found.output == plan_of(small).calibration["output"]


@pytest.mark.parametrize(
    ("problem", "family"),
    [(None, "categorical"), ("single_label_classification", "categorical"),
     ("multi_label_classification", "bernoulli"), ("regression", "gaussian")],
)  # fmt: skip
def test_the_problem_type_of_a_config(problem: str | None, family: str) -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).eval()
    model.config = SimpleNamespace(problem_type=problem)
    assert planned(model, rules(), DATA).calibration["output"] == family


# ---- too few rows, and layers outside of the example ----------------------------------


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        which = x[:, 0].clamp(0, 2).long()
        out = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            if bool((which == at).any()):
                out[which == at] = expert(x[which == at])
        return self.head(out)


def tokens(*counts: int) -> Tensor:
    x = torch.randn(sum(counts), 12, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.repeat_interleave(torch.tensor([0.5, 1.5, 2.5]), torch.tensor(counts))
    return x


@pytest.mark.parametrize("kind", sorted(set(METRICS) - {"euclidean"}))
def test_a_layer_with_few_rows_is_named(kind: str) -> None:
    plan = planned(Experts().eval(), rules(kind, keep=0.9), [tokens(40, 40, 3)])
    (note,) = plan.warnings
    assert note.startswith("experts.2 (3 rows, 12 wide): ")


def test_layers_outside_of_the_example_are_named() -> None:
    batches = [tokens(40, 40, 0), tokens(40, 40, 40), tokens(40, 40, 40)]
    plan = planned(Experts().eval(), rules(keep=0.9), batches)
    (note,) = plan.warnings
    assert note.startswith("experts.2: ")
    assert "examples=[...]" in note
    assert not planned(Experts().eval(), rules(keep=0.9), batches, examples=[batches[1]]).warnings
    # A rule that is not about it has nothing to tell.
    assert not planned(Experts().eval(), rules(keep=0.9, name="head"), batches).warnings
