"""Match rules against a graph, and say for every site that was lost where and why.

A rule takes its steps in the order op, name, attributes, ``unless``, ``where``, legality;
rules that want the same site are then ranked by priority, pattern size and file order.
The graph is not changed, and every rule sees all of it: one pass, no fixpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

from fxcompress.graph.operator import Operator
from fxcompress.rules.loader import LoadedRules
from fxcompress.rules.problems import find_problems
from fxcompress.rules.result import STEPS, Funnel, Match, MatchResult, Miss, Step
from fxcompress.rules.schema import Rewrite, Rule
from fxcompress.rules.sites import Site, SiteIndex
from fxcompress.rules.steps import (
    Condition,
    Excluded,
    Legality,
    Lost,
    StepCheck,
    illegal,
    positives,
)
from fxcompress.rules.vocabulary import forms_for


def match_rules(
    loaded: LoadedRules, operators: Sequence[Operator], legality: Legality
) -> MatchResult:
    """Match every rule against every operator.

    Args:
        loaded: the rules.
        operators: the graph, in execution order.
        legality: why an operator cannot be rewritten, or None if it can. Ties and repeated
            calls are seen here already (``defaults``) and need not be reported.

    Returns:
        The result, whose ``check()`` raises where an ``expect`` is not met.

    Raises:
        RuleError: a ``where`` condition that has no truth value on some operator, located.
    """
    index = SiteIndex.of(operators)
    legal = _Memo(legality)
    rules = enumerate(loaded.rules.rules)
    runs = [_Run.of(loaded, number, rule, index, legal) for number, rule in rules]
    _resolve_overlaps(runs)
    matches = [(site.order, run.match(site)) for run in runs for site in run.kept]
    matches.sort(key=lambda item: item[0])
    misses = tuple(miss for run in runs for miss in run.in_order())
    funnels = MappingProxyType({run.rule.id: run.funnel() for run in runs})
    return MatchResult(
        matches=tuple(match for _, match in matches if match.forms),
        protected=tuple(match for _, match in matches if not match.forms),
        misses=misses,
        funnels=funnels,
        problems=find_problems(loaded, funnels, misses, index),
    )


class _Memo:
    """The legality callback, asked once per operator however many rules want it."""

    def __init__(self, legality: Legality) -> None:
        self._legality = legality
        self._known: dict[str, str | None] = {}

    def __call__(self, operator: Operator) -> str | None:
        if operator.name not in self._known:
            self._known[operator.name] = self._legality(operator)
        return self._known[operator.name]


class _Run:
    """One rule on its way through the steps."""

    def __init__(self, loaded: LoadedRules, number: int, rule: Rule, ops: tuple[str, ...]) -> None:
        self.loaded = loaded
        self.number = number
        self.rule = rule
        self.ops = ops
        self.location = loaded.location(rule.id)
        self.kept: list[Site] = []
        self.candidates = 0
        self.lost: dict[Step, int] = dict.fromkeys(STEPS, 0)
        self._misses: list[tuple[int, Miss]] = []
        self._locations: dict[tuple[str | int, ...], str] = {(): self.location}

    @classmethod
    def of(
        cls, loaded: LoadedRules, number: int, rule: Rule, index: SiteIndex, legal: Legality
    ) -> _Run:
        """Take every candidate of one rule through its own steps; overlaps come later."""
        ops = tuple(dict.fromkeys(node.op for node in rule.match.alternatives))
        run = cls(loaded, number, rule, ops)
        expressions = enumerate(loaded.expressions[rule.id])
        steps: list[StepCheck] = [
            positives(rule),
            *(Excluded(i, entry, index) for i, entry in enumerate(rule.unless)),
            *(Condition(i, expression, rule, loaded) for i, expression in expressions),
            lambda site: illegal(site, rule, loaded, legal),
        ]
        for site in index.candidates(ops):
            run.candidates += 1
            lost = None
            for step in steps:
                lost = step(site)
                if lost is not None:
                    break
            if lost is None:
                run.kept.append(site)
            else:
                run.lose(site, lost)
        return run

    def lose(self, site: Site, lost: Lost) -> None:
        self.lost[lost.step] += 1
        location = self._locations.get(lost.keys)
        if location is None:
            location = self.loaded.location(self.rule.id, *lost.keys)
            self._locations[lost.keys] = location
        first = site.first
        miss = Miss(
            self.rule.id, first.name, first.path, first.weight, lost.step, lost.reason, location
        )
        self._misses.append((site.order, miss))

    def in_order(self) -> list[Miss]:
        self._misses.sort(key=lambda item: item[0])
        return [miss for _, miss in self._misses]

    def funnel(self) -> Funnel:
        left = self.candidates
        counts = {"op": left}
        for step in ("name", "attribute", "unless", "where", "legal"):
            left -= self.lost[step]
            counts[step] = left
        if not any(node.attributes for node in self.rule.match.alternatives):
            del counts["attribute"]
        counts["kept"] = len(self.kept)
        return Funnel(self.rule.id, self.ops, tuple(counts.items()), self.location)

    def match(self, site: Site) -> Match:
        defaults = self.loaded.rules.defaults
        rewrite = self.rule.rewrite
        given = rewrite if isinstance(rewrite, Rewrite) else None
        op = site.first.op
        return Match(
            rule_id=self.rule.id,
            weight=site.key,
            operators=tuple(operator.name for operator in site.operators),
            op=op,
            forms=forms_for(op, given.forms) if given else (),
            min_rank=(given and given.min_rank) or defaults.min_rank,
            max_rank=given.max_rank if given else None,
            multiple_of=(given and given.multiple_of) or defaults.multiple_of,
            group=given.group if given else None,
            location=self.location,
            path=site.first.path,
        )


def _resolve_overlaps(runs: Sequence[_Run]) -> None:
    """Leave every site to one rule; the others lose it, with the winner as the reason."""

    def rank(run: _Run) -> tuple[int, int, int]:
        return (-run.rule.priority, -run.rule.match.node_count, run.number)

    winners: dict[str, _Run] = {}
    for run in sorted(runs, key=rank):
        kept: list[Site] = []
        for site in run.kept:
            winner = winners.setdefault(site.key, run)
            if winner is run:
                kept.append(site)
            else:
                run.lose(site, _beaten(run, winner))
        run.kept = kept


def _beaten(loser: _Run, winner: _Run) -> Lost:
    if winner.rule.rewrite == "none":
        return Lost("protected", f"protected by rule '{winner.rule.id}' (rewrite: none)")
    if winner.rule.priority > loser.rule.priority:
        why = f"priority {winner.rule.priority} > {loser.rule.priority}"
    elif winner.rule.match.node_count > loser.rule.match.node_count:
        why = "a larger pattern"
    else:
        why = "earlier in the file"
    return Lost("overlap", f"taken by rule '{winner.rule.id}' ({why})")
