"""What a rule on its way through the steps has in common with every other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from operator import attrgetter

from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.language.schema import GraphNode, NodePattern, Rule
from fxcompress.rules.language.vocabulary import STEPS
from fxcompress.rules.matching.result import Bundle, Funnel, Instance, Losses, Lost, Match
from fxcompress.rules.matching.terms import Terms


class Run(ABC):
    """One rule: what it has of the graph so far, and what it lost.

    Attributes:
        loaded: the rule and its place.
        rule: the rule.
        rank: sorts the rule that wins an overlap first.
        terms: what the rule says about sites that it wins.
    """

    def __init__(self, loaded: LoadedRule) -> None:
        self.loaded = loaded
        self.rule = rule = loaded.rule
        self.rank = (-rule.priority, -rule.match.node_count, loaded.number)
        self.terms = Terms(loaded)

    @abstractmethod
    def settle(self, winners: dict[str, Run]) -> None:
        """Take what no earlier rule has won, and lose the rest.

        Args:
            winners: weight -> the run that won it; what this run takes is added.
        """

    @abstractmethod
    def matches(self) -> Iterable[tuple[int, Match]]:
        """The sites that the rule has, each with its position in the graph."""

    @abstractmethod
    def losses(self) -> Losses:
        """The sites that it lost."""

    @abstractmethod
    def funnel(self) -> Funnel:
        """How many were left after every step."""

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of matches, as ``expect`` counts them."""

    @property
    @abstractmethod
    def unit(self) -> str:
        """What is counted: ``"site"`` or ``"match"``."""

    def bundles(self) -> Iterable[tuple[int, Bundle]]:
        """Matches to be rewritten together, each with its position in the graph."""
        return ()

    def instances(self) -> tuple[Instance, ...] | None:
        """The matches of a rule about several operators; None for other rules."""
        return None

    def warnings(self) -> Iterable[str]:
        """What the rule had to do without."""
        return ()


def beaten(loser: Rule, winner: Rule) -> Lost:
    """Why a rule lost a site to another one."""
    if winner.rewrite == "none":
        return Lost("protected", f"protected by rule '{winner.id}' (rewrite: none)")
    if winner.priority > loser.priority:
        why = f"priority {winner.priority} > {loser.priority}"
    elif winner.match.node_count > loser.match.node_count:
        why = "a larger pattern"
    else:
        why = "earlier in the file"
    return Lost("overlap", f"taken by rule '{winner.id}' ({why})")


def pattern_nodes(rule: Rule) -> list[NodePattern | GraphNode]:
    """Every operator that the patterns of a rule name."""
    return [
        node
        for one in rule.match.alternatives
        for node in (one.node, one.group, *(one.nodes or {}).values())
        if node is not None
    ]


def funnel_steps(
    rule: Rule, total: int, reasons: Iterable[Lost], kept: int
) -> tuple[tuple[str, int], ...]:
    """The steps of a funnel: what is left of ``total`` after each that the rule has."""
    alternatives = rule.match.alternatives
    skipped = {
        "attribute": not any(node.attributes for node in pattern_nodes(rule)),
        "pattern": all(one.node is not None for one in alternatives),
        "scope": not any(one.scope for one in (rule.match, *alternatives)),
    }
    lost = Counter(map(attrgetter("step"), reasons))
    left = total
    counts = [("op", left)]
    for step in STEPS[: STEPS.index("overlap")]:
        left -= lost[step]
        if not skipped.get(step):
            counts.append((step, left))
    return (*counts, ("kept", kept))
