"""The rule language: load rules, match them against a recorded graph, explain the outcome.

:mod:`fxcompress.rules.language` turns YAML into validated rules, :mod:`fxcompress.rules.matching`
rules and a recorded graph into matches and explanations.
"""

from typing import TYPE_CHECKING

from fxcompress.late import exported

if TYPE_CHECKING:
    from fxcompress.rules.language.completion import json_schema as json_schema
    from fxcompress.rules.language.diagnostics import choices as choices
    from fxcompress.rules.language.diagnostics import suggest as suggest
    from fxcompress.rules.language.given import Rules as Rules
    from fxcompress.rules.language.given import at_progress as at_progress
    from fxcompress.rules.language.given import read_rules as read_rules
    from fxcompress.rules.language.given import with_budget as with_budget
    from fxcompress.rules.language.globs import compile_globs as compile_globs
    from fxcompress.rules.language.loader import LoadedRules as LoadedRules
    from fxcompress.rules.language.loader import load_rules as load_rules
    from fxcompress.rules.language.loader import parse_rules as parse_rules
    from fxcompress.rules.language.presets import preset_names as preset_names
    from fxcompress.rules.language.presets import preset_path as preset_path
    from fxcompress.rules.language.schema import Case as Case
    from fxcompress.rules.language.schema import CaseNode as CaseNode
    from fxcompress.rules.language.schema import GraphNode as GraphNode
    from fxcompress.rules.language.schema import Limits as Limits
    from fxcompress.rules.language.schema import NodePattern as NodePattern
    from fxcompress.rules.language.schema import Rewrite as Rewrite
    from fxcompress.rules.language.schema import Rule as Rule
    from fxcompress.rules.language.schema import RuleSet as RuleSet
    from fxcompress.rules.language.settings import Budget as Budget
    from fxcompress.rules.language.settings import Damping as Damping
    from fxcompress.rules.language.settings import Defaults as Defaults
    from fxcompress.rules.language.settings import Metric as Metric
    from fxcompress.rules.language.settings import Solver as Solver
    from fxcompress.rules.language.vocabulary import STEPS as STEPS
    from fxcompress.rules.matching.cases import CaseResult as CaseResult
    from fxcompress.rules.matching.cases import run_cases as run_cases
    from fxcompress.rules.matching.explain import Explanation as Explanation
    from fxcompress.rules.matching.matcher import match_rules as match_rules
    from fxcompress.rules.matching.result import Bundle as Bundle
    from fxcompress.rules.matching.result import Funnel as Funnel
    from fxcompress.rules.matching.result import Match as Match
    from fxcompress.rules.matching.result import MatchResult as MatchResult
    from fxcompress.rules.matching.result import Miss as Miss
    from fxcompress.rules.matching.result import Problem as Problem

__all__, __getattr__, __dir__ = exported(
    __name__,
    {
        "fxcompress.rules.language.completion": ("json_schema",),
        "fxcompress.rules.language.diagnostics": (
            "choices",
            "suggest",
        ),
        "fxcompress.rules.language.given": (
            "Rules",
            "at_progress",
            "read_rules",
            "with_budget",
        ),
        "fxcompress.rules.language.globs": ("compile_globs",),
        "fxcompress.rules.language.loader": (
            "LoadedRules",
            "load_rules",
            "parse_rules",
        ),
        "fxcompress.rules.language.presets": (
            "preset_names",
            "preset_path",
        ),
        "fxcompress.rules.language.schema": (
            "Case",
            "CaseNode",
            "GraphNode",
            "Limits",
            "NodePattern",
            "Rewrite",
            "Rule",
            "RuleSet",
        ),
        "fxcompress.rules.language.settings": (
            "Budget",
            "Damping",
            "Defaults",
            "Metric",
            "Solver",
        ),
        "fxcompress.rules.language.vocabulary": ("STEPS",),
        "fxcompress.rules.matching.cases": (
            "CaseResult",
            "run_cases",
        ),
        "fxcompress.rules.matching.explain": ("Explanation",),
        "fxcompress.rules.matching.matcher": ("match_rules",),
        "fxcompress.rules.matching.result": (
            "Bundle",
            "Funnel",
            "Match",
            "MatchResult",
            "Miss",
            "Problem",
        ),
        "fxcompress.rules.language": (),
        "fxcompress.rules.matching": (),
    },
)
