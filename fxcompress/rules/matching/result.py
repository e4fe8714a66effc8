"""What matching returns: matches, misses with their reasons, funnels and problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Literal, NamedTuple

from fxcompress.errors import RuleError
from fxcompress.rules.language.schema import Limits
from fxcompress.rules.language.vocabulary import STEPS, Step
from fxcompress.rules.matching.sites import WeightCalls


@dataclass(frozen=True)
class Match:
    """A site that a rule won.

    Attributes:
        rule_id: the rule.
        weight: name of the site's weight parameter.
        operators: names of the operators (calls) that read it, in graph order.
        op: canonical operator name.
        forms: forms to choose from, in the rule's order; empty if the rule protects the site.
        limits: ranks and savings that the rule asks for.
        group: name of the group whose sites get equal ranks, None without one.
        location: ``"file:line"`` of the rule.
        path: module path of the first operator.
        then: forms that operators around a narrowed hidden value may take beside that.
    """

    rule_id: str
    weight: str
    operators: tuple[str, ...]
    op: str
    forms: tuple[str, ...]
    limits: Limits
    group: str | None
    location: str
    path: str
    then: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bundle:
    """Sites of one match that one form may rewrite together.

    Each of them has a :class:`Match` of its own, too, whose ``forms`` may be empty.

    Attributes:
        name: of the bundle, unique: ``"qkv-shared@model.layers.0.self_attn.q_proj"``.
        rule_id: the rule.
        location: ``"file:line"`` of the rule.
        members: names of the weights, in the order of the pattern (of the graph for a
            ``group``).
        roles: the name in the pattern of each member (``("q", "k", "v")``; all alike for a
            ``group``).
        forms: joint forms to choose from, in the rule's order; never empty.
        limits: ranks and savings that the rule asks for.
    """

    name: str
    rule_id: str
    location: str
    members: tuple[str, ...]
    roles: tuple[str, ...]
    forms: tuple[str, ...]
    limits: Limits


@dataclass(frozen=True)
class Instance:
    """One match of a rule about several operators.

    Attributes:
        operators: (name in the pattern, module path) of each operator, in the order of the
            pattern; absent ones are left out.
        claimed: names of the weights that the rule won with it.
        counted: how many of the anchors that the funnel counts are in it.
    """

    operators: tuple[tuple[str, str], ...]
    claimed: tuple[str, ...]
    counted: int = 1


@dataclass(frozen=True)
class Lost:
    """Where and why a rule lost sites; sites lost for the same reason share one.

    Attributes:
        step: where.
        text: why, or what tells it: most reasons of a search are never read.
        location: ``"file:line:column"`` of the condition to blame; empty if there is none.
    """

    step: Step
    text: str | Callable[[], str]
    location: str = ""

    @property
    def reason(self) -> str:
        """Why."""
        return self.text if isinstance(self.text, str) else self.text()


def later(known: Lost | None, other: Lost) -> Lost:
    """The loss at the later step; of two at the same, the first."""
    if known is None or STEPS.index(other.step) > STEPS.index(known.step):
        return other
    return known


@dataclass(frozen=True)
class Losses:
    """The sites that one rule lost, and why each was; iteration is in graph order.

    Two parallel tuples: a pair for every site would keep the garbage collector busy.
    """

    sites: tuple[WeightCalls, ...]
    reasons: tuple[Lost, ...]

    def __iter__(self) -> Iterator[tuple[WeightCalls, Lost]]:
        orders = [site.order for site in self.sites]
        turns = sorted(range(len(orders)), key=orders.__getitem__)
        return ((self.sites[turn], self.reasons[turn]) for turn in turns)

    def furthest(self, count: int) -> tuple[tuple[WeightCalls, Lost], ...]:
        """The first few of those that were lost latest."""
        depth = max((STEPS.index(step) for step in {lost.step for lost in self.reasons}), default=0)
        found = (item for item in self if item[1].step == STEPS[depth])
        return tuple(islice(found, count))


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
        steps: (step, number left), in order: op, name, attribute and scope (if the rule asks
            for any), unless, where, legal, kept. A rule about several operators counts its
            anchors, and has a step pattern after attribute.
        location: ``"file:line"`` of the rule.
        anchors: names of the operators of the pattern that are counted; empty for a rule
            about one operator, which counts sites.
    """

    rule_id: str
    ops: tuple[str, ...]
    steps: tuple[tuple[str, int], ...]
    location: str = ""
    anchors: tuple[str, ...] = ()

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
        bundles: matches whose sites one form may rewrite together, in graph order.
        funnels: rule id -> its funnel, in file order.
        problems: rules that matched nothing, or not as many sites as they expect.
        lost: rule id -> the sites that it lost, from which the misses are made.
        instances: rule id -> its matches, for rules about several operators.
    """

    matches: tuple[Match, ...]
    protected: tuple[Match, ...]
    bundles: tuple[Bundle, ...]
    funnels: Mapping[str, Funnel]
    problems: tuple[Problem, ...]
    lost: Mapping[str, Losses] = field(repr=False)
    instances: Mapping[str, tuple[Instance, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def misses(self) -> tuple[Miss, ...]:
        """Sites that a rule's operator fits and that the rule did not get.

        By rule in file order, then in graph order.  Made when asked for: most are never read.
        """
        return tuple(miss for rule_id in self.lost for miss in self.misses_of(rule_id))

    def misses_of(self, rule_id: str) -> tuple[Miss, ...]:
        """The misses of one rule, in graph order.

        Raises:
            KeyError: there is no rule of that id.
        """
        whole = self.funnels[rule_id].location
        return tuple(
            Miss(
                rule_id,
                site.first.name,
                site.path,
                site.first.weight,
                lost.step,
                lost.reason,
                lost.location or whole,
            )
            for site, lost in self.lost[rule_id]
        )

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
