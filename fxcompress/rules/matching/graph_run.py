"""A rule about several operators on its way through the steps.

Matches are taken in the order of their anchors.  One that wants a weight which an earlier
match of the rule has is lost, and the search leaves out what is taken: among 64 linears on one
input, a pattern of five finds twelve matches, and does not try eight million.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxcompress.errors import RuleError
from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.matching.candidates import CandidateCheck, PatternFit
from fxcompress.rules.matching.dataflow import Dataflow
from fxcompress.rules.matching.folding import fold
from fxcompress.rules.matching.places import Places, Start, places_of
from fxcompress.rules.matching.result import Bundle, Funnel, Instance, Losses, Lost, Match, later
from fxcompress.rules.matching.run import Run, beaten, funnel_steps
from fxcompress.rules.matching.search import SearchLimit
from fxcompress.rules.matching.sites import SiteIndex, WeightCalls
from fxcompress.rules.matching.steps import CallsCheck, JointLegality, node_steps
from fxcompress.rules.matching.terms import Claim, Offer


@dataclass(frozen=True, eq=False)
class _Found:
    """A match.

    Attributes:
        candidate: its operators.
        claims: those whose weights it has.
        offer: what may become of them.
    """

    candidate: PatternFit
    claims: tuple[Claim, ...]
    offer: Offer

    @property
    def sites(self) -> dict[str, WeightCalls]:
        """Weight -> its site, in the order of the pattern."""
        return {claim.site.key: claim.site for claim in self.claims}

    @property
    def order(self) -> int:
        """Position of the first weight in the graph."""
        return min(claim.site.order for claim in self.claims)


class GraphRun(Run):
    """One rule, match by match."""

    def __init__(
        self,
        loaded: LoadedRule,
        index: SiteIndex,
        graph: Dataflow,
        legal: CallsCheck,
        joint_legality: JointLegality,
    ) -> None:
        super().__init__(loaded)
        self._index = index
        self._joint_legality = joint_legality
        self._kept: list[_Found] = []
        self._owners: dict[str, _Found] = {}  # weight -> the match that has it
        self._anchors: dict[int, WeightCalls] = {}
        self._pruned = False  # whether the search has left out what is taken
        self._lost: dict[int, Lost] = {}  # position of an anchor -> its latest loss
        self._won: dict[int, _Found] = {}  # position of an anchor -> its last match
        self._members: dict[int, _Found] = {}  # position -> the first match that it is in
        self._shared: dict[int, Lost] = {}  # position -> why a match that it was in is lost
        self._names: dict[str, None] = {}
        self._ops: dict[str, None] = {}
        for keys, alternative in self.rule.match.keyed:
            places = places_of(alternative, keys, index, graph, loaded)
            check = CandidateCheck(loaded, alternative, legal, keys)
            try:
                self._search(places, check)
            except SearchLimit:
                raise RuleError(
                    f"{loaded.at(*keys, 'nodes')} error[search-limit]: rule "
                    f"'{self.rule.id}' has too many ways to match, and the search was given up\n"
                    "   tell its nodes apart by 'name', or match operators that are alike with "
                    "'group'"
                ) from None

    # ---- within the rule --------------------------------------------------------------

    def _search(self, places: Places, check: CandidateCheck) -> None:
        left: Sequence[WeightCalls] = places.anchors()
        self._names[places.anchor] = None
        self._ops |= dict.fromkeys(places.test.ops)
        self._anchors |= {anchor.order: anchor for anchor in left}
        for step in node_steps(places.test, self.loaded, places.keys):
            verdicts = step(left)
            for anchor, lost in zip(left, verdicts, strict=True):
                if lost is not None:
                    self._lose(anchor.order, lost)
            left = [a for a, lost in zip(left, verdicts, strict=True) if lost is None]
        for start in places.starts(left):
            if not self._covered(places, start):
                outcome = self._attempt(start, check)
                for anchor in start.anchors:
                    if isinstance(outcome, _Found):
                        self._won[anchor.order] = outcome
                    else:
                        self._lose(anchor.order, outcome)
        for anchor in left:
            # An anchor of no match of its own may be another operator of one.
            if anchor.order in self._members:
                self._won.setdefault(anchor.order, self._members[anchor.order])

    def _covered(self, places: Places, start: Start) -> bool:
        """Whether all matches of an anchor want what an earlier match has that it is in."""
        return all(
            anchor.order in self._members and self._is_taken(places.anchor, anchor.order)
            for anchor in start.anchors
        )

    def _attempt(self, start: Start, check: CandidateCheck) -> _Found | Lost:
        """Take what there is at a place; the last match, or the latest loss."""
        self._pruned = False
        kept: _Found | None = None
        lost: Lost | None = None
        for candidate in start.candidates(self._is_taken):
            outcome = self._take(candidate, check)
            if isinstance(outcome, _Found):
                kept = outcome
            else:
                lost = later(lost, outcome)
                self._share(candidate, outcome)
        if kept is not None or lost is not None:
            return kept or lost  # type: ignore[return-value]
        # Was it never there, or is it taken?
        taken = next(start.candidates(None), None) if self._pruned else None
        return start.failure() if taken is None else self._take(taken, check)

    def _take(self, candidate: PatternFit, check: CandidateCheck) -> _Found | Lost:
        claims = tuple(self._claims(candidate))
        lost = check.lost(candidate, claims)
        if lost is not None:
            return lost
        offer = self.terms.offer(claims, self._joint_legality)
        if isinstance(offer, Lost):
            return offer
        found = _Found(candidate, claims, offer)
        for claim in claims:
            owner = self._owners.get(claim.site.key)
            if owner is not None:
                if owner.sites.keys() == found.sites.keys():
                    return owner  # the same weights by another way
                reason = f"{claim.role} ({claim.site.path}) is in an earlier match of this rule"
                return Lost("overlap", reason)
        self._kept.append(found)
        self._owners |= dict.fromkeys(found.sites, found)
        for operator in candidate.operators:
            self._members.setdefault(self._index.orders[operator.name], found)
        return found

    def _claims(self, candidate: PatternFit) -> Iterator[Claim]:
        for role, calls in candidate.bound.items():
            for call in calls:
                if self.terms.claims(role, call.first.op):
                    yield Claim(role, call.first, self._index.homes[call.order])

    def _is_taken(self, role: str, position: int) -> bool:
        site = self._index.homes[position]
        taken = site.key in self._owners and self.terms.claims(role, site.first.op)
        self._pruned |= taken
        return taken

    def _share(self, candidate: PatternFit, lost: Lost) -> None:
        """A lost match is lost for all of its operators, not for the anchor only."""
        for operator in candidate.operators:
            position = self._index.orders[operator.name]
            self._shared[position] = later(self._shared.get(position), lost)

    def _lose(self, position: int, lost: Lost) -> None:
        known = self._lost.get(position)
        if known is None or known is not lost:
            self._lost[position] = later(known, lost)

    # ---- against the other rules ------------------------------------------------------

    def settle(self, winners: dict[str, Run]) -> None:
        lost: dict[_Found, Lost] = {}
        for found in self._kept:
            winner = next((winners[key] for key in found.sites if key in winners), None)
            if winner is None:
                winners.update(dict.fromkeys(found.sites, self))
            else:
                lost[found] = beaten(self.rule, winner.rule)
                self._share(found.candidate, lost[found])
        self._kept = [found for found in self._kept if found not in lost]
        for position, found in self._won.items():
            if found in lost:
                self._lost[position] = lost[found]
        self._won = {p: found for p, found in self._won.items() if found not in lost}
        self._members = {p: found for p, found in self._members.items() if found not in lost}

    # ---- the result -------------------------------------------------------------------

    def matches(self) -> Iterator[tuple[int, Match]]:
        for found in self._kept:
            for key, site in found.sites.items():
                yield site.order, self.terms.match(site, found.offer.forms[key])

    def bundles(self) -> Iterator[tuple[int, Bundle]]:
        for found in self._kept:
            if found.offer.together:
                yield found.order, self.terms.bundle(found.offer)

    def instances(self) -> tuple[Instance, ...]:
        counted = Counter(self._won.values())
        return tuple(
            Instance(
                tuple(
                    (name, call.path or call.first.name)
                    for name, calls in found.candidate.bound.items()
                    for call in calls
                ),
                tuple(found.sites),
                counted[found],
            )
            for found in self._kept
        )

    def warnings(self) -> Iterator[str]:
        paths: dict[str, list[str]] = {}
        for found in self._kept:
            if found.offer.left_out:
                members = [claim.site.path for claim in found.claims]
                paths.setdefault(found.offer.left_out, []).extend(members)
        joint = " and ".join(self.terms.joint)
        for reason, members in paths.items():
            folded = ", ".join(fold(members))
            yield (
                f"{self.loaded.line} warning[joint-left-out]: rule '{self.rule.id}': {joint} left "
                f"out for {folded}: {reason}"
            )

    def losses(self) -> Losses:
        # What cannot be the anchor may be another operator of a match, and is no miss then.
        done = self._won.keys() | self._members.keys()
        missed = [position for position in self._lost if position not in done]
        return Losses(
            tuple(map(self._anchors.__getitem__, missed)),
            tuple(later(self._shared.get(at), self._lost[at]) for at in missed),
        )

    def funnel(self) -> Funnel:
        total = len(self._anchors)
        reasons = [lost for position, lost in self._lost.items() if position not in self._won]
        steps = funnel_steps(self.rule, total, reasons, len(self._won))
        return Funnel(self.rule.id, tuple(self._ops), steps, self.loaded.line, tuple(self._names))

    @property
    def unit(self) -> str:
        return "match"

    @property
    def count(self) -> int:
        return len(self._kept)
