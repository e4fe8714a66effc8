"""Rule tests: what a rule file says its rules match and miss, compared with what they do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from fxcompress.errors import FxcompressError
from fxcompress.rules.language.loader import LoadedRules
from fxcompress.rules.language.schema import Case
from fxcompress.rules.language.vocabulary import STEPS
from fxcompress.rules.matching.case_graph import build_operators
from fxcompress.rules.matching.explain import Explanation
from fxcompress.rules.matching.matcher import match_rules
from fxcompress.rules.matching.result import MatchResult, Miss

MatchModel = Callable[[Case], MatchResult]
"""Matches the rules against the model of a case."""


@dataclass(frozen=True)
class Failure:
    """One thing that a rule did otherwise than a test expects.

    Attributes:
        location: ``"file:line:column"`` of the expectation.
        message: what was expected, and what was found.
        explanation: what became of all operators under the rule; may be empty.
    """

    location: str
    message: str
    explanation: str = ""


@dataclass(frozen=True)
class CaseResult:
    """The outcome of one test; ``str()`` gives it in full.

    Attributes:
        name: of the test.
        location: ``"file:line:column"`` of the test.
        failures: empty if it passed.
    """

    name: str
    location: str
    failures: tuple[Failure, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether everything was as expected."""
        return not self.failures

    def __str__(self) -> str:
        if self.passed:
            return f"ok    {self.name}"
        lines = [f"FAIL  {self.name}  ({self.location})"]
        for failure in self.failures:
            lines += f"{failure.location}: {failure.message}".splitlines()
        # One explanation of each rule, below all that was said of it.
        for text in dict.fromkeys(failure.explanation for failure in self.failures):
            lines += text.splitlines()
        return "\n      ".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The outcome as plain data, for tools."""
        failures = [
            {"location": f.location, "message": f.message, "explanation": f.explanation}
            for f in self.failures
        ]
        return {
            "name": self.name,
            "location": self.location,
            "passed": self.passed,
            "failures": failures,
        }


def run_cases(loaded: LoadedRules, match_model: MatchModel | None = None) -> tuple[CaseResult, ...]:
    """Run all tests of a rule file.

    Every operator of a ``graph`` with a weight of its own can be rewritten; ties and repeated
    calls are seen as they are in models.

    Args:
        loaded: the rules with their tests.
        match_model: runs the tests that name a model.

    Raises:
        ValueError: a test names a model, and there is no ``match_model``.
    """
    return tuple(
        _run(loaded, index, case, match_model) for index, case in enumerate(loaded.rules.tests)
    )


def _run(loaded: LoadedRules, index: int, case: Case, match_model: MatchModel | None) -> CaseResult:
    keys = ("tests", index)
    location = loaded.place(*keys)
    try:
        if case.graph is not None:
            result = match_rules(loaded, build_operators(case.graph), lambda operator: None)
        elif match_model is not None:
            result = match_model(case)
        else:
            raise ValueError(f"test '{case.name}' needs a model")
    except FxcompressError as error:
        place = loaded.place(*keys, "model" if case.graph is None else "graph")
        return CaseResult(case.name, location, (Failure(place, f"did not run: {error}"),))
    failures = [*_matches(loaded, index, case, result), *_misses(loaded, index, case, result)]
    return CaseResult(case.name, location, tuple(failures))


def _matches(loaded: LoadedRules, index: int, case: Case, result: MatchResult) -> Iterator[Failure]:
    for rule_id, wanted in case.matches.items():
        won = [m for m in (*result.matches, *result.protected) if m.rule_id == rule_id]
        paths = {match.weight: match.path for match in won}
        groups: list[tuple[str, ...]] = [(path,) for path in paths.values()]
        if any(isinstance(item, tuple) for item in wanted) and rule_id in result.instances:
            # The members of a match of several operators count together.
            instances = result.instances[rule_id]
            groups = [tuple(paths[weight] for weight in i.claimed) for i in instances]
        found = {frozenset(group) for group in groups if group}
        expected = {frozenset((m,) if isinstance(m, str) else m) for m in wanted}
        if found == expected:
            continue
        lines = [f"rule '{rule_id}' should match {_listed(expected)}; it matches {_listed(found)}"]
        reasons = dict(_reasons(result, rule_id))
        for missing in sorted(expected - found, key=sorted):
            lines += [f"not matched: {path}{reasons.get(path, _OTHER)}" for path in sorted(missing)]
        lines += [
            f"not expected: {_shown(extra)}" for extra in sorted(found - expected, key=sorted)
        ]
        place = loaded.place("tests", index, "matches", rule_id)
        yield Failure(place, "\n  ".join(lines), str(Explanation.of(result, rule=rule_id)))


_OTHER = " (the rule is about other operators)"


def _reasons(result: MatchResult, rule_id: str) -> Iterator[tuple[str, str]]:
    for match in (*result.matches, *result.protected):
        if match.rule_id == rule_id:
            yield match.path, " (matched, but not together with these)"
    for miss in result.misses_of(rule_id):
        yield miss.path, f" (lost {_told(miss)})"


def _misses(loaded: LoadedRules, index: int, case: Case, result: MatchResult) -> Iterator[Failure]:
    for rule_id, wanted in case.misses.items():
        won = {m.path for m in (*result.matches, *result.protected) if m.rule_id == rule_id}
        lost = {miss.path: miss for miss in result.misses_of(rule_id)}
        for path, reason in wanted.items():
            miss = lost.get(path)
            if path in won:
                found = "the rule matches it"
            elif miss is None:
                if reason == "op":
                    continue
                found = "the rule is about other operators (step 'op')"
            elif reason == miss.step if reason in STEPS else reason in miss.reason:
                continue
            else:
                found = f"it was lost {_told(miss)}"
            what = f"at step '{reason}'" if reason in ("op", *STEPS) else f"because of '{reason}'"
            message = f"rule '{rule_id}' should lose {path} {what}; {found}"
            place = loaded.place("tests", index, "misses", rule_id, path)
            yield Failure(place, message, str(Explanation.of(result, rule=rule_id)))


def _told(miss: Miss) -> str:
    reason = miss.reason.removeprefix(f"{miss.step}: ")
    return f"at step '{miss.step}', {miss.location}: {reason}"


def _listed(groups: Collection[frozenset[str]]) -> str:
    return ", ".join(sorted(map(_shown, groups))) or "nothing"


def _shown(group: frozenset[str]) -> str:
    return next(iter(group)) if len(group) == 1 else f"[{', '.join(sorted(group))}]"
