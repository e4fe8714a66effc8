"""Sites by themselves or in a joint form, against every combination of choices."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest

from fxcompress.budget import (
    Allocation,
    Alternatives,
    Candidate,
    Choice,
    Entity,
    Mode,
    Option,
    allocate,
    allocate_uniform,
    least_cost,
    solver,
)
from fxcompress.errors import BudgetError


class Bundle(NamedTuple):
    """Names of candidates, and the joint forms that they may take together."""

    name: str
    members: tuple[str, ...]
    options: tuple[Option, ...]


def entities(candidates: list[Candidate], bundles: list[Bundle]) -> list[Entity]:
    """Candidates outside of bundles, then the bundles as alternatives."""
    by_name = {candidate.name: candidate for candidate in candidates}
    inside = {name for bundle in bundles for name in bundle.members}
    found: list[Entity] = [each for name, each in by_name.items() if name not in inside]
    for name, members, options in bundles:
        modes = [Mode("single", tuple(by_name[member] for member in members))]
        if options:
            modes.append(Mode("joint", (Candidate(name, None, options),)))
        found.append(Alternatives(name, tuple(modes)))
    return found


def option(form: str, losses: list[float], costs: list[float]) -> Option:
    ranks = np.arange(1, len(losses) + 1, dtype=np.int64)
    return Option(form, ranks, np.array(losses, dtype=float), np.array(costs, dtype=float))


def random_option(rng: np.random.Generator, form: str, dense: float, most: int = 4) -> Option:
    count = int(rng.integers(1, most + 1))
    losses = np.sort(rng.exponential(3.0, count))[::-1]
    costs = rng.random(count) * dense * 1.2  # not always increasing
    if rng.random() < 0.7:
        losses, costs = np.round(losses), np.round(costs)  # zeros and ties
    return option(form, losses.tolist(), costs.tolist())


def random_problem(seed: int) -> tuple[list[Candidate], list[Bundle]]:
    rng = np.random.default_rng(seed)
    candidates: list[Candidate] = []
    bundles: list[Bundle] = []
    for at in range(int(rng.integers(1, 4))):
        members = []
        for _ in range(int(rng.integers(1, 4))):
            dense = float(rng.integers(3, 12) + rng.integers(2) * rng.random())
            forms = ("low_rank", "pivoted")[: int(rng.integers(0, 3))]
            options = tuple(random_option(rng, form, dense, 2) for form in forms)
            members.append(Candidate(f"site{len(candidates)}", dense, options))
            candidates.append(members[-1])
        if rng.random() < 0.75 and len(bundles) < 2:
            whole = sum(member.dense_cost for member in members)
            forms = ("joint", "other")[: int(rng.integers(0, 3))]
            options = tuple(random_option(rng, form, whole, 3) for form in forms)
            bundles.append(Bundle(f"bundle{at}", tuple(m.name for m in members), options))
    return candidates, bundles


def choices_of(options: tuple[Option, ...]) -> list[Choice]:
    return [
        Choice(each.form, int(rank), float(loss), float(cost))
        for each in options
        for rank, loss, cost in zip(each.ranks, each.loss, each.cost, strict=True)
    ]


Way = tuple[tuple[float, ...], float]  # costs, whose exact sum counts, and loss


def undominated(ways: list[Way]) -> list[Way]:
    kept: list[Way] = []
    for way in sorted(ways, key=lambda way: (sum(map(Fraction, way[0])), way[1])):
        if not kept or way[1] < kept[-1][1]:
            kept.append(way)
    return kept


def together(parts: tuple[Way, ...]) -> Way:
    return tuple(cost for costs, _ in parts for cost in costs), math.fsum(loss for _, loss in parts)


def combinations(candidates: list[Candidate], bundles: list[Bundle]) -> list[tuple[float, float]]:
    """(cost, loss) of everything that can be done, but what is beaten within one bundle."""

    def alone(candidate: Candidate) -> list[Way]:
        dense: list[Way] = [((candidate.dense_cost,), 0.0)]
        return dense + [((c.cost,), c.loss) for c in choices_of(candidate.options)]

    by_name = {candidate.name: candidate for candidate in candidates}
    inside = {name for bundle in bundles for name in bundle.members}
    factors = [undominated(alone(each)) for name, each in by_name.items() if name not in inside]
    for bundle in bundles:
        members = [alone(by_name[name]) for name in bundle.members]
        apart = [together(parts) for parts in itertools.product(*members)]
        joint: list[Way] = [((c.cost,), c.loss) for c in choices_of(bundle.options)]
        factors.append(undominated(apart + joint))
    everything = [together(parts) for parts in itertools.product(*factors)]
    return [(math.fsum(costs), loss) for costs, loss in everything]


def assert_sound(
    candidates: list[Candidate], bundles: list[Bundle], budget: float, found: Allocation
) -> None:
    """The answer is one of the possible ones, and its sums are what it says."""
    spent = found.choices.values()
    assert found.cost == math.fsum(choice.cost for choice in spent) <= budget
    assert found.loss == math.fsum(choice.loss for choice in spent)
    assert found.bound <= found.loss
    assert list(found.modes) == [bundle.name for bundle in bundles]
    whole = {bundle.name: bundle for bundle in bundles if found.modes[bundle.name] == "joint"}
    inside = {name for bundle in whole.values() for name in bundle.members}
    alone = {each.name: each for each in candidates if each.name not in inside}
    assert found.choices.keys() == {*alone, *whole}
    for name, choice in found.choices.items():
        if name in whole:
            assert choice in choices_of(whole[name].options)
        elif choice.form is None:
            assert choice == Choice(None, None, 0.0, alone[name].dense_cost)
        else:
            assert choice in choices_of(alone[name].options)


def joint(found: Allocation) -> dict[str, Choice]:
    """What bundles in a joint form take."""
    return {n: found.choices[n] for n, mode in found.modes.items() if mode == "joint"}


PROBLEMS = [random_problem(seed) for seed in range(300)]


def budgets(candidates: list[Candidate], bundles: list[Bundle], seed: int) -> list[float]:
    """From the least to more than all dense; some that are met, or missed, by a rounding."""
    low = least_cost(entities(candidates, bundles))
    high = math.fsum(candidate.dense_cost for candidate in candidates)
    rng = np.random.default_rng(seed)
    between = [low + (high - low) * float(part) for part in rng.random(3)]
    met = allocate(entities(candidates, bundles), between[0]).cost
    return [low, *between, met, max(low, math.nextafter(met, 0.0)), high, 2.0 * high]


@pytest.mark.parametrize("block", range(5))
def test_is_the_optimum_of_small_problems(block: int) -> None:
    taken = 0
    for seed in range(60 * block, 60 * (block + 1)):
        candidates, bundles = PROBLEMS[seed]
        everything = combinations(candidates, bundles)
        assert least_cost(entities(candidates, bundles)) == min(cost for cost, _ in everything)
        for budget in budgets(candidates, bundles, seed):
            found = allocate(entities(candidates, bundles), budget)
            assert_sound(candidates, bundles, budget, found)
            optimum = min(loss for cost, loss in everything if cost <= budget)
            assert found.bound <= optimum * (1.0 + 1e-12)
            # All of them are small enough for the searches to be exact.
            assert found.loss == pytest.approx(optimum, rel=1e-12, abs=1e-12), (seed, budget)
            taken += bool(joint(found))
    assert taken > 100  # else this says nothing


def dual_maximum(candidates: list[Candidate], bundles: list[Bundle], budget: float) -> float:
    """max over λ of the dual: every combination is a line in λ, with corners where they meet."""
    ways: list[Way] = [((cost,), loss) for cost, loss in combinations(candidates, bundles)]
    points = np.array([(cost, loss) for (cost,), loss in undominated(ways)])
    costs, losses = points[:, 0], points[:, 1]
    corners = {0.0}
    for (cost, loss), (other_cost, other_loss) in itertools.combinations(points, 2):
        corners.add(float((loss - other_loss) / (other_cost - cost)))
    return max(float((losses + at * (costs - budget)).min()) for at in corners)


@pytest.mark.parametrize("seed", range(60))
def test_bound_is_the_maximum_of_the_dual(seed: int) -> None:
    candidates, bundles = PROBLEMS[seed]
    for budget in budgets(candidates, bundles, seed):
        found = allocate(entities(candidates, bundles), budget)
        expected = min(max(dual_maximum(candidates, bundles, budget), 0.0), found.loss)
        assert found.bound == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_promises_hold_where_the_searches_are_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    worse = 0
    for seed, (candidates, bundles) in enumerate(PROBLEMS):
        budget = budgets(candidates, bundles, seed)[1]
        exact = allocate(entities(candidates, bundles), budget)
        with monkeypatch.context() as patch:
            patch.setattr(solver, "solved", lambda *_: None)
            found = allocate(entities(candidates, bundles), budget)
        assert_sound(candidates, bundles, budget, found)
        assert found.bound <= exact.loss <= found.loss * (1.0 + 1e-12)
        worse += found.loss > exact.loss * (1.0 + 1e-9)
    assert worse > 0  # the limit did cut something short


def test_without_joint_options_bundles_change_nothing() -> None:
    for seed, (candidates, bundles) in enumerate(PROBLEMS[:60]):
        empty = [Bundle(bundle.name, bundle.members, ()) for bundle in bundles]
        for budget in budgets(candidates, [], seed):
            assert allocate(entities(candidates, empty), budget).loss == pytest.approx(
                allocate(candidates, budget).loss, rel=1e-12, abs=1e-12
            )


def test_the_whole_dense_costs_what_its_members_cost() -> None:
    # The rounded cost of the bundle makes the total one unit in the last place less than it is:
    # with it the budget just below would seem to be met.
    costs, other = [0.9, 0.9, 0.5], 0.26
    total = math.fsum([*costs, other])
    below = math.nextafter(total, 0.0)
    assert math.fsum([math.fsum(costs), other]) == below
    members = [Candidate(f"s{at}", cost, ()) for at, cost in enumerate(costs)]
    candidates = [*members, Candidate("other", other, ())]
    bundle = Bundle("b", tuple(each.name for each in members), (option("joint", [1.0], [1.0]),))
    assert not joint(allocate(entities(candidates, [bundle]), total))
    assert joint(allocate(entities(candidates, [bundle]), below))


def test_below_the_least_cost_is_an_error() -> None:
    for candidates, bundles in PROBLEMS[:50]:
        low = least_cost(entities(candidates, bundles))
        with pytest.raises(BudgetError, match="the smallest total cost these rules allow is"):
            allocate(entities(candidates, bundles), low - 0.5)
        with pytest.raises(BudgetError, match="the smallest total cost these rules allow is"):
            allocate_uniform(entities(candidates, bundles), low - 0.5)


def test_uniform_keeps_the_budget() -> None:
    taken = 0
    for seed, (candidates, bundles) in enumerate(PROBLEMS[:100]):
        for budget in budgets(candidates, bundles, seed):
            found = allocate_uniform(entities(candidates, bundles), budget)
            assert_sound(candidates, bundles, budget, found)
            assert (found.bound, math.isnan(found.multiplier)) == (0.0, True)
            best = allocate(entities(candidates, bundles), budget)
            assert best.loss <= found.loss * (1.0 + 1e-12) + 1e-12
            taken += bool(joint(found))
    assert taken > 50


@pytest.mark.parametrize(
    ("budget", "ranks"),
    [
        (10.0, ("joint", 1)),  # no member is that cheap
        (40.0, ("joint", 2)),
        (60.0, ("low_rank", 1)),  # within 60 of 100 for each: loss 2 + 2 against 5
        (100.0, (None, None)),
    ],
)
def test_uniform_takes_the_better_mode_within_the_fraction(
    budget: float, ranks: tuple[str | None, int | None]
) -> None:
    members = [Candidate(name, 50.0, (option("low_rank", [2.0], [25.0]),)) for name in "qk"]
    bundle = Bundle("b", ("q", "k"), (option("joint", [9.0, 5.0], [10.0, 30.0]),))
    found = allocate_uniform(entities(members, [bundle]), budget)
    assert {(choice.form, choice.rank) for choice in found.choices.values()} == {ranks}
    assert bool(joint(found)) == (ranks[0] == "joint")


def low_rank(name: str, sigma: list[float], m: int, n: int) -> Candidate:
    squares = 0.5 * np.array(sigma) ** 2
    tail = np.append(squares[::-1].cumsum()[::-1], 0.0)
    ranks = np.arange(1, len(sigma) + 1, dtype=np.int64)
    made = Option("low_rank", ranks, tail[1:], (ranks * (m + n)).astype(float))
    return Candidate(name, float(m * n), (made,))


def joint_of(name: str, members: list[Candidate], sigma: list[float], cost: int) -> Bundle:
    whole = low_rank(name, sigma, 0, cost).options[0]
    option = Option("joint", whole.ranks, whole.loss, whole.cost)
    return Bundle(name, tuple(member.name for member in members), (option,))


def test_a_bundle_of_equals_shares_its_half() -> None:
    """Three operators with one row space: the joint form loses nothing at its rank."""
    members = [low_rank(name, [3.0, 2.0, 1.0, 0.5], 8, 8) for name in "qkv"]
    bundle = joint_of("b", members, [math.sqrt(3) * s for s in (3.0, 2.0, 1.0, 0.5)], 8 + 3 * 8)
    found = allocate(entities(members, [bundle]), 100.0)
    assert joint(found)["b"].rank == 3
    apart = allocate(members, 100.0)
    assert found.loss < apart.loss
    assert not joint(apart)


def test_a_bundle_of_strangers_stays_apart() -> None:
    """No common row space: the stacked spectrum is the union, and sharing saves too little."""
    members = [low_rank(name, [3.0, 2.0, 1.0, 0.5], 8, 8) for name in "qkv"]
    bundle = joint_of("b", members, sorted([3.0, 2.0, 1.0, 0.5] * 3, reverse=True), 8 + 3 * 8)
    found = allocate(entities(members, [bundle]), 100.0)
    assert not joint(found)
    assert dict(found.choices) == dict(allocate(members, 100.0).choices)


def test_a_generous_budget_leaves_all_members_dense() -> None:
    members = [low_rank(name, [3.0, 2.0], 8, 8) for name in "qk"]
    bundle = joint_of("b", members, [3.0, 2.0], 24)
    # A joint choice without loss is cheaper than dense, and taken whatever the budget.
    assert joint(allocate(entities(members, [bundle]), 1000.0))["b"].rank == 2
    lossy = Bundle("b", ("q", "k"), (option("joint", [1.0], [10.0]),))
    bare = [Candidate(name, 64.0, ()) for name in "qk"]
    found = allocate(entities(bare, [lossy]), 128.0)
    assert {choice.form for choice in found.choices.values()} == {None}
    assert (found.loss, found.cost, found.multiplier) == (0.0, 128.0, 0.0)
    assert joint(allocate(entities(bare, [lossy]), 127.0))["b"].cost == 10.0


def test_degenerate_bundles() -> None:
    bare = [Candidate(name, 4.0, ()) for name in "qk"]
    empty = Bundle("b", ("q", "k"), ())
    assert allocate(entities(bare, [empty]), 8.0).cost == 8.0
    with pytest.raises(BudgetError):
        allocate(entities(bare, [empty]), 7.0)
    alone = Bundle("b", ("q",), (option("joint", [0.5], [1.0]),))
    assert joint(allocate(entities(bare, [alone]), 5.0))["b"].loss == 0.5
    tie = [Candidate("q", 4.0, (option("low_rank", [1.0], [2.0]),))]
    same = Bundle("b", ("q",), (option("joint", [1.0], [2.0]),))
    assert not joint(allocate(entities(tie, [same]), 2.0))  # of equal ones the members' own
    assert allocate([], 0.0).loss == 0.0


def mode(name: str, *members: str) -> Mode:
    return Mode(name, tuple(Candidate(member, 4.0, ()) for member in members))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [Alternatives("b", (mode("single", "q"),)), Alternatives("c", (mode("single", "q"),))],
            "alternatives 'c': their member 'q' is in alternatives 'b' already",
        ),
        (
            [Candidate("q", 4.0, ()), Alternatives("b", (mode("single", "q"),))],
            "alternatives 'b': their member 'q' is a candidate already",
        ),
        (
            [Alternatives("b", (mode("single", "q"),)), Candidate("q", 4.0, ())],
            "two candidates have the name 'q'",
        ),
        (
            [Alternatives("b", (mode("single", "q"),)), Alternatives("b", (mode("single", "k"),))],
            "two alternatives have the name 'b'",
        ),
    ],
)
def test_names_that_clash_are_named(given: list[Entity], message: str) -> None:
    for solve in (allocate, allocate_uniform):
        with pytest.raises(ValueError, match=message):
            solve(given, 100.0)
    with pytest.raises(ValueError, match=message):
        least_cost(given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mode("single", "q", "q"), "mode 'single': its member 'q' is in it already"),
        (lambda: Mode("8", (), -1.0), "mode '8': loss must be finite and not negative"),
        (lambda: Mode("8", (), 0.0, math.inf), "mode '8': cost must be finite and not negative"),
        (lambda: Alternatives("b", ()), "alternatives 'b' have no mode"),
        (
            lambda: Alternatives("b", (mode("8", "q"), mode("8", "k"))),
            "alternatives 'b': two modes have the name '8'",
        ),
        (lambda: Candidate("b", None, ()), "candidate 'b' has no rank, and it cannot stay dense"),
        (
            lambda: Candidate("b", None, (option("joint", [np.inf, 2.0], [1.0, 2.0]),)),
            "candidate 'b', option 'joint': loss must be finite",
        ),
    ],
)
def test_what_is_malformed_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def large(bundles: int, rank: int) -> tuple[list[Candidate], list[Bundle]]:
    """Bundles of three with spectra of their own; sharing pays for about half of them."""
    rng = np.random.default_rng(0)
    ranks = np.arange(1, rank + 1, dtype=np.int64)
    candidates, made = [], []
    for at in range(bundles):
        tails = []
        for part in range(3):
            sigma = np.sort(rng.exponential(size=rank))[::-1]
            tail = np.append((sigma**2)[::-1].cumsum()[::-1], 0.0)[1:] / 2
            tails.append(tail)
            option = Option("low_rank", ranks, tail, ranks * (2.0 * rank))
            candidates.append(Candidate(f"{at}.{part}", float(rank * rank), (option,)))
        together = np.sum(tails, axis=0) * rng.uniform(0.9, 4.0)
        joint = Option("joint", ranks, together, ranks * (4.0 * rank))
        made.append(Bundle(f"b{at}", tuple(f"{at}.{part}" for part in range(3)), (joint,)))
    return candidates, made


def test_many_bundles() -> None:
    candidates, bundles = large(200, 64)
    budget = 0.5 * sum(candidate.dense_cost for candidate in candidates)
    found = allocate(entities(candidates, bundles), budget)
    assert_sound(candidates, bundles, budget, found)
    assert 0 < len(joint(found)) < len(bundles)
    assert found.gap <= 1e-3 * found.loss
    assert found.loss <= allocate(candidates, budget).loss
    assert found == allocate(entities(candidates, bundles), budget)


@pytest.mark.slow
def test_ten_thousand_sites_in_bundles_take_seconds() -> None:
    candidates, bundles = large(3333, 4096)
    budget = 0.5 * sum(candidate.dense_cost for candidate in candidates)
    start = time.process_time()
    found = allocate(entities(candidates, bundles), budget)
    assert time.process_time() - start < 30
    assert found.gap <= 1e-6 * found.loss
    assert joint(found)
