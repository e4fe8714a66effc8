"""The steps that one site takes through one rule, each saying why it was lost.

Every step is a function from a :class:`~fxcompress.rules.sites.Site` to a
:class:`~fxcompress.rules.result.Lost`, or to None for a site that passes.  They run for every
site of every rule, so whatever depends on the rule only is prepared once, and whatever depends
on attributes only is kept by the site's signature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.rules.expressions import Expression, ExpressionError, evaluate
from fxcompress.rules.globs import compile_globs
from fxcompress.rules.loader import LoadedRules
from fxcompress.rules.result import STEPS, Lost
from fxcompress.rules.schema import Exclusion, NodePattern, Rule
from fxcompress.rules.sites import Site
from fxcompress.rules.vocabulary import OPERATORS

Legality = Callable[[Operator], str | None]
StepCheck = Callable[[Site], Lost | None]


def rule_steps(rule: Rule, loaded: LoadedRules, legality: StepCheck) -> list[StepCheck]:
    """The steps of a rule, in the order in which they are taken."""
    steps = [_positives(rule, loaded)]
    steps += [_exclusion(i, entry, rule, loaded) for i, entry in enumerate(rule.unless)]
    expressions = enumerate(loaded.expressions[rule.id])
    steps += [_condition(i, expression, rule, loaded) for i, expression in expressions]
    # Leaving an operator as it is, is legal wherever there is a weight.
    return [*steps, _has_weight if rule.rewrite == "none" else legality]


def legality_step(loaded: LoadedRules, legality: Legality) -> StepCheck:
    """Ties, repeated calls, and the caller's own reasons; asked once per site for all rules."""
    defaults = loaded.rules.defaults
    known: dict[str, Lost | None] = {}

    def check(site: Site) -> Lost | None:
        if site.key in known:
            return known[site.key]
        lost = _has_weight(site)
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


def _has_weight(site: Site) -> Lost | None:
    return None if site.first.weight is not None else Lost("legal", "reads no weight parameter")


def _positives(rule: Rule, loaded: LoadedRules) -> StepCheck:
    """The positive matchers: a site has to pass those of one alternative."""
    if rule.match.node is not None:
        return _pattern(rule.match.node, ("match", "node"), rule, loaded)
    alternatives = [
        (node.op, _pattern(node, ("match", "any_of", number, "node"), rule, loaded))
        for number, node in enumerate(rule.match.alternatives)
    ]

    def check(site: Site) -> Lost | None:
        furthest: Lost | None = None
        for op, alternative in alternatives:
            calls = site.only(op)
            if calls is None:
                continue
            lost = alternative(calls)
            if lost is None:
                return None
            if furthest is None or STEPS.index(lost.step) > STEPS.index(furthest.step):
                furthest = lost
        return furthest

    return check


def _pattern(
    node: NodePattern, keys: tuple[str | int, ...], rule: Rule, loaded: LoadedRules
) -> StepCheck:
    """Name and attributes of one operator pattern."""
    named = compile_globs(node.name).match if node.name is not None else None
    location = loaded.location(rule.id, *keys, "name")
    lost_name = Lost("name", _not_named(node.name or ()), location)
    attributes = tuple(node.attributes.items())
    known: dict[int, Lost | None] = {}

    def check_attributes(site: Site) -> Lost | None:
        for attribute, wanted in attributes:
            for operator in site.operators:
                if not matches_literal(operator, attribute, wanted):
                    found = _show(operator.attributes.get(attribute))
                    reason = f"{attribute} is {found}, not {_show(wanted)}"
                    return Lost("attribute", reason, loaded.location(rule.id, *keys, attribute))
        return None

    def check(site: Site) -> Lost | None:
        # One named call is enough: the others share the weight, hence the fate.
        if named is not None and not (
            named(site.path)
            or (len(site.operators) > 1 and any(named(call.path) for call in site.operators))
        ):
            return _also_tied(lost_name, site) if site.tied else lost_name
        if not attributes:
            return None
        if site.signature not in known:
            known[site.signature] = check_attributes(site)
        lost = known[site.signature]
        return _also_tied(lost, site) if lost is not None and site.tied else lost

    return check


def _also_tied(lost: Lost, site: Site) -> Lost:
    return replace(lost, reason=f"{lost.reason}; also tied to {site.ties}")


def _not_named(globs: Sequence[str]) -> str:
    shown = ", ".join(f'"{glob}"' for glob in globs)
    return f"name matches none of {shown}" if len(globs) > 1 else f"name does not match {shown}"


def matches_literal(operator: Operator, attribute: str, wanted: AttributeValue) -> bool:
    """Whether an operator's attribute is the literal, or one of a list of literals.

    A number stands for itself in every dimension, as in PyTorch: ``kernel_size: 3`` is
    ``[3, 3]`` for a ``conv2d``.
    """
    if attribute not in operator.attributes:
        return False
    found = operator.attributes[attribute]
    options: tuple[AttributeValue, ...] = (wanted,)
    if isinstance(wanted, tuple):
        known = OPERATORS.get(operator.op, {}).get(attribute)
        value_is_list = known is not None and known.kind.startswith("ints")
        if not value_is_list or any(isinstance(item, tuple) for item in wanted):
            options = wanted
    return any(_equal(found, option) for option in options)


def _equal(found: AttributeValue, wanted: AttributeValue) -> bool:
    if isinstance(found, tuple) and not isinstance(wanted, tuple):
        return bool(found) and all(item == wanted for item in found)
    if isinstance(wanted, tuple) and not isinstance(found, tuple):
        return bool(wanted) and all(item == found for item in wanted)
    return found == wanted


def _exclusion(number: int, entry: Exclusion, rule: Rule, loaded: LoadedRules) -> StepCheck:
    """One entry of ``unless``: a site is out if any of its calls fits all keys."""
    shares = entry.shares_weight_with
    named = compile_globs(entry.name).match if entry.name is not None else None
    scoped = compile_globs(entry.scope).match if entry.scope is not None else None
    attributes = tuple(entry.attributes.items())
    globs = (("name", entry.name), ("scope", entry.scope))
    parts = [f"{key} {_quoted(given)}" for key, given in globs if given is not None]
    parts += [f"shares_weight_with {shares}"] if shares else []
    parts += [f"{key} {_show(value)}" for key, value in attributes]
    location = loaded.location(rule.id, "unless", number)
    hit = Lost("unless", f"unless: {', '.join(parts)}", location)

    def check(site: Site) -> Lost | None:
        lost = hit
        if shares is not None:
            sharing = [other for other in site.tied if other.op == shares]
            if not sharing:
                return None
            lost = replace(hit, reason=f"{hit.reason} ({sharing[0].path or sharing[0].name})")
        for operator in site.operators:
            if named is not None and not named(operator.path):
                continue
            if scoped is not None and not scoped(operator.scope):
                continue
            if all(matches_literal(operator, key, wanted) for key, wanted in attributes):
                return lost
        return None

    return check


def _condition(number: int, expression: Expression, rule: Rule, loaded: LoadedRules) -> StepCheck:
    """One expression of ``where``; it has to hold for every call of the site."""
    bound = rule.match.alternatives[0].bound_name
    location = loaded.location(rule.id, "where", number)
    names = [name for _, name in expression.attributes]
    # A model has few distinct shapes: most sites are answered from here.
    known: dict[int, Lost | None] = {}

    def holds(operator: Operator) -> bool:
        try:
            return evaluate(expression, {bound: operator.attributes})
        except ExpressionError as error:
            where = operator.path or operator.name
            raise loaded.failed(rule.id, number, error, where) from None

    def evaluate_site(site: Site) -> Lost | None:
        for operator in site.operators:
            if not holds(operator):
                shown = [f"{bound}.{name} = {_show(operator.attributes[name])}" for name in names]
                reason = f"where: {' '.join(expression.text.split())} is False"
                reason += f" ({', '.join(shown)})" if shown else ""
                return Lost("where", reason, location)
        return None

    def check(site: Site) -> Lost | None:
        if site.signature not in known:
            known[site.signature] = evaluate_site(site)
        return known[site.signature]

    return check


def _quoted(globs: Iterable[str]) -> str:
    return " or ".join(f'"{glob}"' for glob in globs)


def _show(value: AttributeValue) -> str:
    """A value as YAML would write it: ``[3, 3]``, ``true``."""
    if isinstance(value, tuple):
        return f"[{', '.join(_show(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "absent" if value is None else str(value)
