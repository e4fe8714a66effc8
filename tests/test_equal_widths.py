"""Hidden values of equal widths: one k for all of a group, and what cannot be in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.budget import Alternatives, Candidate, Mode, Option, allocate
from fxcompress.rules import LoadedRules, parse_rules

N, HIDDEN = 10, 24


class Gated(nn.Module):
    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(N, hidden, bias=False), nn.Linear(N, hidden)
        self.down = nn.Linear(hidden, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Leaking(Gated):
    """Of its hidden value something else is read."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h) + h.sum(-1, keepdim=True)


def network(*blocks: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(block() for block in blocks or (Gated,) * 4), nn.Linear(N, 6))
    with torch.no_grad():  # blocks that differ in how much they lose
        for at, block in enumerate(model[:-1]):
            block.down.weight *= 0.2 + at
    return model.double().eval()


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, N, generator=generator).double() for _ in range(4)]


def rules(
    keep: float | str,
    forms: str = "narrow",
    group: str | None = "widths",
    *,
    name: str = '"*.down"',
    more: str = "",
    rest: str = "",
    solver: str = "{}",
) -> LoadedRules:
    own = "" if group is None else f", group: {group}"
    budget = f"{{keep: {keep}, of: matched, unit: parameters}}" if isinstance(keep, float) else keep
    text = f"""
version: 1
budget: {budget}
metric: {{kind: kfac, output: gaussian, held_back: 0.0}}
solver: {solver}
rules:
  - id: hidden
    match: {{node: {{op: linear, name: {name}}}}}
    rewrite: {{any_of: [{forms}]{own}{more}}}
{rest}
"""
    return parse_rules(text, "equal.yaml")


def widths(plan: fxcompress.Plan) -> set[object]:
    return {site.rank for site in plan.sites}


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
def test_one_width_for_all(keep: float) -> None:
    """It is the greatest that the budget allows: the loss falls with it."""
    model = network()
    small = fxcompress.compile(model, rules(keep), data())
    plan = fxcompress.plan_of(small)
    assert {site.form for site in plan.sites} == {"narrow"}
    # 31 entries and one bias of up a channel, and the bias of down; all blocks are alike
    dense = 4 * ((3 * N + 1) * HIDDEN + N)
    k = int((keep * dense / 4 - N) // (3 * N + 1))
    assert widths(plan) == {k}
    assert {block.down.in_features for block in small[:-1]} == {k}
    kept = [
        {int((old.up.weight - row).abs().sum(1).argmin()) for row in new.up.weight}
        for new, old in zip(small[:-1], model[:-1], strict=True)
    ]
    assert len({frozenset(each) for each in kept}) == len(kept)  # each its own channels
    free = fxcompress.plan(network(), rules(keep, group=None), data())
    assert len(widths(free)) > 1
    assert free.budget.fitted <= plan.budget.fitted
    assert plan.budget.bound is not None
    assert plan.budget.bound <= plan.budget.fitted


def test_multiples_and_bounds() -> None:
    for more, expected in {"multiple_of: 8": 16, "max_rank: 10": 10, "min_rank: 20": 20}.items():
        keep = 0.95 if expected == 20 else 0.8
        plan = fxcompress.plan(network(), rules(keep, more=f", {more}"), data())
        (width,) = widths(plan)
        assert width == expected or (expected == 20 and int(str(width)) >= 20)


def test_with_low_rank_the_better_one_is_taken_for_all() -> None:
    """One form and one rank for the whole group: narrowed, or each layer that reads in low rank."""
    for keep in (0.5, 0.8, 0.95):
        both = fxcompress.plan(network(), rules(keep, "narrow, pivoted"), data())
        assert len({(site.form, site.rank) for site in both.sites if site.form}) == 1
        narrow = fxcompress.plan(network(), rules(keep), data())
        assert both.budget.fitted <= narrow.budget.fitted * (1 + 1e-9)


def test_with_forms_for_what_is_left() -> None:
    """Widths are equal, the ranks of what is left need not be."""
    then = fxcompress.compile(network(), rules(0.4, more=", then: pivoted"), data())
    plan = fxcompress.plan_of(then)
    assert len(widths(plan)) == 1
    assert any(site.then is not None for site in plan.sites)
    alone = fxcompress.plan(network(), rules(0.4), data())
    assert plan.budget.fitted <= alone.budget.fitted * (1 + 1e-9)
    assert plan.model_after.parameters == sum(p.numel() for p in then.parameters())


def test_beside_other_rules_and_groups() -> None:
    """Two groups, producers with a rule of their own, and one budget for all."""
    rest = """
  - id: last
    match: {node: {op: linear, name: "3.down"}}
    priority: 2
    rewrite: {form: narrow, group: last}
  - id: producers
    match: {node: {op: linear, name: "*.{gate,up}"}}
    rewrite: {form: pivoted}
"""
    plan = fxcompress.plan(network(), rules(0.6, rest=rest), data())
    found = {site.name: (site.form, site.rank) for site in plan.sites}
    first = {found[f"{at}.{name}"] for at in range(3) for name in ("gate", "up", "down")}
    last = {found[f"3.{name}"] for name in ("gate", "up", "down")}
    assert len(last) == 1
    assert len(first) == 1
    assert first != last
    assert next(iter(first))[0] == "narrow"


def test_several_budgets_and_uniform_ranks() -> None:
    budgets = "[{keep: 0.7, unit: parameters}, {keep: 0.6, unit: macs}]"
    several = fxcompress.plan(network(), rules(budgets), data())
    assert len(widths(several)) == 1
    given = rules(0.7, solver="{allocation: uniform}")
    uniform = fxcompress.plan(network(), given, data())
    assert len(widths(uniform)) == 1
    assert uniform.budget.cost <= uniform.budget.limit


def test_rounds_keep_widths_equal() -> None:
    given = rules(0.5, solver="{rounds: 2, steps: 2}")
    plan = fxcompress.plan_of(fxcompress.compile(network(), given, data()))
    assert len(widths(plan)) == 1


# ---- what is refused ------------------------------------------------------------------


def told(model: nn.Module, given: LoadedRules) -> str:
    return str(fxcompress.explain(model, given, data()[0]))


def test_a_group_is_narrowed_as_a_whole() -> None:
    model = network(Gated, Leaking, Gated)
    text = told(model, rules(0.9))
    assert "narrow: group 'widths' is narrowed as a whole, and 1.down cannot be: " in text
    plan = fxcompress.plan(model, rules(1.0), data())
    assert {site.form for site in plan.sites} == {None}
    assert all(
        "as a whole, and 1.down cannot be" in s.reason for s in plan.sites if s.name != "1.down"
    )
    free = fxcompress.plan(model, rules(0.9, group=None), data())
    assert {site.form for site in free.sites} == {None, "narrow"}


def test_a_group_of_which_one_has_other_forms() -> None:
    rest = """
  - id: other
    match: {node: {op: linear, name: "2.down"}}
    priority: 2
    rewrite: {form: pivoted, group: widths}
"""
    given = rules(1.0, "narrow, pivoted", rest=rest)
    assert "and 2.down cannot be: its rule does not offer it" in told(network(), given)
    plan = fxcompress.plan(network(), rules(0.8, "narrow, pivoted", rest=rest), data())
    assert {site.form for site in plan.sites} == {"pivoted"}


def test_widths_that_have_nothing_in_common() -> None:
    model = network(lambda: Gated(12), lambda: Gated(24))
    given = rules(0.8, more=", min_rank: 11, multiple_of: 5")
    with pytest.raises(fxcompress.BudgetError, match="group 'widths': its members have no form"):
        fxcompress.plan(model, rules(0.8, rest=APART, more=", min_rank: 13"), data())
    plan = fxcompress.plan(network(lambda: Gated(20), lambda: Gated(24)), given, data())
    assert widths(plan) == {15}


APART = """
  - id: small
    match: {node: {op: linear, name: "0.down"}}
    priority: 2
    rewrite: {form: narrow, group: widths}
"""


def test_what_overlaps_a_group_is_not_offered() -> None:
    rest = """
  - id: halves
    match: {group: {op: linear, name: "*.{gate,up}"}}
    rewrite: {any_of: [joint, pivoted]}
"""
    text = told(network(), rules(0.9, rest=rest))
    assert "joint: {0..3}.gate is in the equal widths of group 'widths'" in text
    plan = fxcompress.plan(network(), rules(0.6, rest=rest), data())
    assert {site.form for site in plan.sites} == {"narrow"}
    assert len(widths(plan)) == 1


def test_a_chain_is_in_no_group() -> None:
    """Its middle layer reads one hidden value and makes the next."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(N, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, N)
    ).double()
    text = told(model, rules(1.0, name='["2", "4"]'))
    assert "as a whole, and 4 cannot be: 2 is in a group of equal ranks" in text
    rest = """
  - id: first
    match: {node: {op: linear, name: "2"}}
    rewrite: {form: narrow}
"""
    text = told(model, rules(1.0, name='"4"', rest=rest))
    assert "narrow: 2 is in the equal widths of group 'widths'" in text


class Idle(Gated):
    """What it computes is not used."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return x


def test_without_influence_nothing_is_narrowed() -> None:
    """The others have equal widths; asked for, such a value is the first to go."""
    model = network(Gated, Idle, Gated)
    for group in ("widths", None):
        plan = fxcompress.plan(model, rules(0.8, group=group), data())
        forms = {site.name: (site.form, site.rank) for site in plan.sites}
        assert forms["1.down"][0] is None
        assert forms["0.down"][0] == "narrow"
        assert group is None or forms["0.down"] == forms["2.down"]
    plan = fxcompress.plan(model, rules(0.8, group=None, more=", unmeasured: true"), data())
    assert {site.name: site.rank for site in plan.sites}["1.down"] == 1


# ---- the solver -----------------------------------------------------------------------


def option(losses: Mapping[int, float]) -> tuple[Option, ...]:
    ranks = np.array([*losses], dtype=np.int64)
    return (Option("narrow", ranks, np.array([*losses.values()]), ranks * 1.0),)


def test_members_of_a_mode_may_be_a_group() -> None:
    wholes = (
        Candidate("a", None, option({1: 5.0, 2: 3.0, 3: 1.0}), "w"),
        Candidate("b", None, option({1: 0.3, 2: 0.2, 4: 0.1}), "w"),
    )
    single = Mode("single", (Candidate("x", 4.0, ()), Candidate("y", 4.0, ())))
    found = allocate([Alternatives("e", (single, Mode("narrow", wholes)))], 6.0)
    assert {name: each.rank for name, each in found.choices.items()} == {"a": 2, "b": 2}
    assert found.loss == pytest.approx(3.2)
    apart = [
        Alternatives("e", (single, Mode("narrow", wholes))),
        Candidate("c", 1.0, option({1: 0.5}), "w"),
    ]
    with pytest.raises(ValueError, match="group 'w' has members in 'c' and elsewhere"):
        allocate(apart, 9.0)
