"""What may become a match of a rule about several operators, and the conditions on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.language.schema import Alternative
from fxcompress.rules.matching.result import Lost
from fxcompress.rules.matching.scopes import scope_test
from fxcompress.rules.matching.sites import WeightCalls
from fxcompress.rules.matching.steps import (
    CallsCheck,
    Condition,
    Keys,
    conditions,
    exclusion,
    has_weight,
    scope_loss,
)
from fxcompress.rules.matching.terms import Claim


@dataclass(frozen=True)
class PatternFit:
    """Operators that fit a pattern.

    Attributes:
        bound: name in the pattern -> the operators that it stands for, each as a site of one
            call: one, none for an optional operator that is absent, all members of a group.
    """

    bound: Mapping[str, tuple[WeightCalls, ...]]

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators, in the order of the pattern."""
        return tuple(call.first for calls in self.bound.values() for call in calls)


class CandidateCheck:
    """The steps that a candidate takes after its pattern: scope, unless, where, legality."""

    def __init__(
        self,
        loaded: LoadedRule,
        alternative: Alternative,
        legal: CallsCheck,
        keys: Keys,
    ) -> None:
        scopes = {keys: alternative.scope, ("match",): loaded.rule.match.scope}
        self._scopes = [
            (scope_test(globs), scope_loss(globs, loaded, place))
            for place, globs in scopes.items()
            if globs is not None
        ]
        self._exclusions = [
            (entry.node, exclusion(number, loaded))
            for number, entry in enumerate(loaded.rule.unless)
        ]
        self._conditions = conditions(loaded)
        self._legal = has_weight if loaded.rule.rewrite == "none" else legal
        self._known: dict[tuple[int, str], Lost | None] = {}

    def lost(self, candidate: PatternFit, claims: Sequence[Claim]) -> Lost | None:
        """Where and why a candidate is lost; None if it is not."""
        operators = candidate.operators
        for encloses, lost_scope in self._scopes:
            if not encloses(operators):
                return lost_scope
        for node, check in self._exclusions:
            lost = self._excluded(candidate, claims, node, check)
            if lost is not None:
                return lost
        for number, condition in enumerate(self._conditions):
            lost = self._fails(number, condition, candidate)
            if lost is not None:
                return lost
        if not claims:
            return Lost("legal", "none of its operators has a weight that the rule rewrites")
        for claim in claims:
            lost = self._legal(claim.site)
            if lost is not None:
                return replace(lost, text=f"{claim.role}: {lost.reason}")
        return None

    def _excluded(
        self, candidate: PatternFit, claims: Sequence[Claim], node: str | None, check: CallsCheck
    ) -> Lost | None:
        """An entry of ``unless`` is about what is rewritten, or about the operator it names."""
        about = (
            [(claim.role, claim.site) for claim in claims]
            if node is None
            else [(node, call) for call in candidate.bound.get(node, ())]
        )
        for name, site in about:
            lost = check(site)
            if lost is not None:
                return replace(lost, text=f"{lost.reason} ({name})")
        return None

    def _fails(self, number: int, condition: Condition, candidate: PatternFit) -> Lost | None:
        counts = {name: len(calls) for name, calls in candidate.bound.items()}
        choices = [calls or (None,) for calls in candidate.bound.values()]
        for chosen in product(*choices):
            operators = {
                name: call.first if call is not None else None
                for name, call in zip(candidate.bound, chosen, strict=True)
            }
            # A model has few distinct shapes: most candidates are answered from here.
            read = [
                (operators[owner] or _ABSENT).attributes.get(key)
                for owner, key in condition.expression.attributes
            ]
            known = (number, repr((read, counts)))
            if known not in self._known:
                self._known[known] = condition.lost(operators, counts)
            lost = self._known[known]
            if lost is not None:
                return lost
        return None


_ABSENT = Operator("", "", "", "", {}, (), (), None)
