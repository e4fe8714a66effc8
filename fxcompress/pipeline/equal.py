"""Hidden values that matches would narrow, and groups of them that get one width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from fxcompress.forms.words import hidden_forms
from fxcompress.operators.per_channel import PerChannel
from fxcompress.rules import Match, MatchResult


@dataclass(frozen=True)
class HiddenSites:
    """The sites of a hidden value.

    Attributes:
        name: of their group.
        weights: of what makes its channels, and of its consumer, which stands last.
        match: of the consumer.
        held: what operators between them have of every channel.
        paths: of the operators, in the order of the weights.
        sized: whether an operator between them was given the number of channels.
    """

    name: str
    weights: tuple[str, ...]
    match: Match
    held: tuple[PerChannel, ...]
    paths: tuple[str, ...]
    sized: bool


def all_rigid(hidden: Sequence[HiddenSites]) -> list[tuple[HiddenSites, str]]:
    """Hidden values that may be given their number of channels, where none is tried."""
    return [(each, f"what {each.paths[-1]} reads {GIVEN}") for each in hidden if each.sized]


GIVEN = "is given the number of channels"


def equal_widths(
    hidden: Sequence[HiddenSites], matched: MatchResult, refused: Mapping[str, str]
) -> tuple[set[str], dict[str, str]]:
    """The weights of hidden values in groups of equal widths, and what they keep from being made.

    A group is narrowed as a whole or not at all, so what is refused of one is refused of all.  Its
    weights are in nothing else that rewrites several: every such thing would double the ways in
    which the solver can treat the group.

    Args:
        hidden: that could be narrowed by themselves.
        matched: what the rules match.
        refused: weight -> why the value that it reads is not among ``hidden``.

    Returns:
        Names of the weights, and as ``refused`` what is refused in addition.
    """
    owner: dict[str, str] = {}
    unequal: dict[str, str] = {}
    for name in dict.fromkeys(each.match.group for each in hidden if each.match.group is not None):
        members = [match for match in matched.matches if match.group == name]
        able = [match for match in members if hidden_forms(match.forms)]
        why = {m.path: refused[m.weight].partition(": ")[2] for m in able if m.weight in refused}
        why |= {m.path: "its rule does not offer it" for m in members if m not in able}
        if not why:
            own = (each.weights for each in hidden if each.match.group == name)
            owner |= dict.fromkeys(chain.from_iterable(own), name)
            continue
        path, reason = next(iter(why.items()))
        told = f"group {name!r} is narrowed as a whole, and {path} cannot be: {reason}"
        unequal |= {m.weight: f"{listed(m)}: {told}" for m in able if m.weight not in refused}
    others = [
        *((bundle.members, ", ".join(bundle.forms), bundle.members) for bundle in matched.bundles),
        *((h.weights, listed(h.match), (h.match.weight,)) for h in hidden if h.match.group is None),
    ]
    for held, forms, told_of in others:
        shared = next((weight for weight in held if weight in owner), None)
        if shared is not None:
            path, name = shared.rpartition(".")[0], owner[shared]
            reason = f"{forms}: {path} is in the equal widths of group {name!r}"
            unequal |= dict.fromkeys(told_of, reason)
    return {*owner}, unequal


def listed(match: Match) -> str:
    """The forms of a match that narrow."""
    return ", ".join(hidden_forms(match.forms))
