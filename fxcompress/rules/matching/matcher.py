"""Match rules against a graph, and say for everything that was lost where and why.

A rule about single operators looks at sites, column by column (:mod:`.site_run`); one about
several searches the graph for them (:mod:`.graph_run`).  Both take the steps op, name,
attributes, pattern, scope, ``unless``, ``where``, legality; rules that want the same site are
then ranked by priority, pattern size and file order.  The graph is not changed, and every rule
sees all of it: one pass, no fixpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from types import MappingProxyType

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.loader import LoadedRules
from fxcompress.rules.matching.dataflow import Dataflow
from fxcompress.rules.matching.graph_run import GraphRun
from fxcompress.rules.matching.problems import find_problems
from fxcompress.rules.matching.result import MatchResult
from fxcompress.rules.matching.run import Run
from fxcompress.rules.matching.site_run import SiteRun
from fxcompress.rules.matching.sites import SiteIndex
from fxcompress.rules.matching.steps import JointLegality, Legality, legality_check


def _always_legal(operators: Sequence[Operator]) -> None:
    """Any operators may be rewritten together."""


def match_rules(
    loaded: LoadedRules,
    operators: Sequence[Operator],
    legality: Legality,
    joint_legality: JointLegality = _always_legal,
) -> MatchResult:
    """Match every rule against every operator.

    Args:
        loaded: the rules.
        operators: the graph, in execution order.
        legality: why an operator cannot be rewritten, or None if it can. Ties and repeated
            calls are seen here already (``defaults``) and need not be reported.
        joint_legality: why operators that can be rewritten one by one cannot be rewritten
            together, or None if they can.

    Returns:
        The result, whose ``check()`` raises where an ``expect`` is not met.

    Raises:
        RuleError: a ``where`` condition that has no truth value on some operator, or a pattern
            with too many ways to match; located.
    """
    index = SiteIndex.of(operators)
    graph = Dataflow.of(operators)
    legal = legality_check(loaded, legality)
    runs: list[Run] = [
        SiteRun(each, index, legal)
        if all(one.node is not None for one in each.rule.match.alternatives)
        else GraphRun(each, index, graph, legal, joint_legality)
        for each in loaded.each
    ]
    winners: dict[str, Run] = {}
    for run in sorted(runs, key=lambda run: run.rank):
        run.settle(winners)
    placed = [(order, run, match) for run in runs for order, match in run.matches()]
    placed.sort(key=itemgetter(0))
    bundles = sorted((item for run in runs for item in run.bundles()), key=itemgetter(0))
    instances = {run.rule.id: run.instances() for run in runs}
    return MatchResult(
        matches=tuple(match for _, run, match in placed if run.rule.rewrite != "none"),
        protected=tuple(match for _, run, match in placed if run.rule.rewrite == "none"),
        bundles=tuple(bundle for _, bundle in bundles),
        funnels=MappingProxyType({run.rule.id: run.funnel() for run in runs}),
        problems=find_problems(loaded, runs, index),
        lost=MappingProxyType({run.rule.id: run.losses() for run in runs}),
        instances=MappingProxyType(
            {rule_id: found for rule_id, found in instances.items() if found is not None}
        ),
    )
