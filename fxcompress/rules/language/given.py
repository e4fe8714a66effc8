"""Rules as callers give them, with what they say instead of the file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from numbers import Integral, Real
from os import PathLike

from pydantic import TypeAdapter, ValidationError

from fxcompress.errors import BudgetError, MemoryLimitError, RuleError
from fxcompress.metric.words import metric_words
from fxcompress.plans.units import UNITS, CountedUnit
from fxcompress.rules.language.diagnostics import Source, as_fraction, choices, suggest
from fxcompress.rules.language.extending import moved
from fxcompress.rules.language.fields import Bytes
from fxcompress.rules.language.loader import LoadedRules, load_rules, parse_rules
from fxcompress.rules.language.schema import Rule, RuleSet
from fxcompress.rules.language.settings import Budget, Metric
from fxcompress.rules.language.vocabulary import OPERATORS

Rules = str | PathLike[str] | RuleSet | LoadedRules
"""A rule file, the name of a preset, or a rule set."""


def read_rules(
    rules: Rules,
    *,
    keep: float | None = None,
    unit: str | None = None,
    memory: int | str | None = None,
    exclude: str | Iterable[str] | None = None,
    metric: str | None = None,
    seed: int | None = None,
) -> LoadedRules:
    """A rule file, a preset or a rule set, checked, with what a caller says instead.

    Args:
        rules: one of these.
        keep, unit: as of :func:`with_budget`.
        memory: a limit on memory instead of that of the rules: bytes, or text (``"8GiB"``).
        exclude: globs on module paths; what they match stays dense, whatever the rules say.
        metric: instead of ``metric.kind``.
        seed: instead of ``metric.seed``.

    Raises:
        RuleError: it is none of these, or cannot be used; or a glob or the metric is wrong.
        BudgetError: as of :func:`with_budget`.
        MemoryLimitError: ``memory`` is no number of bytes.
    """
    if not isinstance(rules, (str, PathLike, RuleSet, LoadedRules)):
        raise RuleError(
            f"rules must be a file, the name of a preset or a RuleSet, not a {type(rules).__name__}"
        )
    loaded = rules if isinstance(rules, LoadedRules) else load_rules(rules)
    loaded = with_budget(loaded, keep, unit)
    if exclude is not None:
        loaded = _excluding(loaded, (exclude,) if isinstance(exclude, str) else tuple(exclude))
    changed: dict[str, object] = {}
    if metric is not None or seed is not None:
        changed["metric"] = _metric(loaded.rules.metric, metric, seed)
    if memory is not None:
        changed["memory"] = _memory(memory)
    if not changed:
        return loaded
    return replace(loaded, rules=loaded.rules.model_copy(update=changed))


def _memory(memory: int | str) -> int:
    try:
        found: int = TypeAdapter(Bytes).validate_python(memory)
    except ValidationError as error:
        raise MemoryLimitError(
            f"memory is a number of bytes, or one with a unit, as in '8GiB', not {memory!r}"
        ) from error
    return found


def _metric(given: Metric, kind: str | None, seed: int | None) -> Metric:
    """A metric with another kind or seed."""
    changed: dict[str, object] = {}
    if kind is not None:
        known = metric_words()
        if kind not in known:
            hint = suggest(str(kind), known) or choices(known)
            raise RuleError(f"unknown metric {kind!r}; {hint}")
        changed["kind"] = kind
    if seed is not None:
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise RuleError(f"seed is a whole number, not {seed!r}")
        changed["seed"] = int(seed)
    return given.model_copy(update=changed)


def _excluding(loaded: LoadedRules, globs: tuple[str, ...]) -> LoadedRules:
    """Rules with one more, which keeps what the globs match dense and wins over all others."""
    if not globs or not all(isinstance(glob, str) for glob in globs):
        raise RuleError(f"exclude is a glob on module paths, or several, not {globs!r}")
    rules = loaded.rules.rules
    ids = {rule.id for rule in rules}
    name = next(
        n for n in ("excluded", *map("excluded-{}".format, range(len(ids)))) if n not in ids
    )
    text = (
        "budget: {keep: 1}\nrules:\n"
        f"- id: {name}\n"
        f"  priority: {1 + max(rule.priority for rule in rules)}\n"
        f"  match: {{node: {{op: [{', '.join(OPERATORS)}], name: {json.dumps(globs)}}}}}\n"
        "  rewrite: none\n"
    )
    more = parse_rules(text, "exclude")
    source, number = len(loaded.bases) + 1, len(rules)
    entries = {
        ("rules", number, *path[2:]): moved(entry, source)
        for path, entry in more.entries.items()
        if path[:2] == ("rules", 0)
    }
    return replace(
        loaded,
        rules=loaded.rules.model_copy(update={"rules": (*rules, *more.rules.rules)}),
        entries={**loaded.entries, **entries},
        expressions={**loaded.expressions, **more.expressions},
        bases=(*loaded.bases, Source(more.filename, more.text)),
    )


def with_budget(
    loaded: LoadedRules, keep: float | None = None, unit: str | None = None
) -> LoadedRules:
    """Rules with another fraction to keep, or with another unit that it is counted in.

    A unit that is measured, not counted, is of the matched operators, whatever the rules say:
    nothing else has an amount of it.

    Raises:
        BudgetError: ``keep`` is no fraction, ``unit`` no unit, or the rules have several budgets.
    """
    if keep is None and unit is None:
        return loaded
    if keep is not None and not (isinstance(keep, Real) and 0 < keep <= 1):
        hint = f": {written}" if (written := as_fraction(keep)) else ""
        raise BudgetError(f"keep must be a number above 0, and 1 at most, not {keep!r}{hint}")
    if unit is not None and not (isinstance(unit, str) and unit in UNITS):
        hint = suggest(str(unit), UNITS)
        raise BudgetError(
            f"unknown unit {unit!r}{f'; {hint}' if hint else ''} (units: {', '.join(UNITS)})"
        )
    budgets = loaded.rules.budgets
    if len(budgets) > 1:
        given = " and ".join(["keep="] * (keep is not None) + ["unit="] * (unit is not None))
        units = " and ".join(budget.unit for budget in budgets)
        raise BudgetError(
            f"{given} {'stands' if keep is None or unit is None else 'stand'} for one budget, and "
            f"the rules have several: {units}; change them in the rules"
        )
    changed: dict[str, object] = {} if keep is None else {"keep": float(keep)}
    if unit is not None:
        changed["unit"] = unit
        if not isinstance(UNITS[unit], CountedUnit):
            changed["of"] = "matched"
    budget = budgets[0].model_copy(update=changed)
    return replace(loaded, rules=loaded.rules.model_copy(update={"budget": budget}))


def at_progress(loaded: LoadedRules, share: float) -> LoadedRules:
    """Rules with the budgets that hold on the way from the dense model to their own.

    Args:
        loaded: the rules.
        share: of what the budgets take away, 0 (nothing yet) to 1 (the budgets themselves).
    """

    def softened(keep: float) -> float:
        return keep if share == 1 else 1 - share * (1 - keep)

    def budget(one: Budget) -> Budget:
        return one.model_copy(update={"keep": softened(one.keep)})

    def rule(one: Rule) -> Rule:
        if one.rewrite == "none" or one.rewrite.keep is None:
            return one
        keep = softened(one.rewrite.keep)
        return one.model_copy(update={"rewrite": one.rewrite.model_copy(update={"keep": keep})})

    rules = loaded.rules
    budgets = (
        budget(rules.budget)
        if isinstance(rules.budget, Budget)
        else tuple(budget(one) for one in rules.budget)
    )
    softer = {"budget": budgets, "rules": tuple(rule(one) for one in rules.rules)}
    return replace(loaded, rules=rules.model_copy(update=softer))
