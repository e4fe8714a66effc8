"""What matching returns: matches, misses with their reasons, funnels and problems."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fxcompress.errors import RuleError

Step = Literal["name", "attribute", "unless", "where", "legal", "overlap", "protected"]
STEPS: tuple[Step, ...] = (
    "name",
    "attribute",
    "unless",
    "where",
    "legal",
    "overlap",
    "protected",
)
"""The steps at which a site can be lost, in the order in which they are taken."""


@dataclass(frozen=True)
class Match:
    """A site that a rule won.

    Attributes:
        rule_id: the rule.
        weight: name of the site's weight parameter.
        operators: names of the operators (calls) that read it, in graph order.
        op: canonical operator name.
        forms: forms to choose from, in the rule's order; empty if the rule protects the site.
        min_rank: lowest rank, the file's defaults merged in.
        max_rank: highest rank, None if it is free.
        multiple_of: what ranks are a multiple of, the file's defaults merged in.
        group: name of the group whose sites get equal ranks, None without one.
        location: ``"file:line"`` of the rule.
        path: module path of the first operator.
    """

    rule_id: str
    weight: str
    operators: tuple[str, ...]
    op: str
    forms: tuple[str, ...]
    min_rank: int
    max_rank: int | None
    multiple_of: int
    group: str | None
    location: str
    path: str


class Miss(NamedTuple):
    """A site that a rule did not get, and why.

    A named tuple, not a dataclass: large graphs under many rules have hundreds of thousands.

    Attributes:
        rule_id: the rule.
        operator: name of the site's first operator.
        path: its module path.
        weight: name of the weight parameter, None for an operator that reads none.
        step: where the site was lost.
        reason: why, with the values: ``"where: fc.in_features >= 256 is False
            (fc.in_features = 192)"``.
        location: ``"file:line:column"`` of the condition, ``"file:line"`` of the rule where
            no single condition is to blame.
    """

    rule_id: str
    operator: str
    path: str
    weight: str | None
    step: Step
    reason: str
    location: str


@dataclass(frozen=True)
class Funnel:
    """How many sites were left after every step of one rule.

    >>> funnel = Funnel("mlp", ("linear",), (("op", 211), ("name", 90), ("kept", 90)))
    >>> print(funnel)
    211 linear → 90 name → 90 kept
    >>> funnel["name"]
    90

    Attributes:
        rule_id: the rule.
        ops: operators that the rule is about.
        steps: (step, sites left), in order: op, name, attribute (if the rule asks for any),
            unless, where, legal, kept.
        location: ``"file:line"`` of the rule.
    """

    rule_id: str
    ops: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]
    location: str = ""

    def __getitem__(self, step: str) -> int:
        return dict(self.steps)[step]

    def __str__(self) -> str:
        words = {"op": " or ".join(self.ops)}
        return " → ".join(f"{count} {words.get(step, step)}" for step, count in self.steps)


@dataclass(frozen=True)
class Problem:
    """A rule that did not match what was to be expected."""

    severity: Literal["warning", "error"]
    rule_id: str
    text: str


@dataclass(frozen=True)
class MatchResult:
    """The outcome of matching a rule file against a graph.

    Attributes:
        matches: sites to be rewritten, in graph order.
        protected: sites that a rule with ``rewrite: none`` keeps dense, in graph order.
        misses: sites that a rule's operator fits and that it did not get; by rule in file
            order, then in graph order.
        funnels: rule id -> its funnel, in file order.
        problems: rules that matched nothing, or not as many sites as they expect.
    """

    matches: tuple[Match, ...]
    protected: tuple[Match, ...]
    misses: tuple[Miss, ...]
    funnels: Mapping[str, Funnel]
    problems: tuple[Problem, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """The texts of the warnings."""
        return tuple(item.text for item in self.problems if item.severity == "warning")

    def check(self) -> None:
        """Raise if a rule's ``expect`` is not met.

        Raises:
            RuleError: with the text of every such problem.
        """
        errors = [item.text for item in self.problems if item.severity == "error"]
        if errors:
            raise RuleError("\n".join(errors))
