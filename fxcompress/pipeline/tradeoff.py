"""The frontier of a budget, and what came closest to being worth it, as a plan keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxcompress.budget import Choice, Frontier, Taken
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.sites import Group, Site, decoded, with_narrowed
from fxcompress.pipeline.solving import Solution
from fxcompress.plans.tradeoff import Closest, Curve, Offer, Tradeoff
from fxcompress.plans.units import UNITS
from fxcompress.report.quantities import loss

MOST_TOLD = 3
"""Choices of single sites that one offer names at most."""


def tradeoff(found: Frontier | None, groups: Sequence[Group]) -> Tradeoff | None:
    """The frontier with names of sites in place of candidates.

    Args:
        found: None if there is none.
        groups: that the candidates stand for.
    """
    if found is None:
        return None
    by_name = {group.name: group for group in reversed([*with_narrowed(groups)])}
    curves = [_curve(taken, by_name) for taken in zip(*found.taken, strict=True)]
    return Tradeoff(
        costs=found.costs,
        losses=found.losses,
        now=found.now,
        more=found.more,
        less=found.less,
        curves=tuple(curves),
    )


def _curve(taken: Sequence[Taken], groups: Mapping[str, Group]) -> Curve:
    names = dict.fromkeys(name for each in taken for name in each.choices)
    sites = dict.fromkeys(site.name for name in names for site in groups[name].sites)
    offers = [Offer(text=_text(each, groups), cost=each.cost, loss=each.loss) for each in taken]
    places = {offer: at for at, offer in enumerate(dict.fromkeys(offers))}
    return Curve(
        sites=tuple(sites),
        offers=tuple(places),
        taken=tuple(places[offer] for offer in offers),
    )


def _text(taken: Taken, groups: Mapping[str, Group]) -> str:
    """``pivoted 96``; ``narrow 1024, pivoted 96`` of a hidden value with forms for what is left."""
    width = taken.mode.rpartition(", ")[2] if ", " in taken.mode else ""
    told = [_choice(groups[name], one) for name, one in taken.choices.items()]
    chosen = [*dict.fromkeys(text for text in told if text != "dense")]
    texts = [width] * bool(width) + chosen[:MOST_TOLD] + ["..."] * (len(chosen) > MOST_TOLD)
    return ", ".join(texts) or "dense"


def _choice(group: Group, choice: Choice) -> str:
    if choice.form is None or choice.rank is None:
        return "dense"
    form = group.forms.get(choice.form)
    rank = choice.rank if form is None else decoded(form.full_rank(), choice.rank)
    return f"{choice.form} {rank if isinstance(rank, int) else '×'.join(map(str, rank))}"


def closest(site: Site, analysis: Analysis, solution: Solution) -> Closest | None:
    """What came closest to being worth it, of a site that stays dense; None without an offer."""
    near = solution.closest.get(site.name)
    if near is None:
        return None
    full = analysis.group(site.name).forms[near.form].full_rank()
    return Closest(
        form=near.form,
        rank=decoded(full, near.rank),
        saved=near.saved,
        worth=near.worth,
        loss=near.loss,
    )


def near_text(near: Closest, word: str) -> str:
    """Why a site stays dense, with the numbers.

    ::

        left dense by the budget: pivoted of rank 96 would save 9,216 parameters, worth a loss of
        0.0012, and lose 0.0031

    Args:
        near: what comes closest.
        word: of the unit of the budget.
    """
    rank = near.rank if isinstance(near.rank, int) else "×".join(map(str, near.rank))
    unit = UNITS[word]
    saved = f"1 {unit.one}" if near.saved == 1 else unit.named(near.saved)
    saved += " of the recorded batch" * unit.per_row
    said = f"left dense by the budget: {near.form} of rank {rank} would save {saved}"
    if near.worth <= 0.0:
        return f"{said}, which the budget does not need, and lose {loss(near.loss)}"
    said += f", worth a loss of {loss(near.worth)}, and lose {loss(near.loss)}"
    # The price settles it up to the gap: the integer programme spends what that leaves.
    return said if near.loss > near.worth else f"{said}: what other sites leave pays for it"
