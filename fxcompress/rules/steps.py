"""The steps that one site takes through one rule, each saying why it was lost.

Every step is a function from a :class:`~fxcompress.rules.sites.Site` to a :class:`Lost`, or to
None for a site that passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.rules.expressions import Expression, ExpressionError, evaluate
from fxcompress.rules.globs import compile_globs
from fxcompress.rules.loader import LoadedRules
from fxcompress.rules.result import STEPS, Step
from fxcompress.rules.schema import Exclusion, NodePattern, Rule
from fxcompress.rules.sites import Site, SiteIndex
from fxcompress.rules.vocabulary import OPERATORS

Legality = Callable[[Operator], str | None]


@dataclass(frozen=True)
class Lost:
    """Where a site was lost: the step, why, and the keys of the condition in the rule."""

    step: Step
    reason: str
    keys: tuple[str | int, ...] = ()


StepCheck = Callable[[Site], Lost | None]


def positives(rule: Rule) -> StepCheck:
    """The positive matchers: a site has to pass those of one alternative."""
    if rule.match.node is not None:
        return _Pattern(rule.match.node, ("match", "node"))
    alternatives = [
        _Pattern(node, ("match", "any_of", number, "node"))
        for number, node in enumerate(rule.match.alternatives)
    ]

    def any_alternative(site: Site) -> Lost | None:
        furthest: Lost | None = None
        for alternative in alternatives:
            if all(operator.op != alternative.op for operator in site.operators):
                continue
            lost = alternative(site)
            if lost is None:
                return None
            if furthest is None or STEPS.index(lost.step) > STEPS.index(furthest.step):
                furthest = lost
        return furthest

    return any_alternative


class _Pattern:
    """Name and attributes of one operator pattern."""

    def __init__(self, node: NodePattern, keys: tuple[str | int, ...]) -> None:
        self.op = node.op
        self._path = compile_globs(node.name) if node.name is not None else None
        self._lost_name = Lost("name", _not_named(node.name or ()), (*keys, "name"))
        self._attributes = tuple(node.attributes.items())
        self._keys = keys

    def __call__(self, site: Site) -> Lost | None:
        calls = [operator for operator in site.operators if operator.op == self.op]
        if self._path is not None:
            matches = self._path.match
            # One named use is enough: the other uses share the weight, hence the fate.
            if not any(matches(operator.path) for operator in calls):
                return _also_tied(self._lost_name, site)
        for attribute, wanted in self._attributes:
            for operator in calls:
                if not matches_literal(operator, attribute, wanted):
                    found = operator.attributes.get(attribute)
                    reason = f"{attribute} is {_show(found)}, not {_show(wanted)}"
                    lost = Lost("attribute", reason, (*self._keys, attribute))
                    return _also_tied(lost, site)
        return None


def _also_tied(lost: Lost, site: Site) -> Lost:
    if not site.tied:
        return lost
    return replace(lost, reason=f"{lost.reason}; also tied to {', '.join(site.tied)}")


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
    known = OPERATORS.get(operator.op, {}).get(attribute)
    one_of = isinstance(wanted, tuple) and (
        known is None
        or not known.kind.startswith("ints")
        or any(isinstance(item, tuple) for item in wanted)
    )
    options = wanted if one_of and isinstance(wanted, tuple) else (wanted,)
    return any(_equal(found, option) for option in options)


def _equal(found: AttributeValue, wanted: AttributeValue) -> bool:
    if isinstance(found, tuple) and not isinstance(wanted, tuple):
        return bool(found) and all(item == wanted for item in found)
    if isinstance(wanted, tuple) and not isinstance(found, tuple):
        return bool(wanted) and all(item == found for item in wanted)
    return found == wanted


class Excluded:
    """One entry of ``unless``: a site is out if any of its calls fits all keys."""

    def __init__(self, number: int, entry: Exclusion, index: SiteIndex) -> None:
        self._readers = index.readers
        self._shares = entry.shares_weight_with
        self._name = compile_globs(entry.name) if entry.name is not None else None
        self._scope = compile_globs(entry.scope) if entry.scope is not None else None
        self._attributes = tuple(entry.attributes.items())
        globs = (("name", entry.name), ("scope", entry.scope))
        parts = [f"{key} {_quoted(given)}" for key, given in globs if given is not None]
        parts += [f"shares_weight_with {self._shares}"] if self._shares else []
        parts += [f"{key} {_show(value)}" for key, value in self._attributes]
        self._lost = Lost("unless", f"unless: {', '.join(parts)}", ("unless", number))

    def __call__(self, site: Site) -> Lost | None:
        for operator in site.operators:
            if self._name is not None and not self._name.match(operator.path):
                continue
            if self._scope is not None and not self._scope.match(operator.scope):
                continue
            if not all(matches_literal(operator, key, want) for key, want in self._attributes):
                continue
            if self._shares is None:
                return self._lost
            readers = self._readers.get(operator.weight or "", ())
            sharing = [r for r in readers if r.op == self._shares and r is not operator]
            if sharing:
                where = sharing[0].path or sharing[0].name
                return replace(self._lost, reason=f"{self._lost.reason} ({where})")
        return None


class Condition:
    """One expression of ``where``; it has to hold for every call of the site."""

    def __init__(
        self, number: int, expression: Expression, rule: Rule, loaded: LoadedRules
    ) -> None:
        self._number = number
        self._expression = expression
        self._bound = rule.match.alternatives[0].bound_name
        self._rule = rule
        self._loaded = loaded
        self._names = tuple(attribute for _, attribute in expression.attributes)
        # A model has few distinct shapes: most sites are answered from here.
        self._known: dict[tuple[object, ...], Lost | None] = {}

    def __call__(self, site: Site) -> Lost | None:
        for operator in site.operators:
            # The type tells True from 1, which are equal as keys.
            values = [operator.attributes.get(name) for name in self._names]
            key = tuple((type(value), value) for value in values)
            if key not in self._known:
                self._known[key] = self._evaluate(operator)
            if self._known[key] is not None:
                return self._known[key]
        return None

    def _evaluate(self, operator: Operator) -> Lost | None:
        try:
            if evaluate(self._expression, {self._bound: operator.attributes}):
                return None
        except ExpressionError as error:
            where = operator.path or operator.name
            raise self._loaded.failed(self._rule.id, self._number, error, where) from None
        text = " ".join(self._expression.text.split())
        values = ", ".join(
            f"{self._bound}.{name} = {_show(operator.attributes.get(name))}" for name in self._names
        )
        reason = f"where: {text} is False" + (f" ({values})" if values else "")
        return Lost("where", reason, ("where", self._number))


def illegal(site: Site, rule: Rule, loaded: LoadedRules, legal: Legality) -> Lost | None:
    """Ties, repeated calls and the caller's own reasons against rewriting a site."""
    if site.first.weight is None:
        return Lost("legal", "reads no weight parameter")
    if rule.rewrite == "none":
        return None  # leaving an operator as it is, is always legal
    if site.tied:
        return Lost("legal", f"tied to {', '.join(site.tied)} (defaults.tied: skip)")
    if len(site.operators) > 1 and loaded.rules.defaults.multi_call == "skip":
        calls = len(site.operators)
        return Lost("legal", f"called {calls} times (defaults.multi_call: skip)")
    for operator in site.operators:
        reason = legal(operator)
        if reason is not None:
            return Lost("legal", reason)
    return None


def _quoted(globs: Iterable[str]) -> str:
    return " or ".join(f'"{glob}"' for glob in globs)


def _show(value: AttributeValue) -> str:
    """A value as YAML would write it: ``[3, 3]``, ``true``."""
    if isinstance(value, tuple):
        return f"[{', '.join(_show(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "absent" if value is None else str(value)
