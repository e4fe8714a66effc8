"""A rule about single operators on its way through the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import compress

from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.matching.result import Funnel, Losses, Lost, Match
from fxcompress.rules.matching.run import Run, beaten, funnel_steps
from fxcompress.rules.matching.sites import SiteIndex, WeightCalls
from fxcompress.rules.matching.steps import CallsCheck, site_steps


class SiteRun(Run):
    """One rule, column by column: every step sees all sites that are left."""

    def __init__(self, loaded: LoadedRule, index: SiteIndex, legal: CallsCheck) -> None:
        super().__init__(loaded)
        nodes = [one.node for one in self.rule.match.alternatives if one.node is not None]
        self._ops = tuple(dict.fromkeys(op for node in nodes for op in node.op))
        self._candidates = index.candidates(self._ops)
        self._kept: Sequence[WeightCalls] = self._candidates
        self._lost_sites: list[WeightCalls] = []
        self._reasons: list[Lost] = []
        for step in site_steps(loaded, legal):
            self._lose(step(self._kept))
        if self.terms.template is not None:
            self._lose([self.terms.misfit(site) for site in self._kept])
        formless = {op: self.terms.formless(op) for op in self._ops}
        if any(formless.values()):
            self._lose([formless[site.first.op] for site in self._kept])

    def _lose(self, verdicts: Sequence[Lost | None]) -> None:
        if any(verdicts):
            self._lost_sites += compress(self._kept, verdicts)
            self._reasons += filter(None, verdicts)
            pairs = zip(self._kept, verdicts, strict=True)
            self._kept = [site for site, lost in pairs if lost is None]

    def settle(self, winners: dict[str, Run]) -> None:
        won = [winners.setdefault(site.key, self) for site in self._kept]
        verdicts = {
            winner: None if winner is self else beaten(self.rule, winner.rule)
            for winner in dict.fromkeys(won)
        }
        self._lose([verdicts[winner] for winner in won])

    def matches(self) -> Iterator[tuple[int, Match]]:
        forms = {op: self.terms.forms(op) for op in self._ops}
        return ((s.order, self.terms.match(s, forms[s.first.op])) for s in self._kept)

    def losses(self) -> Losses:
        return Losses(tuple(self._lost_sites), tuple(self._reasons))

    def funnel(self) -> Funnel:
        steps = funnel_steps(self.rule, len(self._candidates), self._reasons, self.count)
        return Funnel(self.rule.id, self._ops, steps, self.loaded.line)

    @property
    def unit(self) -> str:
        return "site"

    @property
    def count(self) -> int:
        return len(self._kept)
