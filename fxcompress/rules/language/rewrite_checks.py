"""Checks of ``rewrite``: forms that apply, templates, and what templates say they cost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from fxcompress.forms.template import JOINT, Template, TemplateErrors, build_template
from fxcompress.forms.words import form_words, forms_for, hidden_forms
from fxcompress.rules.language.diagnostics import choices, suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.expressions import (
    RANK,
    ExpressionError,
    evaluate_number,
    parse_cost,
)
from fxcompress.rules.language.findings import Findings, shared_attributes
from fxcompress.rules.language.match_checks import Bindings, Bound
from fxcompress.rules.language.schema import Rewrite
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS

_TRIALS = 8
_LARGEST = 4096


def check_protection(findings: Findings, patterns: Sequence[Bindings]) -> None:
    """Report patterns of a rule with ``rewrite: none`` that have nothing to protect."""
    for pattern in patterns:
        bound = pattern.names.values()
        if all(each.ops for each in bound) and not any(each.has_weight for each in bound):
            message = "no operator of the pattern has a weight to rewrite"
            place = (*pattern.path, pattern.kind)
            findings.report(place, "not-rewritable", message, choices(OPERATORS))


def check_rewrite(
    findings: Findings,
    rewrite: Rewrite,
    path: KeyPath,
    rule_id: str,
    patterns: Sequence[Bindings],
) -> Template | None:
    """Report what is wrong with a rewrite; its template, if it has one that is right.

    Args:
        findings: gains the problems.
        rewrite: the rewrite.
        path: its place.
        rule_id: of its rule.
        patterns: what the rule matches; empty if that is not known.
    """
    words, known = form_words(), True
    places: dict[str, KeyPath] = {}
    for index, form in enumerate(rewrite.forms):
        places[form] = (*path, "form") if rewrite.form is not None else (*path, "any_of", index)
        if form not in words:
            message = f"unknown form '{form}'"
            findings.unknown(places[form], "unknown-form", message, form, words)
            known = False
    known &= _check_then(findings, rewrite, path)
    if not patterns:
        return None
    if rewrite.graph is not None:
        return _check_graph(findings, rewrite, path, rule_id, patterns)
    targets = _check_nodes(findings, rewrite, path, patterns[0].names)
    for pattern in patterns if known else ():
        bound = {n: each for n, each in pattern.names.items() if targets is None or n in targets}
        if bound and all(each.ops for each in bound.values()):
            _Forms(findings, places, pattern, bound, targets is not None).check(rewrite, path)
    return None


def _check_then(findings: Findings, rewrite: Rewrite, path: KeyPath) -> bool:
    """Report forms of ``then`` that are none, or that are for several operators."""
    words, known = form_words(), True
    for index, form in enumerate(rewrite.then or ()):
        place = (*path, "then", index)
        able = [name for name, word in words.items() if not word.joint and not word.hidden]
        if form not in words:
            findings.unknown(place, "unknown-form", f"unknown form '{form}'", form, able)
            known = False
        elif form not in able:
            message = f"{form} is no form for one operator, as 'then' needs it"
            findings.report(place, "wrong-place", message, choices(able), value=True)
    if rewrite.then and not any(f in words and words[f].hidden for f in rewrite.forms):
        hidden = " or ".join(name for name, word in words.items() if word.hidden)
        message = f"'then' is about what {hidden} leaves, which is not among the forms"
        hint = f"for example any_of: [{', '.join(dict.fromkeys(('narrow', *rewrite.forms)))}]"
        findings.report((*path, "then"), "wrong-place", message, hint)
    return known


def _check_nodes(
    findings: Findings, rewrite: Rewrite, path: KeyPath, bound: Mapping[str, Bound]
) -> frozenset[str] | None:
    """The names that ``nodes`` lists; None without it."""
    if rewrite.nodes is None:
        return None
    for index, name in enumerate(rewrite.nodes):
        place = (*path, "nodes", index)
        if name not in bound:
            message = f"the pattern has no node '{name}'"
            findings.unknown(place, "unknown-node", message, name, list(bound))
        elif bound[name].ops and not bound[name].has_weight:
            message = f"'{name}' is {' or '.join(bound[name].ops)}, which has no weight to rewrite"
            findings.report(place, "not-rewritable", message, value=True)
    return frozenset(rewrite.nodes) & bound.keys()


_READER = 'node: {op: linear, name: "*.down_proj"}'


class _Forms:
    """The forms of a rewrite, for one pattern.

    Every form has to find something to rewrite, and every operator that is asked for a form.
    """

    def __init__(
        self,
        findings: Findings,
        places: Mapping[str, KeyPath],
        pattern: Bindings,
        bound: Mapping[str, Bound],
        asked_for: bool,
    ) -> None:
        self.findings = findings
        self.places = places
        self.pattern = pattern
        self.bound = bound
        self.asked_for = asked_for

    def check(self, rewrite: Rewrite, path: KeyPath) -> None:
        words = form_words()
        joint = tuple(form for form in rewrite.forms if words[form].joint)
        alone = tuple(form for form in rewrite.forms if not words[form].joint)
        for form in joint:
            self.check_joint(form)
        for form in hidden_forms(alone):
            self.check_hidden(form)
        if joint and rewrite.group is not None:
            message = f"'group' asks for equal ranks, and {joint[0]} has one rank anyway"
            place = (*path, "group")
            self.findings.report(place, "wrong-place", message, "leave 'group' out")
        if alone:
            self.check_alone(alone)

    def misfit(self, form: str, message: str, hint: str) -> None:
        place = self.places[form]
        self.findings.report(place, "form-does-not-apply", message, hint, value=True)

    def check_hidden(self, form: str) -> None:
        """A form for a hidden value needs an operator that reads it alone."""
        if self.pattern.kind == "group":
            message = f"{form} is for a value that one operator reads; a group shares its value"
            self.misfit(form, message, f"match what reads the value: {_READER}")

    def check_alone(self, forms: tuple[str, ...]) -> None:
        words, named = form_words(), " and ".join(forms)
        if self.pattern.kind == "nodes" and not self.asked_for:
            # Forms are for the operators that they apply to; there has to be one.
            ops = {op for each in self.bound.values() for op in each.ops}
            if not any(forms_for(op, forms) for op in ops):
                possible = sorted({op for form in forms for op in words[form].operators})
                message = f"{named} can rewrite none of {', '.join(self.bound)}"
                hint = f"a node has to be one of: {', '.join(possible)}"
                self.misfit(forms[0], message, hint)
            return
        for each in self.bound.values():
            misfits = [op for op in each.ops if op in OPERATORS and not forms_for(op, forms)]
            # One of several operators is enough for a node that is asked for by its name.
            if self.pattern.kind == "nodes" and len(misfits) < len(each.ops):
                continue
            for op in misfits:
                possible = [name for name, word in words.items() if op in word.operators]
                none = f"no form of this version applies to {op}"
                line = self.findings.line(each.op_path)
                message = f"{named} cannot rewrite {op} (line {line})"
                self.misfit(forms[0], message, choices(possible) if possible else none)

    def check_joint(self, form: str) -> None:
        """A joint form needs several operators on one value."""
        operators = form_words()[form].operators
        able = [each for each in self.bound.values() if operators & set(each.ops)]
        if self.pattern.kind == "group":
            if not able:
                ops = " or ".join(op for each in self.bound.values() for op in each.ops)
                hint = f"it applies to {', '.join(sorted(operators))}"
                self.misfit(form, f"{form} cannot rewrite {ops}", hint)
            return
        if self.pattern.kind == "node":
            message = "rewrites several operators together, and the pattern has one"
        else:
            readers = Counter(each.reads for each in able if each.reads and each.reads[0])
            if any(count > 1 for count in readers.values()):
                return
            message = "rewrites several operators that read one value; the pattern has no two"
        hint = 'match them with "group", or with several "nodes" on one input'
        self.misfit(form, f"{form} {message}", hint)


def _check_graph(
    findings: Findings,
    rewrite: Rewrite,
    path: KeyPath,
    rule_id: str,
    patterns: Sequence[Bindings],
) -> Template | None:
    if rewrite.nodes is not None:
        message = "'nodes' goes with forms; a graph says in 'outputs' what it replaces"
        findings.report((*path, "nodes"), "wrong-place", message)
        return None
    if not all(each.ops for pattern in patterns for each in pattern.names.values()):
        return None
    if any(pattern.kind == "group" for pattern in patterns):
        message = "a graph cannot replace a 'group': the number of its operators is not known"
        findings.report((*path, "graph"), "wrong-place", message, "name them: nodes: {...}")
        return None
    for name, bound in patterns[0].names.items():
        if name in (RANK, JOINT):
            meaning = "the rank" if name == RANK else "the operators that are decomposed together"
            message = f"'{name}' stands for {meaning} in a graph; the operator needs another name"
            findings.report(bound.path, "name-clash", message)
            return None
    readers = [_readers(pattern) for pattern in patterns]
    if any(other != readers[0] for other in readers):
        message = "a graph needs alternatives whose operators read values of the same names"
        findings.report((*path, "graph"), "alternatives-differ", message)
        return None
    if not _check_roles(findings, path, rewrite.outputs or {}, patterns):
        return None
    graph = {name: node.model_dump() for name, node in (rewrite.graph or {}).items()}
    try:
        template = build_template(f"graph:{rule_id}", graph, rewrite.outputs, readers[0])
    except TemplateErrors as error:
        for problem in error.problems:
            hint = problem.hint
            if problem.word:
                hint = suggest(problem.word, problem.known) or choices(problem.known)
            place = (*path, *problem.path)
            # An unknown word is a value, or the key itself.
            value = bool(problem.word) and problem.word != problem.path[-1]
            findings.report(place, problem.code, problem.message, hint, value=value)
        return None
    _check_values(findings, template, path)
    if rewrite.cost is not None:
        _check_cost(findings, rewrite.cost, (*path, "cost"), template, patterns[0].names)
    return template


def _readers(pattern: Bindings) -> dict[str, str]:
    """Linear operators of a pattern, and the names of the values that they read."""
    return {
        name: bound.reads[0]
        for name, bound in pattern.names.items()
        if bound.ops == ("linear",) and bound.reads and bound.reads[0] is not None
    }


def _check_roles(
    findings: Findings, path: KeyPath, outputs: Mapping[str, str], patterns: Sequence[Bindings]
) -> bool:
    """Whether the operators to be replaced are always there and have a value to read."""
    sound = True
    for pattern in patterns:
        for name, bound in pattern.names.items():
            if bound.ops != ("linear",) or (outputs and name not in outputs):
                continue
            if bound.optional and name in outputs:
                message = f"'{name}' is optional, and a graph replaces it in every match"
                findings.report((*path, "outputs", name), "optional-output", message)
                sound = False
            if not bound.reads or bound.reads[0] is None:
                message = f"'{name}' does not say what it reads, so the graph cannot read it"
                findings.report(bound.path, "missing-input", message, "for example input: $x")
                sound = False
    return sound


def _check_values(findings: Findings, template: Template, path: KeyPath) -> None:
    """A template has to compute the product of its factors, whatever these are."""
    from fxcompress.forms.trial import try_template  # numpy: most rule files have no template

    for wrong in try_template(template):
        node = dict(template.outputs)[wrong.role]
        place = (*path, "graph", node)
        hint = "the solver counts on that product: no match could be rewritten"
        findings.report(place, "wrong-template", f"'{node}' {wrong}", hint)


def _check_cost(
    findings: Findings,
    text: str,
    path: KeyPath,
    template: Template,
    bound: Mapping[str, Bound],
) -> None:
    """A cost has to be what the template's weights have, whatever the sizes are.

    Two different polynomials of degree d agree on a draw from n values with a probability of at
    most d / n (Schwartz and Zippel).
    """
    numbers = {
        name: [
            attribute
            for attribute in shared_attributes(each.ops)
            if ALL_OPERATORS[each.ops[0]][attribute].kind in ("int", "float")
        ]
        for name, each in bound.items()
    }
    draw = random.Random(0)
    try:
        expression = parse_cost(text, numbers)
        for _ in range(_TRIALS):
            rank, width = draw.randint(2, _LARGEST), draw.randint(2, _LARGEST)
            sizes = {
                name: {key: draw.randint(2, _LARGEST) for key in keys}
                for name, keys in numbers.items()
            }
            for role in template.roles:
                sizes[role]["in_features"] = width  # they read one value
            said = evaluate_number(expression, sizes, rank)
            flat = {f"{n}.{key}": size for n, own in sizes.items() for key, size in own.items()}
            found = template.parameters({RANK: rank, **flat})
            if abs(said - found) > 1e-9 * found:
                message = f"cost says {' '.join(text.split())}, the graph has {template.cost}"
                findings.report(path, "wrong-cost", message, value=True)
                return
    except ExpressionError as error:
        findings.expression(error, text, path)
