"""What a rule says about the sites that it wins: forms, ranks, and who shares a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fxcompress.forms.template import Template
from fxcompress.forms.words import form_words, forms_for, joint_forms
from fxcompress.graph.operator import Operator
from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.language.schema import Limits, Rewrite
from fxcompress.rules.language.vocabulary import OPERATORS
from fxcompress.rules.matching.result import Bundle, Lost, Match
from fxcompress.rules.matching.sites import WeightCalls
from fxcompress.rules.matching.steps import JointLegality


@dataclass(frozen=True)
class Claim:
    """One operator of a match whose weight the rule wants.

    Attributes:
        role: its name in the pattern.
        operator: the call that the pattern bound.
        site: its weight with all calls.
    """

    role: str
    operator: Operator
    site: WeightCalls


@dataclass(frozen=True)
class Offer:
    """What may become of the sites of one match.

    Attributes:
        forms: weight -> forms that rewrite it by itself.
        together: forms that rewrite all of them together, by ``claims``.
        claims: the members of the bundle; empty without one.
        left_out: why joint forms were dropped; empty if none were.
    """

    forms: Mapping[str, tuple[str, ...]]
    together: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    left_out: str = ""


class Terms:
    """The ``rewrite`` of one rule, with the file's defaults."""

    def __init__(self, loaded: LoadedRule) -> None:
        self.rule = rule = loaded.rule
        self.rewrite = rule.rewrite if isinstance(rule.rewrite, Rewrite) else None
        self.template = loaded.template
        self._loaded = loaded
        self.joint = joint_forms(self.rewrite.forms) if self.rewrite else ()
        self._limits = Limits.of(self.rewrite, loaded.file.rules.defaults)
        self._location = loaded.line

    def claims(self, role: str, op: str) -> bool:
        """Whether the rule wants the weight of an operator of its pattern."""
        if self.template is not None:
            return role in self.template.roles
        if self.rewrite is not None and self.rewrite.nodes is not None:
            return role in self.rewrite.nodes
        if self.rewrite is None:
            return op in OPERATORS
        words = form_words()
        return any(op in words[form].operators for form in self.rewrite.forms)

    # ---- what may become of a match ---------------------------------------------------

    def formless(self, op: str) -> Lost | None:
        """Why the rule has no form for a single operator."""
        if self.rewrite is None or self.forms(op):
            return None
        if any(op in form_words()[form].operators for form in self.joint):
            return Lost("legal", _FEW.format(" and ".join(self.joint)), self._forms_location())
        return self._inapplicable(op)

    def misfit(self, site: WeightCalls) -> Lost | None:
        """Why the template of a rule about single operators does not fit one of them."""
        if self.template is None:
            return None
        (role,) = self.template.roles
        reason = self.template.misfit({role: site.first.attributes})
        if reason is None:
            return None
        return Lost("legal", reason, self._loaded.at("rewrite", "graph"))

    def forms(self, op: str) -> tuple[str, ...]:
        """The forms that rewrite one operator by itself."""
        if self.template is not None:
            return (self.template.name,)
        return forms_for(op, self.rewrite.forms) if self.rewrite else ()

    def offer(self, claims: Sequence[Claim], joint_legality: JointLegality) -> Offer | Lost:
        """What may become of the sites of a match about several operators."""
        if self.template is not None:
            return self._from_template(self.template, claims, joint_legality)
        forms = {claim.site.key: self.forms(claim.operator.op) for claim in claims}
        if self.rewrite is None or not self.joint:
            lacking = [claim.operator.op for claim in claims if not forms[claim.site.key]]
            if self.rewrite is not None and lacking:
                return self._inapplicable(lacking[0])
            return Offer(forms)
        reason = self._not_together(claims, joint_legality)
        if reason is None:
            return Offer(forms, self.joint, tuple(claims))
        if all(forms.values()):
            return Offer(forms, left_out=reason)
        return Lost("legal", reason, self._forms_location())

    def _not_together(self, claims: Sequence[Claim], joint_legality: JointLegality) -> str | None:
        shown = " and ".join(self.joint)
        if len({claim.site.key for claim in claims}) < 2:
            return _FEW.format(shown)
        repeated = _repeated(claims)
        if repeated:
            return repeated
        for form in self.joint:
            for claim in claims:
                if claim.operator.op not in form_words()[form].operators:
                    return f"{form} cannot rewrite {claim.operator.op} ({claim.role})"
        return joint_legality([claim.operator for claim in claims])

    def _from_template(
        self, template: Template, claims: Sequence[Claim], joint_legality: JointLegality
    ) -> Offer | Lost:
        by_role = {claim.role: claim for claim in claims}
        location = self._loaded.at("rewrite", "graph")
        absent = [role for role in template.roles if role not in by_role]
        if absent:
            return Lost("legal", f"{' and '.join(absent)} is absent", location)
        wanted = tuple(by_role[role] for role in template.roles)
        reason = template.misfit({c.role: c.operator.attributes for c in wanted})
        if reason is None and len(wanted) > 1:
            reason = _repeated(wanted) or joint_legality([claim.operator for claim in wanted])
        if reason is not None:
            return Lost("legal", reason, location)
        if len(wanted) == 1:
            return Offer({wanted[0].site.key: (template.name,)})
        return Offer({claim.site.key: () for claim in wanted}, (template.name,), wanted)

    def _inapplicable(self, op: str) -> Lost:
        forms = " and ".join(self.rewrite.forms) if self.rewrite else ""
        return Lost("legal", f"{forms} cannot rewrite {op}", self._forms_location())

    def _forms_location(self) -> str:
        key = "form" if self.rewrite is not None and self.rewrite.form is not None else "any_of"
        return self._loaded.at("rewrite", key)

    # ---- the result -------------------------------------------------------------------

    def match(self, site: WeightCalls, forms: tuple[str, ...]) -> Match:
        """The site as the rule won it."""
        return Match(
            rule_id=self.rule.id,
            weight=site.key,
            operators=tuple(operator.name for operator in site.operators),
            op=site.first.op,
            forms=forms,
            group=self.rewrite.group if self.rewrite else None,
            location=self._location,
            path=site.path,
            limits=self._limits,
            then=(self.rewrite.then or ()) if self.rewrite else (),
        )

    def bundle(self, offer: Offer) -> Bundle:
        """The sites of a match as one."""
        members = tuple(claim.site.key for claim in offer.claims)
        return Bundle(
            name=f"{self.rule.id}@{members[0].removesuffix('.weight')}",
            members=members,
            roles=tuple(claim.role for claim in offer.claims),
            forms=offer.together,
            rule_id=self.rule.id,
            location=self._location,
            limits=self._limits,
        )


_FEW = "{} needs two operators or more"


def _repeated(claims: Sequence[Claim]) -> str | None:
    """Why one weight cannot be two operators of a bundle."""
    seen: dict[str, Claim] = {}
    for claim in claims:
        first = seen.setdefault(claim.site.key, claim)
        if first is not claim:
            return f"{claim.site.path} is in the match twice ({first.role} and {claim.role})"
    return None
