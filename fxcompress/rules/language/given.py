"""Rules as callers give them, and with other budgets."""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from os import PathLike

from pydantic import TypeAdapter, ValidationError

from fxcompress.errors import BudgetError, MemoryLimitError, RuleError
from fxcompress.plans.units import UNITS, CountedUnit
from fxcompress.rules.language.diagnostics import suggest
from fxcompress.rules.language.fields import Bytes
from fxcompress.rules.language.loader import LoadedRules, load_rules
from fxcompress.rules.language.schema import Rule, RuleSet
from fxcompress.rules.language.settings import Budget

Rules = str | PathLike[str] | RuleSet | LoadedRules
"""A rule file, the name of a preset, or a rule set."""


def read_rules(rules: Rules, memory: int | str | None = None) -> LoadedRules:
    """A rule file, a preset or a rule set, checked.

    Args:
        rules: one of these.
        memory: a limit on memory instead of that of the rules: bytes, or text (``"8GiB"``).

    Raises:
        RuleError: it is none of these, or cannot be used.
        MemoryLimitError: ``memory`` is no number of bytes.
    """
    if not isinstance(rules, (str, PathLike, RuleSet, LoadedRules)):
        raise RuleError(
            f"rules must be a file, the name of a preset or a RuleSet, not a {type(rules).__name__}"
        )
    loaded = rules if isinstance(rules, LoadedRules) else load_rules(rules)
    if memory is None:
        return loaded
    try:
        found = TypeAdapter(Bytes).validate_python(memory)
    except ValidationError as error:
        raise MemoryLimitError(
            f"memory is a number of bytes, or one with a unit, as in '8GiB', not {memory!r}"
        ) from error
    return replace(loaded, rules=loaded.rules.model_copy(update={"memory": found}))


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
        raise BudgetError(f"keep must be a number above 0, and 1 at most, not {keep!r}")
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
