"""Hidden values with fewer channels in rounds: thresholded again, and corrected in closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.isvt.correction import correctable, cross_moments, cut_again, fitted
from fxcompress.isvt.threshold import Thresholded
from fxcompress.rules import LoadedRules
from tests.isvt import problems
from tests.isvt.problems import Problem
from tests.test_narrow import data, network, rules
from tests.test_narrow_then import rules as then_rules


def put(case: Problem, cut: Thresholded) -> None:
    with torch.no_grad():
        for site, weight in [*cut.weights()]:
            case.found.model.get_parameter(site.weight).copy_(weight)


def read(weight: Tensor) -> list[int]:
    """Channels that a weight reads."""
    return (weight != 0).any(0).nonzero().flatten().tolist()


def test_what_was_narrowed_keeps_its_channels() -> None:
    """A second thresholding at the same budget takes nothing away, whatever was learned between."""
    case = Problem.of(network(), rules(0.5), data())
    put(case, case.threshold())
    with torch.no_grad():
        for name in ("0.down", "1.down"):
            weight = case.weight(name)
            weight.copy_((weight != 0) * (1 + 0.1 * torch.randn_like(weight)))  # much alike
    wanted = {name: case.weight(name).detach().clone() for name in ("0.down", "1.down")}
    again = case.threshold()
    assert again.predicted == 0
    assert again.ranks()["0.down"] == len(read(wanted["0.down"])) < 24
    put(case, again)
    for name, before in wanted.items():
        torch.testing.assert_close(case.weight(name), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["narrow", "joint"])
def test_the_correction_keeps_the_form(form: str) -> None:
    """Channels stay, and so does the rank of several operators together."""
    loaded = rules(0.5) if form == "narrow" else problems.rules(0.5, ["joint"], joint=True)
    case = Problem.of(network(), loaded, data())
    dense = copy.deepcopy(case.found.model)
    cut = case.threshold()
    put(case, cut)
    sites = correctable(case.found.sites, case.metrics)
    moments = cross_moments(dense, case.found.model, sites, data(), 1e-9, None, lambda: None)
    found = fitted(dense, case.found.model, sites, case.metrics, moments)
    weights = {site.name: weight for site, weight in cut_again(cut, found)}
    rank = cut.ranks()["0.up"]
    assert rank is not None
    if form == "joint":
        together = torch.cat([weights["0.gate"], weights["0.up"]])
        assert int((torch.linalg.svdvals(together) > 1e-9).sum()) == rank < 12
        return
    for name in ("0", "1"):
        kept = read(case.weight(f"{name}.down"))
        assert read(weights[f"{name}.down"]) == kept
        before, after = (_inputs(each, f"{name}.down") for each in (dense, case.found.model))
        wanted = before @ _weight(dense, f"{name}.down").T
        direct = torch.linalg.lstsq(after[:, kept], wanted).solution.T
        torch.testing.assert_close(weights[f"{name}.down"][:, kept], direct, rtol=1e-4, atol=1e-5)
        before, after = (_inputs(each, f"{name}.up") for each in (dense, case.found.model))
        direct = torch.linalg.lstsq(after, before @ _weight(dense, f"{name}.up").T).solution.T
        torch.testing.assert_close(weights[f"{name}.up"], direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["gated with biases", "plain"])
@pytest.mark.parametrize("made_by", [rules, then_rules], ids=["narrow", "then"])
def test_in_place(block: str, made_by: Callable[..., LoadedRules]) -> None:
    """A narrowed layer has a weight of the same name as before, and of another size."""
    loaded = made_by(0.4, more="solver: {rounds: 2, steps: 3, correct: true}")
    model = network(block)
    made = fxcompress.compile(network(block), loaded, data(8))
    assert fxcompress.compile(model, loaded, data(8), inplace=True) is model
    with torch.no_grad():
        for batch in data(2):
            assert torch.equal(model(batch), made(batch))


def test_the_correction_keeps_what_is_left() -> None:
    """Ranks within narrowed blocks; a thresholding of the outcome takes nothing away."""
    case = Problem.of(network("gated with biases"), then_rules(0.35), data(8))
    dense = copy.deepcopy(case.found.model)
    cut = case.threshold()
    decided = [*cut.solution.decided(cut.analysis.groups)]
    left = [group for group, choice in decided if group.narrowing and choice.form]
    assert left
    put(case, cut)
    sites = correctable([*case.found.sites], case.metrics)
    moments = cross_moments(dense, case.found.model, sites, data(8), 1e-9, None, lambda: None)
    found = fitted(dense, case.found.model, sites, case.metrics, moments)
    again = {site.name: weight for site, weight in cut_again(cut, found)}
    assert not torch.allclose(again["1.down"], case.weight("1.down"), rtol=1e-3)
    with torch.no_grad():
        for name, weight in again.items():
            case.weight(name).copy_(weight)
    assert case.threshold().ranks() == cut.ranks()
    assert case.threshold().predicted < 1e-9 * cut.predicted


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight").detach()


def _inputs(model: nn.Module, name: str) -> Tensor:
    """What a layer is given."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args: seen.append(args[0].detach())
    )
    for batch in data():
        model(batch)
    handle.remove()
    return torch.cat(seen)
