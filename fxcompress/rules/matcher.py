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
from fxcompress.rules.result import STEPS, Funnel, Losses, Lost, Match, MatchResult, Step
from fxcompress.rules.schema import Rewrite, Rule
from fxcompress.rules.sites import Site, SiteIndex
from fxcompress.rules.steps import Legality, StepCheck, legality_step, rule_steps
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
    legal = legality_step(loaded, legality)
    rules = enumerate(loaded.rules.rules)
    runs = [_Run(loaded, number, rule, index, legal) for number, rule in rules]
    _resolve_overlaps(runs)
    matches = [(site.order, run.match(site)) for run in runs for site in run.kept]
    matches.sort(key=lambda item: item[0])
    lost = MappingProxyType({run.rule.id: run.losses() for run in runs})
    funnels = MappingProxyType({run.rule.id: run.funnel() for run in runs})
    return MatchResult(
        matches=tuple(match for _, match in matches if match.forms),
        protected=tuple(match for _, match in matches if not match.forms),
        funnels=funnels,
        problems=find_problems(loaded, funnels, lost, index),
        lost=lost,
    )


class _Run:
    """One rule on its way: its sites so far, and those that it lost."""

    def __init__(
        self, loaded: LoadedRules, number: int, rule: Rule, index: SiteIndex, legal: StepCheck
    ) -> None:
        self.loaded = loaded
        self.number = number
        self.rule = rule
        self.location = loaded.location(rule.id)
        self.ops = tuple(dict.fromkeys(node.op for node in rule.match.alternatives))
        self.candidates = index.candidates(self.ops)
        self.kept: list[Site] = []
        self.lost_sites: list[Site] = []
        self.reasons: list[Lost] = []
        steps = rule_steps(rule, loaded, legal)
        # The one loop that runs rules times sites.
        keep, lose_site, lose_for = self.kept.append, self.lost_sites.append, self.reasons.append
        for site in self.candidates:
            for step in steps:
                lost = step(site)
                if lost is not None:
                    lose_site(site)
                    lose_for(lost)
                    break
            else:
                keep(site)
        self.own_losses = len(self.reasons)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts the rule that wins an overlap first."""
        return (-self.rule.priority, -self.rule.match.node_count, self.number)

    def lose(self, site: Site, lost: Lost) -> None:
        self.lost_sites.append(site)
        self.reasons.append(lost)

    def losses(self) -> Losses:
        if len(self.reasons) == self.own_losses:
            return Losses(tuple(self.lost_sites), tuple(self.reasons))
        # What was lost to other rules came last; the order wanted is that of the graph.
        orders = [site.order for site in self.lost_sites]
        turns = sorted(range(len(orders)), key=orders.__getitem__)
        return Losses(
            tuple(self.lost_sites[turn] for turn in turns),
            tuple(self.reasons[turn] for turn in turns),
        )

    def funnel(self) -> Funnel:
        lost: dict[Step, int] = dict.fromkeys(STEPS, 0)
        for loss in self.reasons:
            lost[loss.step] += 1
        left = len(self.candidates)
        counts = {"op": left}
        for step in STEPS[: STEPS.index("overlap")]:
            left -= lost[step]
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
            min_saving=(
                defaults.min_saving
                if given is None or given.min_saving is None
                else given.min_saving
            ),
            group=given.group if given else None,
            location=self.location,
            path=site.path,
        )


def _resolve_overlaps(runs: Sequence[_Run]) -> None:
    """Leave every site to one rule; the others lose it, with the winner as the reason."""
    winners: dict[str, _Run] = {}
    for run in sorted(runs, key=lambda run: run.rank):
        kept: list[Site] = []
        beaten_by: dict[int, Lost] = {}
        for site in run.kept:
            winner = winners.setdefault(site.key, run)
            if winner is run:
                kept.append(site)
                continue
            if winner.number not in beaten_by:
                beaten_by[winner.number] = _beaten(run.rule, winner.rule)
            run.lose(site, beaten_by[winner.number])
        run.kept = kept


def _beaten(loser: Rule, winner: Rule) -> Lost:
    if winner.rewrite == "none":
        return Lost("protected", f"protected by rule '{winner.id}' (rewrite: none)")
    if winner.priority > loser.priority:
        why = f"priority {winner.priority} > {loser.priority}"
    elif winner.match.node_count > loser.match.node_count:
        why = "a larger pattern"
    else:
        why = "earlier in the file"
    return Lost("overlap", f"taken by rule '{winner.id}' ({why})")
