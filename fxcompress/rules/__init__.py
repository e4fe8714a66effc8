"""The rule language: load rules, match them against a recorded graph, explain the outcome.

:mod:`fxcompress.rules.language` turns YAML into validated rules, :mod:`fxcompress.rules.matching`
rules and a recorded graph into matches and explanations.
"""

from fxcompress.rules.language.completion import json_schema
from fxcompress.rules.language.diagnostics import choices, suggest
from fxcompress.rules.language.given import Rules, at_progress, read_rules, with_budget
from fxcompress.rules.language.globs import compile_globs
from fxcompress.rules.language.loader import LoadedRules, load_rules, parse_rules
from fxcompress.rules.language.presets import preset_names, preset_path
from fxcompress.rules.language.schema import (
    Case,
    CaseNode,
    GraphNode,
    Limits,
    NodePattern,
    Rewrite,
    Rule,
    RuleSet,
)
from fxcompress.rules.language.settings import Budget, Damping, Defaults, Metric, Solver
from fxcompress.rules.language.vocabulary import STEPS
from fxcompress.rules.matching.cases import CaseResult, run_cases
from fxcompress.rules.matching.explain import Explanation
from fxcompress.rules.matching.matcher import match_rules
from fxcompress.rules.matching.result import Bundle, Funnel, Match, MatchResult, Miss, Problem

__all__ = [
    "STEPS",
    "Budget",
    "Bundle",
    "Case",
    "CaseNode",
    "CaseResult",
    "Damping",
    "Defaults",
    "Explanation",
    "Funnel",
    "GraphNode",
    "Limits",
    "LoadedRules",
    "Match",
    "MatchResult",
    "Metric",
    "Miss",
    "NodePattern",
    "Problem",
    "Rewrite",
    "Rule",
    "RuleSet",
    "Rules",
    "Solver",
    "at_progress",
    "choices",
    "compile_globs",
    "json_schema",
    "load_rules",
    "match_rules",
    "parse_rules",
    "preset_names",
    "preset_path",
    "read_rules",
    "run_cases",
    "suggest",
    "with_budget",
]
