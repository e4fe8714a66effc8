"""The steps that the sites of one rule take, each saying why a site was lost.

Every step is a function from a column of sites to a column of verdicts: a
:class:`~fxcompress.rules.matching.result.Lost`, or None for a site that passes.  They run for
every site of every rule, so whatever depends on the rule only is prepared once, and whatever
depends on attributes only is kept by the site's signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.expressions import Expression, ExpressionError, evaluate
from fxcompress.rules.language.globs import compile_globs
from fxcompress.rules.language.loader import LoadedRule, LoadedRules
from fxcompress.rules.language.schema import Alternative, Exclusion
from fxcompress.rules.matching.literals import matches_literal, show
from fxcompress.rules.matching.patterns import NodeTest, quoted
from fxcompress.rules.matching.result import Lost, later
from fxcompress.rules.matching.scopes import scope_test
from fxcompress.rules.matching.sites import WeightCalls

Legality = Callable[[Operator], str | None]
JointLegality = Callable[[Sequence[Operator]], str | None]
CallsCheck = Callable[[WeightCalls], Lost | None]
LostCheck = Callable[[Sequence[WeightCalls]], Sequence[Lost | None]]
Keys = tuple[str | int, ...]


def site_steps(loaded: LoadedRule, legality: CallsCheck) -> list[LostCheck]:
    """The steps of a rule about single operators, in the order in which they are taken."""
    steps = _positives(loaded)
    exclusions = [exclusion(number, loaded) for number in range(len(loaded.rule.unless))]
    steps += [each(check) for check in exclusions]
    (bound,) = loaded.rule.match.alternatives[0].names
    steps += [_condition(condition, bound) for condition in conditions(loaded)]
    # Leaving an operator as it is, is legal wherever there is a weight.
    return [*steps, each(has_weight if loaded.rule.rewrite == "none" else legality)]


def each(check: CallsCheck) -> LostCheck:
    """A step that looks at one site at a time."""
    return lambda sites: [check(site) for site in sites]


def legality_check(rules: LoadedRules, legality: Legality) -> CallsCheck:
    """Ties, repeated calls, and the caller's own reasons; asked once per site for all rules."""
    defaults = rules.rules.defaults
    known: dict[str, Lost | None] = {}

    def check(site: WeightCalls) -> Lost | None:
        if site.key in known:
            return known[site.key]
        lost = has_weight(site)
        if lost is None and site.tied:
            lost = Lost("legal", f"tied to {site.ties} (defaults.tied: {defaults.tied})")
        calls = len(site.operators)
        if lost is None and calls > 1 and defaults.multi_call == "skip":
            lost = Lost("legal", f"called {calls} times (defaults.multi_call: skip)")
        if lost is None:
            reasons = (legality(operator) for operator in site.operators)
            reason = next((reason for reason in reasons if reason is not None), None)
            lost = None if reason is None else Lost("legal", reason)
        known[site.key] = lost
        return lost

    return check


def has_weight(site: WeightCalls) -> Lost | None:
    """A site without a weight parameter is lost."""
    return None if site.first.weight is not None else Lost("legal", "reads no weight parameter")


# ---- positive matchers ------------------------------------------------------------------


def _positives(loaded: LoadedRule) -> list[LostCheck]:
    """The positive matchers: a site has to pass those of one alternative."""
    found = [
        (alternative, _alternative(alternative, loaded, keys))
        for keys, alternative in loaded.rule.match.keyed
    ]
    if loaded.rule.match.any_of is None:
        return found[0][1]

    def check(site: WeightCalls) -> Lost | None:
        furthest: Lost | None = None
        for alternative, steps in found:
            assert alternative.node is not None
            calls = site.only(alternative.node.op)
            if calls is None:
                continue
            lost = next((lost for step in steps for lost in step([calls]) if lost), None)
            if lost is None:
                return None
            furthest = later(furthest, lost)
        return furthest

    whole = (
        []
        if loaded.rule.match.scope is None
        else [_scope(loaded.rule.match.scope, loaded, ("match",))]
    )
    return [each(check), *whole]


def _alternative(alternative: Alternative, loaded: LoadedRule, keys: Keys) -> list[LostCheck]:
    assert alternative.node is not None
    steps = node_steps(NodeTest.of(alternative.node), loaded, (*keys, "node"))
    if alternative.scope is not None:
        steps.append(_scope(alternative.scope, loaded, keys))
    return steps


def node_steps(test: NodeTest, loaded: LoadedRule, keys: Keys) -> list[LostCheck]:
    """Name and attributes of one operator pattern, as far as the rule asks for them."""
    named = _name(test, loaded.at(*keys, "name"))
    attributes = each(_attributes(test, loaded, keys))
    return [named] * (test.globs is not None) + [attributes] * bool(test.attributes)


def _name(test: NodeTest, location: str) -> LostCheck:
    named = test.named or bool
    lost = Lost("name", test.not_named, location)

    def other_calls(site: WeightCalls) -> Lost | None:
        # One named call is enough: the others share the weight, hence the fate.
        if any(named(call.path) for call in site.operators[1:]):
            return None
        return _also_tied(lost, site)

    return lambda sites: [
        None if named(site.path) else lost if site.lone else other_calls(site) for site in sites
    ]


def _attributes(test: NodeTest, loaded: LoadedRule, keys: Keys) -> CallsCheck:
    known: dict[int, Lost | None] = {}

    def ask(site: WeightCalls) -> Lost | None:
        for operator in site.operators:
            misfit = test.misfit(operator)
            if misfit is not None:
                attribute, reason = misfit
                return Lost("attribute", reason, loaded.at(*keys, attribute))
        return None

    def check(site: WeightCalls) -> Lost | None:
        if site.signature not in known:
            known[site.signature] = ask(site)
        lost = known[site.signature]
        return lost if lost is None or site.lone else _also_tied(lost, site)

    return check


def _also_tied(lost: Lost, site: WeightCalls) -> Lost:
    return replace(lost, text=f"{lost.reason}; also tied to {site.ties}") if site.tied else lost


def _scope(globs: Sequence[str], loaded: LoadedRule, keys: Keys) -> LostCheck:
    encloses, lost = scope_test(globs), scope_loss(globs, loaded, keys)
    return each(lambda site: None if encloses(site.operators) else lost)


def scope_loss(globs: Sequence[str], loaded: LoadedRule, keys: Keys) -> Lost:
    """What is said of a match that no module of the right name encloses."""
    location = loaded.at(*keys, "scope")
    return Lost("scope", f"no enclosing module is named {quoted(globs)}", location)


# ---- unless -----------------------------------------------------------------------------


def exclusion(number: int, loaded: LoadedRule) -> CallsCheck:
    """One entry of ``unless``: a site is out if any of its calls fits all keys."""
    entry: Exclusion = loaded.rule.unless[number]
    shares = entry.shares_weight_with
    named = compile_globs(entry.name).match if entry.name is not None else None
    encloses = scope_test(entry.scope) if entry.scope is not None else None
    attributes = tuple(entry.attributes.items())
    globs = (("name", entry.name), ("scope", entry.scope))
    parts = [f"{key} {quoted(given)}" for key, given in globs if given is not None]
    parts += [f"shares_weight_with {shares}"] if shares else []
    parts += [f"{key} {show(value)}" for key, value in attributes]
    location = loaded.at("unless", number)
    hit = Lost("unless", f"unless: {', '.join(parts)}", location)

    def check(site: WeightCalls) -> Lost | None:
        lost = hit
        if shares is not None:
            sharing = [other for other in site.tied if other.op == shares]
            if not sharing:
                return None
            lost = replace(hit, text=f"{hit.reason} ({sharing[0].path or sharing[0].name})")
        for operator in site.operators:
            if named is not None and not named(operator.path):
                continue
            if encloses is not None and not encloses((operator,)):
                continue
            if all(matches_literal(operator, key, wanted) for key, wanted in attributes):
                return lost
        return None

    return check


# ---- where ------------------------------------------------------------------------------


class Condition:
    """One expression of ``where``."""

    def __init__(self, number: int, expression: Expression, loaded: LoadedRule) -> None:
        self.expression = expression
        self._number = number
        self._loaded = loaded
        self._location = loaded.at("where", number)

    def lost(
        self,
        operators: Mapping[str, Operator | None],
        counts: Mapping[str, int] | None = None,
    ) -> Lost | None:
        """Why the condition does not hold for some operators, by their names in the pattern.

        Raises:
            RuleError: it has no truth value, located.
        """
        values = {name: o.attributes if o is not None else None for name, o in operators.items()}
        try:
            if evaluate(self.expression, values, counts):
                return None
        except ExpressionError as error:
            at = next(o.path or o.name for o in operators.values() if o is not None)
            raise self._loaded.failed(self._number, error, at) from None
        shown = [
            f"{owner}.{key} = {show(attributes.get(key))}"
            for owner, key in self.expression.attributes
            if (attributes := values.get(owner)) is not None
        ]
        reason = f"where: {' '.join(self.expression.text.split())} is False"
        reason += f" ({', '.join(shown)})" if shown else ""
        return Lost("where", reason, self._location)


def conditions(loaded: LoadedRule) -> list[Condition]:
    """The conditions of a rule, in its order."""
    expressions = enumerate(loaded.expressions)
    return [Condition(number, expression, loaded) for number, expression in expressions]


def _condition(condition: Condition, bound: str) -> LostCheck:
    """A condition on single operators; it has to hold for every call of a site."""
    # A model has few distinct shapes: most sites are answered from here.
    known: dict[int, Lost | None] = {}

    def ask(site: WeightCalls) -> Lost | None:
        verdicts = (condition.lost({bound: operator}) for operator in site.operators)
        return next((lost for lost in verdicts if lost is not None), None)

    def step(sites: Sequence[WeightCalls]) -> list[Lost | None]:
        for site in sites:
            if site.signature not in known:
                known[site.signature] = ask(site)
        return [known[site.signature] for site in sites]

    return step
