"""The global budget against every combination of choices, and its promises at size.

Nothing here uses the solver's own reduction of the candidates: choices are listed from the
options as they were given.
"""

from __future__ import annotations

import itertools
import math
import time
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.budget import (
    Allocation,
    Candidate,
    Choice,
    Option,
    allocate,
    allocate_uniform,
    permitted_ranks,
    solver,
)
from fxcompress.errors import BudgetError

# --- oracle -----------------------------------------------------------------------------------

Joint = dict[str, Choice]


def units(candidates: list[Candidate]) -> list[list[Candidate]]:
    """Sites and groups."""
    found: dict[object, list[Candidate]] = {}
    for candidate in candidates:
        found.setdefault(candidate.group or (candidate.name,), []).append(candidate)
    return list(found.values())


def joint_choices(unit: list[Candidate]) -> list[Joint]:
    """Every choice of a site or group, dense included, dominated ones too."""
    listed = [
        {
            (option.form, int(rank)): Choice(option.form, int(rank), float(loss), float(cost))
            for option in member.options
            for rank, loss, cost in zip(option.ranks, option.loss, option.cost, strict=True)
        }
        for member in unit
    ]
    joint = [{member.name: Choice(None, None, 0.0, member.dense_cost) for member in unit}]
    joint += [
        {member.name: choices[key] for member, choices in zip(unit, listed, strict=True)}
        for key in listed[0]
        if all(key in choices for choices in listed)
    ]
    return joint


def cost_of(*parts: Joint) -> float:
    return math.fsum(choice.cost for part in parts for choice in part.values())


def loss_of(*parts: Joint) -> float:
    return math.fsum(choice.loss for part in parts for choice in part.values())


def least_cost(candidates: list[Candidate]) -> float:
    return cost_of(*(min(joint_choices(unit), key=cost_of) for unit in units(candidates)))


def dense_cost(candidates: list[Candidate]) -> float:
    return math.fsum(candidate.dense_cost for candidate in candidates)


def least_loss(candidates: list[Candidate], budget: float) -> float:
    """The optimum, by trying every combination."""
    per_unit = [joint_choices(unit) for unit in units(candidates)]
    return min(
        loss_of(*combination)
        for combination in itertools.product(*per_unit)
        if cost_of(*combination) <= budget
    )


def dual_maximum(candidates: list[Candidate], budget: float) -> float:
    """max over λ of Σ min (loss + λ·cost) - λ·budget: concave, with its corners at slopes."""
    per_unit = [
        np.array([(cost_of(joint), loss_of(joint)) for joint in joint_choices(unit)])
        for unit in units(candidates)
    ]
    corners = {0.0}
    for points in per_unit:
        for (cost, loss), (other_cost, other_loss) in itertools.combinations(points, 2):
            if (cost - other_cost) * (loss - other_loss) < 0.0:
                corners.add(float((loss - other_loss) / (other_cost - cost)))
    return max(
        math.fsum(float((points[:, 1] + at * points[:, 0]).min()) for points in per_unit)
        - at * budget
        for at in corners
    )


def assert_sound(candidates: list[Candidate], budget: float, found: Allocation) -> None:
    """Every choice is one that the candidates offer, sums are right, the budget is kept."""
    assert list(found.choices) == [candidate.name for candidate in candidates]
    for unit in units(candidates):
        chosen = {member.name: found.choices[member.name] for member in unit}
        assert chosen in joint_choices(unit)
        dense = math.fsum(member.dense_cost for member in unit)
        assert cost_of(chosen) < dense or all(c.form is None for c in chosen.values())
    assert found.cost == math.fsum(choice.cost for choice in found.choices.values())
    assert found.loss == math.fsum(choice.loss for choice in found.choices.values())
    assert found.cost <= budget == found.budget
    assert found.gap >= 0.0
    assert found.multiplier >= 0.0


def better_single_moves(
    candidates: list[Candidate], budget: float, found: Allocation
) -> Iterator[Joint]:
    """Choices of one site or group that fit, the others as they are, and lose less."""
    for unit in units(candidates):
        names = {member.name for member in unit}
        present = {name: found.choices[name] for name in names}
        others = {name: choice for name, choice in found.choices.items() if name not in names}
        for joint in joint_choices(unit):
            if loss_of(joint) < loss_of(present) and cost_of(joint, others) <= budget:
                yield joint


# --- instances --------------------------------------------------------------------------------


def random_option(rng: np.random.Generator, form: str, m: int, n: int, most: int) -> Option:
    """Spectra or any falling losses; linear, concave or erratic costs; limits and multiples."""
    full = min(m, n)
    ranks = permitted_ranks(
        full,
        minimum=int(rng.integers(1, 3)),
        maximum=int(rng.integers(2, full + 1)),
        multiple_of=int(rng.integers(1, 3)),
    )
    if rng.random() < 0.5:
        ranks = np.sort(rng.permutation(ranks)[:most])
    ranks = ranks[:most]
    spectrum = np.sort(rng.exponential(size=full + 1) ** 2)[::-1] * rng.exponential()
    falling = [
        0.5 * (spectrum.sum() - np.cumsum(spectrum)),
        spectrum,
        np.round(3.0 * spectrum),  # ties and zeros
    ][rng.integers(3)]
    loss = np.maximum(falling[ranks - 1], 0.0)
    cost = [
        ranks * (m + n),
        ranks * (m + n - ranks),
        rng.integers(0, m * n + 5, ranks.size),
        rng.random(ranks.size) * m * n,  # not integers
    ][rng.integers(4)]
    return Option(form, ranks, loss, cost.astype(np.float64))


def random_problem(
    rng: np.random.Generator, sites: int, most: int = 3
) -> tuple[list[Candidate], float]:
    """Candidates, some in groups or with several forms or none, and a budget that can be met."""
    candidates: list[Candidate] = []
    for at in range(sites):
        m, n = (int(size) for size in rng.integers(3, 14, 2))
        forms = ["low_rank", "pivoted", "spatial"][: rng.integers(0, 4)]
        options = tuple(random_option(rng, form, m, n, most) for form in forms)
        group = None
        if options and rng.random() < 0.3:
            # A second member of the same shape, with losses and costs of its own.
            group = f"group{at}"
            twins = tuple(
                Option(
                    option.form,
                    option.ranks,
                    option.loss * rng.exponential(),
                    option.cost * float(rng.integers(1, 3)),
                )
                for option in options
                if option.ranks.size
            )
            if twins:
                candidates.append(Candidate(f"twin{at}", float(m * n), twins[::-1], group))
        candidates.append(Candidate(f"site{at}", float(m * n), options, group))
    candidates = [candidates[at] for at in rng.permutation(len(candidates))]
    least, dense = least_cost(candidates), dense_cost(candidates)
    return candidates, float(least + rng.random() * 1.02 * (dense - least))


def spectral(
    rng: np.random.Generator, name: str, m: int, n: int, *, concave: bool = False
) -> Candidate:
    """A site whose singular values fall like those of real weights."""
    order = np.arange(1, min(m, n) + 1)
    values = np.exp(rng.normal()) * order ** -rng.uniform(0.3, 1.2) * np.exp(-order / order.size)
    energy = values**2
    # From the smallest value up, so that the last entry is an exact 0.
    loss = 0.5 * (np.cumsum(energy[::-1])[::-1] - energy)
    loss[-1] = 0.0
    cost = order * (m + n - order if concave else m + n)
    return Candidate(
        name,
        float(m * n),
        (Option("pivoted" if concave else "low_rank", order, loss, cost.astype(np.float64)),),
    )


# --- against every combination ----------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_is_the_optimum_of_small_problems(block: int) -> None:
    for seed in range(30 * block, 30 * (block + 1)):
        rng = np.random.default_rng(seed)
        candidates, budget = random_problem(rng, sites=int(rng.integers(1, 5)))
        optimum = least_loss(candidates, budget)
        found = allocate(candidates, budget)
        assert_sound(candidates, budget, found)
        assert found.bound <= optimum * (1.0 + 1e-12), seed
        # All 300 of them are small enough for the search to be exact.
        assert found.loss == pytest.approx(optimum, rel=1e-12, abs=1e-12), seed


@pytest.mark.parametrize("seed", range(60))
def test_bound_is_the_maximum_of_the_dual(seed: int) -> None:
    rng = np.random.default_rng(5000 + seed)
    candidates, budget = random_problem(rng, sites=4, most=5)
    least, dense = least_cost(candidates), dense_cost(candidates)
    # In between, and where λ is nearly as large or as small as it gets.
    for amount in (budget, least + 1e-3 * (dense - least), dense - 1e-3 * (dense - least)):
        found = allocate(candidates, amount)
        expected = min(max(dual_maximum(candidates, amount), 0.0), found.loss)
        assert found.bound == pytest.approx(expected, rel=1e-9, abs=1e-11)


@pytest.mark.parametrize("seed", range(60))
def test_budgets_that_are_met_or_missed_by_one_rounding(seed: int) -> None:
    rng = np.random.default_rng(6000 + seed)
    candidates, _ = random_problem(rng, sites=3)
    least = least_cost(candidates)
    for _ in range(5):
        parts = [joint_choices(unit) for unit in units(candidates)]
        on_it = cost_of(*(part[rng.integers(len(part))] for part in parts))
        for budget in (on_it, math.nextafter(on_it, 0.0)):
            if budget >= least:
                found = allocate(candidates, budget)
                assert_sound(candidates, budget, found)
                assert found.loss == pytest.approx(least_loss(candidates, budget), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_is_within_its_gap_of_the_optimum(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates, budget = random_problem(rng, sites=3)
    optimum = least_loss(candidates, budget)
    found = allocate(candidates, budget)
    assert_sound(candidates, budget, found)
    assert found.bound <= optimum * (1.0 + 1e-12)
    assert found.loss <= optimum * (1.0 + 1e-12) + found.gap
    largest_step = max(
        max(loss_of(joint) for joint in joint_choices(unit)) for unit in units(candidates)
    )
    assert found.loss <= optimum * (1.0 + 1e-12) + largest_step


@pytest.mark.parametrize("seed", range(20))
def test_no_single_move_that_fits_lowers_the_loss(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    candidates, budget = random_problem(rng, sites=30, most=12)
    found = allocate(candidates, budget)
    assert_sound(candidates, budget, found)
    assert list(better_single_moves(candidates, budget, found)) == []


@pytest.mark.parametrize("seed", range(20))
def test_promises_hold_where_the_search_is_cut_short(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2000 + seed)
    candidates, budget = random_problem(rng, sites=30, most=12)
    exact = allocate(candidates, budget)
    for name, limit in (("NODES", 1), ("SIZES", (4,)), ("SIZES", ())):
        monkeypatch.setattr(solver, name, limit)
        found = allocate(candidates, budget)
        assert_sound(candidates, budget, found)
        assert list(better_single_moves(candidates, budget, found)) == []
        assert found.bound == exact.bound
        assert exact.loss <= found.loss * (1.0 + 1e-12)


def test_the_fill_looks_beyond_the_next_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    # The dual leaves 3 units: too few for the jump of b.  The next choice of a gains 0.1 per
    # unit, the next of b 1.5, but the one after next of a 2.
    monkeypatch.setattr(solver, "solved", lambda *_: None)
    ranks = permitted_ranks(3)
    a = Option("f", ranks, np.array([10.0, 9.9, 4.0]), np.array([0.0, 1.0, 3.0]))
    b = Option("f", ranks, np.array([300.0, 298.5, 0.0]), np.array([0.0, 1.0, 100.0]))
    found = allocate([Candidate("a", 500.0, (a,)), Candidate("b", 500.0, (b,))], 3.0)
    assert [choice.rank for choice in found.choices.values()] == [3, 1]


@pytest.mark.parametrize("seed", range(5))
def test_ends_on_the_budget_itself_when_that_takes_rounding(seed: int) -> None:
    # The budget is the rounded sum of costs that are no integers: a tolerance of any size,
    # or a running sum, would miss it on one side or the other.
    rng = np.random.default_rng(seed)
    ranks = permitted_ranks(6)
    candidates = [
        Candidate(
            f"site{at}",
            10.0,
            (Option("low_rank", ranks, 1.0 / ranks, ranks + rng.random(6)),),
        )
        for at in range(40)
    ]
    budget = math.fsum(float(candidate.options[0].cost[3]) for candidate in candidates)
    for amount in (budget, math.nextafter(budget, 0.0)):
        found = allocate(candidates, amount)
        assert found.cost <= amount
        assert list(better_single_moves(candidates, amount, found)) == []
    least = math.fsum(float(candidate.options[0].cost[0]) for candidate in candidates)
    assert allocate(candidates, least).cost == least
    with pytest.raises(BudgetError):
        allocate(candidates, math.nextafter(least, 0.0))


def test_is_singular_value_thresholding_for_equal_shapes() -> None:
    # Equal marginal costs everywhere: the optimum keeps the largest σ² of all sites together.
    rng = np.random.default_rng(0)
    size, kept = 12, 40
    spectra = [np.sort(rng.exponential(size=size))[::-1] for _ in range(8)]
    ranks = permitted_ranks(size)
    candidates = [
        Candidate(
            f"site{at}",
            1e9,
            (
                Option(
                    "low_rank",
                    ranks,
                    0.5 * (spectrum[::-1].cumsum()[::-1] - spectrum),
                    ranks * 20.0,
                ),
            ),
        )
        for at, spectrum in enumerate(spectra)
    ]
    found = allocate(candidates, kept * 20.0 + 19.0)
    # Every site keeps its first; the others compete.
    free = np.sort(np.concatenate([spectrum[1:] for spectrum in spectra]))[::-1]
    threshold = free[kept - len(spectra) - 1]
    expected = [1 + int((spectrum[1:] >= threshold).sum()) for spectrum in spectra]
    assert [choice.rank for choice in found.choices.values()] == expected
    # λ lies between the last that is kept and the first that is not: σ² > 2λ·(marginal cost).
    assert free[kept - len(spectra)] <= 2.0 * found.multiplier * 20.0 * (1 + 1e-9)
    assert 2.0 * found.multiplier * 20.0 <= threshold * (1 + 1e-9)


# --- budgets ----------------------------------------------------------------------------------


def test_a_generous_budget_leaves_everything_dense() -> None:
    rng = np.random.default_rng(0)
    ranks = permitted_ranks(4)
    candidates = [
        Candidate(f"site{at}", 30.0, (Option("f", ranks, rng.random() / ranks, ranks * 6.0),))
        for at in range(5)
    ]
    for budget in (150.0, 1e12):
        found = allocate(candidates, budget)
        assert {choice.form for choice in found.choices.values()} == {None}
        assert (found.loss, found.bound, found.multiplier, found.cost) == (0.0, 0.0, 0.0, 150.0)
    assert allocate(candidates, 149.0).loss > 0.0


def test_the_least_budget_gives_the_cheapest_choices() -> None:
    rng = np.random.default_rng(0)
    candidates = [spectral(rng, f"site{at}", 8, 12) for at in range(5)]
    found = allocate(candidates, 5 * 20.0)
    assert [choice.rank for choice in found.choices.values()] == [1] * 5
    # No other allocation is within the budget, and the bound says so.
    assert found.gap == pytest.approx(0.0, abs=1e-12 * found.loss)
    with pytest.raises(BudgetError) as caught:
        allocate(candidates, 99.5)
    assert str(caught.value) == (
        "the smallest total cost these rules allow is 100, the budget is 99.5; raise the "
        "budget, or allow lower ranks (min_rank, multiple_of) or match more operators"
    )


@pytest.mark.parametrize("seed", range(10))
def test_a_bigger_budget_has_no_larger_bound_loss_or_multiplier(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates, _ = random_problem(rng, sites=12, most=8)
    budgets = np.linspace(least_cost(candidates), dense_cost(candidates), 25)
    results = [allocate(candidates, float(budget)) for budget in budgets]
    for smaller, bigger in itertools.pairwise(results):
        assert bigger.bound <= smaller.bound * (1.0 + 1e-9) + 1e-12
        assert bigger.multiplier <= smaller.multiplier * (1.0 + 1e-9)
        # Problems of this size are solved exactly, so the loss falls too.
        assert bigger.loss <= smaller.loss * (1.0 + 1e-9) + 1e-12
    assert results[0].bound > results[-1].bound == 0.0


@pytest.mark.parametrize("cost_scale", [1.0, 2.0**-40, 3e9])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**30, 7e-13])
def test_scales_of_cost_and_loss_do_not_matter(cost_scale: float, loss_scale: float) -> None:
    rng = np.random.default_rng(3)
    candidates = [spectral(rng, f"s{at}", 20, 30, concave=at % 2 == 0) for at in range(12)]
    scaled = [
        Candidate(
            candidate.name,
            candidate.dense_cost * cost_scale,
            tuple(
                Option(o.form, o.ranks, o.loss * loss_scale, o.cost * cost_scale)
                for o in candidate.options
            ),
        )
        for candidate in candidates
    ]
    budget = 0.55 * dense_cost(candidates)
    plain, found = allocate(candidates, budget), allocate(scaled, budget * cost_scale)
    for name, choice in plain.choices.items():
        assert (found.choices[name].form, found.choices[name].rank) == (choice.form, choice.rank)
    assert found.bound == pytest.approx(plain.bound * loss_scale, rel=1e-9)
    assert found.multiplier == pytest.approx(plain.multiplier * loss_scale / cost_scale, rel=1e-9)


# --- special sites ----------------------------------------------------------------------------


def test_a_site_without_loss_takes_its_cheapest_choice_whatever_the_budget() -> None:
    ranks = permitted_ranks(4)
    zeros = Candidate("zeros", 30.0, (Option("low_rank", ranks, np.zeros(4), ranks * 6.0),))
    for budget in (6.0, 20.0, 1e6):
        found = allocate([zeros], budget)
        assert found.choices["zeros"] == Choice("low_rank", 1, 0.0, 6.0)
        assert (found.loss, found.bound, found.multiplier) == (0.0, 0.0, 0.0)
    # Without loss but no cheaper than dense: dense.
    dear = Candidate("dear", 6.0, zeros.options)
    assert allocate([dear], 6.0).choices["dear"] == Choice(None, None, 0.0, 6.0)


def test_sites_without_options_or_ranks_stay_dense() -> None:
    without_ranks = Option("low_rank", permitted_ranks(7, multiple_of=8), np.empty(0), np.empty(0))
    candidates = [
        Candidate("none", 10.0, ()),
        Candidate("empty", 5.0, (without_ranks,)),
        Candidate("a", 2.0, (), "group"),
        Candidate("b", 3.0, (), "group"),
    ]
    found = allocate(candidates, 20.0)
    assert [choice.cost for choice in found.choices.values()] == [10.0, 5.0, 2.0, 3.0]
    assert {choice.form for choice in found.choices.values()} == {None}
    with pytest.raises(BudgetError, match="these rules allow is 20, the budget is 19"):
        allocate(candidates, 19.0)


def test_no_candidates() -> None:
    found = allocate([], 0.0)
    assert (dict(found.choices), found.loss, found.cost, found.bound) == ({}, 0.0, 0.0, 0.0)


def test_a_rank_that_does_not_save_is_never_chosen() -> None:
    # 5x5 low_rank breaks even at 2.5: ranks 3 to 5 lose less than rank 2 but cost more than dense.
    ranks = permitted_ranks(5)
    option = Option("low_rank", ranks, np.array([9.0, 5.0, 1.0, 0.5, 0.0]), ranks * 10.0)
    candidates = [Candidate(name, 25.0, (option,)) for name in "abc"]
    chosen = {
        choice.rank
        for budget in range(30, 80)
        for choice in allocate(candidates, float(budget)).choices.values()
    }
    assert chosen == {1, 2, None}


def test_ties_go_to_the_cheaper_then_the_first() -> None:
    ranks = permitted_ranks(2)
    loss = np.array([2.0, 1.0])
    dear = Option("dear", ranks, loss, np.array([3.0, 5.0]))
    first = Option("first", ranks, loss, np.array([2.0, 4.0]))
    second = Option("second", ranks, loss, np.array([2.0, 4.0]))
    found = allocate([Candidate("site", 9.0, (dear, first, second))], 5.0)
    assert found.choices["site"] == Choice("first", 2, 1.0, 4.0)
    found = allocate([Candidate("site", 9.0, (second, dear, first))], 5.0)
    assert found.choices["site"] == Choice("second", 2, 1.0, 4.0)


def test_identical_sites_are_served_alike_every_time() -> None:
    rng = np.random.default_rng(0)
    option = spectral(rng, "any", 16, 16).options[0]
    candidates = [Candidate(f"site{at}", 256.0, (option,)) for at in range(20)]
    first = allocate(candidates, 0.5 * 20 * 256)
    again = allocate(candidates, 0.5 * 20 * 256)
    assert dict(first.choices) == dict(again.choices)
    assert first.multiplier == again.multiplier
    # All tie at λ: the budget left over by the tie has to be spent, not lost.
    assert first.budget - first.cost < 32.0


def test_the_better_of_two_forms_is_found_at_each_budget() -> None:
    # A form that saves at once but never loses little, and one that saves late.
    ranks = permitted_ranks(3)
    coarse = Option("coarse", ranks, np.array([4.0, 3.9, 3.8]), np.array([1.0, 2.0, 3.0]))
    fine = Option("fine", ranks, np.array([5.0, 2.0, 1.0]), np.array([6.0, 8.0, 9.0]))
    site = Candidate("site", 10.0, (coarse, fine))
    chosen = [allocate([site], float(budget)).choices["site"] for budget in range(1, 11)]
    assert [(choice.form, choice.rank) for choice in chosen] == [
        ("coarse", 1), ("coarse", 2), *[("coarse", 3)] * 5, ("fine", 2), ("fine", 3), (None, None),
    ]  # fmt: skip


# --- groups -----------------------------------------------------------------------------------


def member(name: str, ranks: list[int], form: str = "low_rank", group: str = "qkv") -> Candidate:
    array = np.array(ranks, dtype=np.int64)
    return Candidate(name, 100.0, (Option(form, array, 1.0 / array, array * 10.0),), group)


def test_a_group_gets_one_rank_that_all_its_members_permit() -> None:
    candidates = [
        member("q", [1, 2, 3, 4, 5, 6]),
        Candidate("other", 5.0, ()),
        member("k", [2, 4, 6, 8]),
        member("v", [4, 5, 6, 7]),
    ]
    found = allocate(candidates, 5.0 + 3 * 59.0)
    assert list(found.choices) == ["q", "other", "k", "v"]
    assert {found.choices[name] for name in "qkv"} == {Choice("low_rank", 4, 0.25, 40.0)}
    found = allocate(candidates, 5.0 + 3 * 60.0)
    assert {found.choices[name].rank for name in "qkv"} == {6}
    # One of them dense would fit; all of them would not.
    found = allocate(candidates, 5.0 + 299.0)
    assert {found.choices[name].rank for name in "qkv"} == {6}
    found = allocate(candidates, 5.0 + 300.0)
    assert {found.choices[name].form for name in "qkv"} == {None}


@pytest.mark.parametrize(
    "last",
    [member("v", [3, 5]), member("v", [2, 4], form="pivoted"), Candidate("v", 9.0, (), "qkv")],
)
def test_a_group_with_nothing_in_common_is_named_with_its_members(last: Candidate) -> None:
    candidates = [member("q", [2, 4]), Candidate("other", 5.0, ()), member("k", [2, 4]), last]
    with pytest.raises(BudgetError, match=r"group 'qkv': .* in common.*: 'q', 'k', 'v';"):
        allocate(candidates, 1e6)


# --- size -------------------------------------------------------------------------------------


def large(sites: int, rank: int, *, concave: bool) -> list[Candidate]:
    """Sites of rank ``rank`` with spectra of their own, and ranks and costs in common."""
    rng = np.random.default_rng(0)
    m, n = rank, 2 * rank
    candidates = [spectral(rng, f"site{at}", m, n, concave=concave) for at in range(sites)]
    shared = candidates[0].options[0]
    return [
        Candidate(
            candidate.name,
            candidate.dense_cost,
            (Option(shared.form, shared.ranks, candidate.options[0].loss, shared.cost),),
        )
        for candidate in candidates
    ]


def cheapest_step(candidates: list[Candidate], found: Allocation) -> float:
    """Least cost of a move to a choice with a lower loss."""
    least = math.inf
    for candidate in candidates:
        choice, (option,) = found.choices[candidate.name], candidate.options
        better = np.append(option.cost[option.loss < choice.loss], candidate.dense_cost)
        if choice.loss > 0.0:
            least = min(least, float(better.min()) - choice.cost)
    return least


@pytest.mark.parametrize("concave", [False, True])
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.9])
def test_many_sites(keep: float, concave: bool) -> None:
    candidates = large(200, 384, concave=concave)
    budget = keep * dense_cost(candidates)
    found = allocate(candidates, budget)
    assert found.cost <= budget
    assert budget - found.cost < cheapest_step(candidates, found)
    assert 0.0 < found.bound <= found.loss <= found.bound * 1.001
    assert found.loss < allocate_uniform(candidates, budget).loss


def test_memory_is_small_beside_the_candidates() -> None:
    candidates = large(1000, 1024, concave=False)
    given_bytes = sum(candidate.options[0].loss.nbytes for candidate in candidates)
    tracemalloc.start()
    try:
        allocate(candidates, 0.6 * dense_cost(candidates))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * given_bytes


@pytest.mark.slow
@pytest.mark.parametrize("concave", [False, True])
def test_ten_thousand_sites_of_rank_4096_take_seconds(concave: bool) -> None:
    candidates = large(10_000, 4096, concave=concave)
    budget = 0.6 * dense_cost(candidates)
    started = time.process_time()
    found = allocate(candidates, budget)
    assert time.process_time() - started < 30.0
    assert found.cost <= budget
    assert budget - found.cost < cheapest_step(candidates, found)
    assert 0.0 < found.bound <= found.loss <= found.bound * 1.001
