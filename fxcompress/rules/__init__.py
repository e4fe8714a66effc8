"""The rule language: load rules, match them against a recorded graph, explain the outcome."""

from fxcompress.rules.cases import CaseResult, run_cases
from fxcompress.rules.completion import json_schema
from fxcompress.rules.explain import Explanation
from fxcompress.rules.given import Rules, at_progress, read_rules, with_keep
from fxcompress.rules.loader import LoadedRules, load_rules, parse_rules
from fxcompress.rules.matcher import match_rules
from fxcompress.rules.presets import preset_names, preset_path
from fxcompress.rules.result import Funnel, Match, MatchResult, Miss, Problem
from fxcompress.rules.schema import (
    Budget,
    Damping,
    Defaults,
    Metric,
    Rewrite,
    Rule,
    RuleSet,
    Solver,
)

__all__ = [
    "Budget",
    "CaseResult",
    "Damping",
    "Defaults",
    "Explanation",
    "Funnel",
    "LoadedRules",
    "Match",
    "MatchResult",
    "Metric",
    "Miss",
    "Problem",
    "Rewrite",
    "Rule",
    "RuleSet",
    "Rules",
    "Solver",
    "at_progress",
    "json_schema",
    "load_rules",
    "match_rules",
    "parse_rules",
    "preset_names",
    "preset_path",
    "read_rules",
    "run_cases",
    "with_keep",
]
