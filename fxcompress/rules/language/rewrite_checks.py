"""Checks of ``rewrite``: forms that apply, templates, and what templates say they cost."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fxcompress.forms.template import JOINT, Template, TemplateErrors, build_template
from fxcompress.forms.words import form_words, forms_for
from fxcompress.rules.language.diagnostics import choices, suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.expressions import RANK, ExpressionError, evaluate_number, parse_cost
from fxcompress.rules.language.findings import Findings, one_or_many
from fxcompress.rules.language.match_checks import Bindings, Bound
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS

_TRIALS = 8
_LARGEST = 4096


def check_rewrite(
    findings: Findings,
    rewrite: Any,
    path: KeyPath,
    rule_id: str,
    patterns: Sequence[Bindings],
) -> Template | None:
    """Report what is wrong with a rewrite; its template, if it has one that is right."""
    if rewrite == "none":
        for pattern in patterns:
            _check_weights(findings, pattern)
    if not isinstance(rewrite, dict):
        return None
    forms = _known_forms(findings, rewrite, path)
    targets = _check_nodes(findings, rewrite, path, patterns)
    if forms:
        for pattern in patterns:
            _check_forms(findings, rewrite, path, forms, pattern, targets)
    if isinstance(rewrite.get("graph"), dict):
        return _check_graph(findings, rewrite, path, rule_id, patterns)
    return None


def _check_weights(findings: Findings, pattern: Bindings) -> None:
    known = all(bound.ops for bound in pattern.names.values())
    if known and not any(bound.has_weight for bound in pattern.names.values()):
        message = "no operator of the pattern has a weight to rewrite"
        findings.report(
            (*pattern.path, pattern.kind), "not-rewritable", message, choices(OPERATORS)
        )


def _known_forms(findings: Findings, rewrite: Mapping[str, Any], path: KeyPath) -> tuple[str, ...]:
    """The forms of a rewrite; none if any of them is not known."""
    words = form_words()
    key = "form" if rewrite.get("form") is not None else "any_of"
    given = one_or_many(rewrite.get(key), (*path, key))
    known = []
    for name, place in given:
        if name in words:
            known.append(name)
        else:
            findings.unknown(place, "unknown-form", f"unknown form '{name}'", name, words)
    return tuple(known) if len(known) == len(given) else ()


def _check_nodes(
    findings: Findings,
    rewrite: Mapping[str, Any],
    path: KeyPath,
    patterns: Sequence[Bindings],
) -> frozenset[str] | None:
    """The names that ``nodes`` lists; None without it."""
    if rewrite.get("nodes") is None or not patterns:
        return None
    if rewrite.get("graph") is not None:
        message = "'nodes' goes with forms; a graph says in 'outputs' what it replaces"
        findings.report((*path, "nodes"), "wrong-place", message)
        return None
    bound = patterns[0].names
    # The schema tells of a "$" in front of a name.
    listed = one_or_many(rewrite["nodes"], (*path, "nodes"))
    given = [(name.removeprefix("$"), place) for name, place in listed]
    for name, place in given:
        if name not in bound:
            message = f"the pattern has no node '{name}'"
            findings.unknown(place, "unknown-node", message, name, list(bound))
        elif bound[name].ops and not bound[name].has_weight:
            message = f"'{name}' is {' or '.join(bound[name].ops)}, which has no weight to rewrite"
            findings.report(place, "not-rewritable", message, value=True)
    return frozenset(name for name, _ in given if name in bound)


def _check_forms(
    findings: Findings,
    rewrite: Mapping[str, Any],
    path: KeyPath,
    forms: tuple[str, ...],
    pattern: Bindings,
    targets: frozenset[str] | None,
) -> None:
    """Every form has to find something to rewrite in the pattern, and every target a form."""
    words = form_words()
    key = "form" if rewrite.get("form") is not None else "any_of"
    places = dict(one_or_many(rewrite[key], (*path, key)))
    bound = {n: b for n, b in pattern.names.items() if targets is None or n in targets}
    if not bound or not all(each.ops for each in bound.values()):
        return  # said already
    joint = tuple(form for form in forms if words[form].joint)
    for form in joint:
        _check_joint(findings, form, places[form], pattern, bound)
    if joint and rewrite.get("group") is not None:
        message = f"'group' asks for equal ranks, and {joint[0]} has one rank anyway"
        findings.report((*path, "group"), "wrong-place", message, "leave 'group' out")
    alone = tuple(form for form in forms if not words[form].joint)
    if not alone:
        return
    if pattern.kind == "nodes" and targets is None:
        # Forms are for the operators that they apply to; there has to be one.
        ops = {op for each in bound.values() for op in each.ops}
        if not any(forms_for(op, alone) for op in ops):
            possible = sorted({op for form in alone for op in words[form].operators})
            message = f"{' and '.join(alone)} can rewrite none of {', '.join(bound)}"
            hint = f"a node has to be one of: {', '.join(possible)}"
            findings.report(places[alone[0]], "form-does-not-apply", message, hint, value=True)
        return
    for each in bound.values():
        misfits = [op for op in each.ops if op in OPERATORS and not forms_for(op, alone)]
        # One of several operators is enough for a node that is asked for by its name.
        if pattern.kind == "nodes" and len(misfits) < len(each.ops):
            continue
        for op in misfits:
            possible = [name for name, word in words.items() if op in word.operators]
            hint = choices(possible) if possible else f"no form of this version applies to {op}"
            message = (
                f"{' and '.join(alone)} cannot rewrite {op} (line {findings.line(each.op_path)})"
            )
            findings.report(places[alone[0]], "form-does-not-apply", message, hint, value=True)


def _check_joint(
    findings: Findings, form: str, path: KeyPath, pattern: Bindings, bound: Mapping[str, Bound]
) -> None:
    """A joint form needs several operators on one value."""
    operators = form_words()[form].operators
    able = {name: each for name, each in bound.items() if operators & set(each.ops)}
    if pattern.kind == "group":
        if not able:
            ops = " or ".join(op for each in bound.values() for op in each.ops)
            message = f"{form} cannot rewrite {ops}"
            hint = f"it applies to {', '.join(sorted(operators))}"
            findings.report(path, "form-does-not-apply", message, hint, value=True)
        return
    if pattern.kind == "node":
        message = f"{form} rewrites several operators together, and the pattern has one"
    else:
        readers: dict[tuple[str | None, ...], int] = {}
        for each in able.values():
            readers[each.reads] = readers.get(each.reads, 0) + 1
        if any(count > 1 for reads, count in readers.items() if reads and reads[0] is not None):
            return
        message = f"{form} rewrites several operators that read one value; the pattern has no two"
    hint = 'match them with "group", or with several "nodes" on one input'
    findings.report(path, "form-does-not-apply", message, hint, value=True)


def _check_graph(
    findings: Findings,
    rewrite: Mapping[str, Any],
    path: KeyPath,
    rule_id: str,
    patterns: Sequence[Bindings],
) -> Template | None:
    graph, outputs = rewrite["graph"], rewrite.get("outputs")
    if (
        not graph
        or not patterns
        or not all(each.ops for p in patterns for each in p.names.values())
    ):
        return None
    if any(pattern.kind == "group" for pattern in patterns):
        message = "a graph cannot replace a 'group': the number of its operators is not known"
        findings.report((*path, "graph"), "wrong-place", message, "name them: nodes: {...}")
        return None
    if not all(
        isinstance(node, dict) and isinstance(node.get("inputs") or [], list)
        for node in graph.values()
    ):
        return None
    if outputs is not None:
        if not isinstance(outputs, dict) or not all(isinstance(n, str) for n in outputs.values()):
            return None
        # The schema tells of a "$" in front of a name.
        outputs = {role: node.removeprefix("$") for role, node in outputs.items()}
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
    if not _check_roles(findings, path, outputs or {}, patterns):
        return None
    try:
        template = build_template(f"graph:{rule_id}", graph, outputs, readers[0])
    except TemplateErrors as error:
        for problem in error.problems:
            if problem.code == "bad-name":
                continue  # of a rule or of an operator: the schema tells of it
            hint = problem.hint
            if problem.word:
                hint = suggest(problem.word, problem.known) or choices(problem.known)
            place = (*path, *problem.path)
            # An unknown word is a value, or the key itself.
            value = bool(problem.word) and problem.word != problem.path[-1]
            findings.report(place, problem.code, problem.message, hint, value=value)
        return None
    if isinstance(rewrite.get("cost"), str):
        _check_cost(findings, rewrite["cost"], (*path, "cost"), template, patterns[0].names)
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
            place = (*path, "outputs", name)
            if bound.optional and name in outputs:
                message = f"'{name}' is optional, and a graph replaces it in every match"
                findings.report(place, "optional-output", message)
                sound = False
            if not bound.reads or bound.reads[0] is None:
                message = f"'{name}' does not say what it reads, so the graph cannot read it"
                findings.report(bound.path, "missing-input", message, "for example input: $x")
                sound = False
    return sound


def _check_cost(
    findings: Findings,
    text: str,
    path: KeyPath,
    template: Template,
    bound: Mapping[str, Bound],
) -> None:
    """A cost has to be what the template's weights have, whatever the sizes are."""
    numbers = {
        name: [
            attribute for attribute, kind in _common(each.ops).items() if kind in ("int", "float")
        ]
        for name, each in bound.items()
    }
    try:
        expression = parse_cost(text, numbers)
        for sizes, rank in _assignments(numbers, template):
            said = evaluate_number(expression, sizes, rank)
            flat = {f"{n}.{a}": size for n, own in sizes.items() for a, size in own.items()}
            found = template.parameters({RANK: rank, **flat})
            if abs(said - found) > 1e-9 * found:
                message = f"cost says {' '.join(text.split())}, the graph has {template.cost}"
                findings.report(path, "wrong-cost", message, value=True)
                return
    except ExpressionError as error:
        findings.expression(error, text, path)


def _common(ops: Sequence[str]) -> dict[str, str]:
    """Attributes that all of some operators have, and their kinds."""
    shared = set.intersection(*(set(ALL_OPERATORS[op]) for op in ops))
    return {name: ALL_OPERATORS[ops[0]][name].kind for name in sorted(shared)}


def _assignments(
    numbers: Mapping[str, Sequence[str]], template: Template
) -> Iterator[tuple[dict[str, dict[str, int]], int]]:
    """Random sizes and ranks; two polynomials that agree on all of them are the same one.

    Two different ones of degree d agree on a draw from n values with a probability of at most
    d / n (Schwartz and Zippel).
    """
    draw = random.Random(0)
    for _ in range(_TRIALS):
        width = draw.randint(2, _LARGEST)
        yield (
            {
                name: {
                    # The operators of a template read one value, so they are equally wide.
                    attribute: width
                    if attribute == "in_features" and name in template.roles
                    else draw.randint(2, _LARGEST)
                    for attribute in attributes
                }
                for name, attributes in numbers.items()
            },
            draw.randint(2, _LARGEST),
        )
