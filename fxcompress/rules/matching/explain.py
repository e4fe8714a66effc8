"""Why a rule got what it got: funnels, near misses, and what was rejected.

Everything here is read off the :class:`~fxcompress.rules.matching.result.MatchResult`; nothing is
matched a second time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from fxcompress.forms.words import hidden_forms
from fxcompress.notebook import Shown
from fxcompress.rules.language.vocabulary import STEPS
from fxcompress.rules.matching.folding import fold_numbers, fold_paths, words_of
from fxcompress.rules.matching.result import Funnel, Instance, Match, MatchResult

_OUTCOME = "rewritten"
_MOST_LINES = 12
_WIDEST = 64
_ABOUT_OTHERS = ("pattern", "overlap")
"""Steps whose reasons name other operators."""
_DEPTHS = {step: depth for depth, step in enumerate((*STEPS, _OUTCOME))}


@dataclass(frozen=True)
class LostSites:
    """Sites that a rule lost at the same step for the same reason.

    Attributes:
        step: where they were lost; ``"rewritten"`` for matches that the plan left dense.
        reason: why.
        location: the condition in the rule file.
        paths: (folded path, number of sites) in graph order.
    """

    step: str
    reason: str
    location: str
    paths: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Matched:
    """Matches of several operators that are alike.

    Attributes:
        scope: folded path of the innermost module around all operators of a match.
        operators: (name in the pattern, path below the scope).
        count: number of matches.
    """

    scope: str
    operators: tuple[tuple[str, str], ...]
    count: int


@dataclass(frozen=True)
class RuleExplanation:
    """One rule.

    Attributes:
        rule_id: the rule.
        location: ``"file:line"``.
        funnel: sites left after every step.
        near: what got furthest and was lost all the same.
        rejected: everything else, the furthest first.
        without: sites that the rule has, and for which it has one form less.
        together: sites that may be rewritten with what makes the value that they read, and what
            that is.
        matched: what a rule about several operators has; empty for other rules.
    """

    rule_id: str
    location: str
    funnel: Funnel
    near: tuple[LostSites, ...]
    rejected: tuple[LostSites, ...]
    without: tuple[LostSites, ...] = ()
    together: tuple[LostSites, ...] = ()
    matched: tuple[Matched, ...] = ()


@dataclass(frozen=True, repr=False)
class Explanation(Shown):
    """The explanation of a whole rule file, or of one rule; ``str()`` gives the text.

    Attributes:
        rules: one explanation per rule, in file order.
        problems: the problems found while matching.
    """

    rules: tuple[RuleExplanation, ...]
    problems: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        result: MatchResult,
        outcomes: Mapping[str, str] | None = None,
        *,
        rule: str | None = None,
        refused: Mapping[str, str] = MappingProxyType({}),
        hidden: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> Explanation:
        """Explain a result.

        Args:
            result: what the matcher returned.
            outcomes: weight -> why the plan left it dense (``"no saving: rank 448 ≥ break-even
                418"``). Matched weights without an entry count as rewritten. None: there is
                no plan, and the funnel ends with what was matched.
            rule: explain this rule only.
            refused: weight -> why the forms for hidden values that its rule offers cannot have it.
            hidden: weight of what reads a hidden value -> weights of what makes it -> paths.

        Raises:
            KeyError: there is no rule of that id.
        """
        wanted = tuple(result.funnels) if rule is None else (rule,)
        return cls(
            tuple(_explain(result, rule_id, outcomes, refused, hidden) for rule_id in wanted),
            tuple(item.text for item in result.problems if item.rule_id in wanted),
        )

    @property
    def headline(self) -> str:
        """``gates 6 of 14, rest 8 of 14``: what every rule gets of what it looks at."""
        counts = [(item.rule_id, item.funnel.steps) for item in self.rules]
        return ", ".join(
            f"{rule} {steps[-1][1]} of {steps[0][1]}" for rule, steps in counts if steps
        )

    def __str__(self) -> str:
        return "\n\n".join(_rule_text(item) for item in self.rules)

    def to_json(self) -> dict[str, Any]:
        """Funnel, matches and near misses of every rule; nothing but JSON's own types."""
        rules = [
            {
                "rule": item.rule_id,
                "location": item.location,
                "funnel": dict(item.funnel.steps),
                **_matched_json(item),
                "near_misses": [_group_json(group) for group in item.near],
                "rejected": [_group_json(group) for group in item.rejected],
                **({"left_out": [*map(_group_json, item.without)]} if item.without else {}),
                **({"together": [*map(_group_json, item.together)]} if item.together else {}),
            }
            for item in self.rules
        ]
        return {"rules": rules, "problems": list(self.problems)}


def _explain(
    result: MatchResult,
    rule_id: str,
    outcomes: Mapping[str, str] | None,
    refused: Mapping[str, str],
    hidden: Mapping[str, Mapping[str, str]],
) -> RuleExplanation:
    funnel = result.funnels[rule_id]
    won = [match for match in result.matches if match.rule_id == rule_id]
    readers = [match for match in won if match.weight in hidden]
    made = {weight for match in readers for weight in hidden[match.weight]}
    losses: list[tuple[str, str, str, str]] = [
        (miss.step, miss.reason, miss.location, miss.path or miss.operator)
        for miss in result.misses_of(rule_id)
        if miss.weight not in made
    ]
    fewer: list[tuple[str, str, str, str]] = []
    lost: set[str] = set()
    for m in won:
        if m.weight in made and rule_id in result.instances:
            continue  # the pattern speaks of it as of what makes the value
        if m.weight in refused:
            rest = m.weight in made or set(m.forms).difference(hidden_forms(m.forms))
            row = ("legal", refused[m.weight], m.location, m.path or m.operators[0])
            (fewer if rest else losses).append(row)
            lost |= set() if rest else {m.weight}
    funnel = _without(funnel, lost, result.instances.get(rule_id))
    if outcomes is not None:
        dense = [match for match in won if match.weight in outcomes]
        losses += [
            (_OUTCOME, outcomes[m.weight], m.location, m.path or m.operators[0]) for m in dense
        ]
        if won:
            instances = result.instances.get(rule_id)
            rewritten = len(won) - len(dense)
            if instances is not None:
                rewritten = sum(
                    one.counted for one in instances if set(one.claimed) - set(outcomes)
                )
            steps = (*funnel.steps, (_OUTCOME, rewritten))
            funnel = replace(funnel, steps=steps)
    folded = sorted(_grouped(losses, {*refused.values()}), key=lambda group: -_DEPTHS[group.step])
    # A site whose name does not fit was never near, even if nothing else came further.
    furthest = max((_DEPTHS[group.step] for group in folded), default=0)
    near = tuple(g for g in folded if _DEPTHS[g.step] == furthest and furthest > 0)
    rejected = tuple(folded[len(near) :])
    matched = _matched(result.instances.get(rule_id, ()))
    without = tuple(_grouped(fewer, {*refused.values()}))
    together = tuple(_grouped([_with_makers(m, hidden[m.weight]) for m in readers], ()))
    return RuleExplanation(
        rule_id, funnel.location, funnel, near, rejected, without, together, matched
    )


def _with_makers(match: Match, makers: Mapping[str, str]) -> tuple[str, str, str, str]:
    """``narrow: with gate_proj and up_proj``, paths as they are in the module around all."""
    parts = [path.split(".") for path in (match.path, *makers.values())]
    depth = 0
    while all(len(path) > depth + 1 and path[depth] == parts[0][depth] for path in parts):
        depth += 1
    *most, last = (".".join(path[depth:]) for path in parts[1:])
    named = f"{', '.join(most)} and {last}" if most else last
    reason = f"{' and '.join(hidden_forms(match.forms))}: with {named}"
    return "legal", reason, match.location, match.path


def _without(funnel: Funnel, lost: set[str], instances: Sequence[Instance] | None) -> Funnel:
    """A funnel that does not count matches of which nothing can be rewritten."""
    gone = len(lost)
    if instances is not None:
        gone = sum(one.counted for one in instances if lost and lost.issuperset(one.claimed))
    if not gone:
        return funnel
    last = {step: count - gone for step, count in funnel.steps if step in ("legal", "kept")}
    return replace(funnel, steps=tuple((step, last.get(step, n)) for step, n in funnel.steps))


def _grouped(
    losses: Iterable[tuple[str, str, str, str]], about_others: Collection[str]
) -> Iterator[LostSites]:
    """Losses of one step, place and reason; reasons that differ in a number only are one.

    Args:
        losses: step, reason, location and path of each.
        about_others: reasons that name other operators, beside those of some steps.
    """
    groups: dict[tuple[str, tuple[str, ...], str], tuple[list[str], list[str]]] = {}
    for step, reason, location, path in losses:
        others = step in _ABOUT_OTHERS or reason in about_others
        alike = words_of(reason, paths=True) if others else (reason,)
        reasons, paths = groups.setdefault((step, alike, location), ([], []))
        reasons.append(reason)
        paths.append(path)
    for (step, _, location), (reasons, paths) in groups.items():
        yield LostSites(step, fold_numbers(reasons), location, fold_paths(paths))


def _matched(instances: Sequence[Instance]) -> tuple[Matched, ...]:
    scopes: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for instance in instances:
        parts = [path.split(".") for _, path in instance.operators]
        depth = 0
        while all(len(path) > depth + 1 and path[depth] == parts[0][depth] for path in parts):
            depth += 1
        below = [".".join(path[depth:]) for path in parts]
        names = [name for name, _ in instance.operators]
        operators = tuple(zip(names, below, strict=True))
        scopes.setdefault(operators, []).append(".".join(parts[0][:depth]))
    return tuple(
        Matched(scope, operators, count)
        for operators, paths in scopes.items()
        for scope, count in fold_paths(paths)
    )


def _rule_text(item: RuleExplanation) -> str:
    rows = [("near miss", *row) for group in item.near for row in _rows(group)]
    rows += [("left out", *row) for group in item.without for row in _rows(group)]
    rows += [("together", *row) for group in item.together for row in _rows(group)]
    rows += [("rejected", *row) for group in item.rejected for row in _rows(group)]
    widths = [
        min(_WIDEST, max((len(row[column]) for row in rows), default=0)) for column in range(3)
    ]
    lines = [f"rule {item.rule_id} ({item.location})", _funnel_text(item.funnel)]
    if item.funnel.anchors:
        anchors = ", ".join(f"'{anchor}'" for anchor in item.funnel.anchors)
        lines[-1] += f"   (of {anchors})"
    lines += map(_matched_text, item.matched[:_MOST_LINES])
    more = sum(matched.count for matched in item.matched[_MOST_LINES:])
    lines += [f"matched    and {more} more"] * (more > 0)
    for kind, path, reason, location in rows:
        line = f"{kind:<9}  {path:<{widths[1]}}  {reason:<{widths[2]}}  {location}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _funnel_text(funnel: Funnel) -> str:
    # Without an overlap, and with a plan, "60 legal → 60 kept → 58 rewritten" says "60" twice.
    counts = dict(funnel.steps)
    if _OUTCOME in counts and counts["kept"] == counts["legal"]:
        steps = tuple(step for step in funnel.steps if step[0] != "kept")
        return str(replace(funnel, steps=steps))
    return str(funnel)


def _matched_text(item: Matched) -> str:
    operators = ", ".join(f"{name} = {path}" for name, path in item.operators)
    count = f" ({item.count})" if item.count > 1 else ""
    return f"matched    {item.scope or 'the model'}{count}   {operators}"


def _rows(group: LostSites) -> list[tuple[str, str, str]]:
    rows = [
        (f"{path} ({count})" if count > 1 else path, group.reason, group.location)
        for path, count in group.paths[:_MOST_LINES]
    ]
    rest = sum(count for _, count in group.paths[_MOST_LINES:])
    if rest:
        rows.append((f"and {rest} more", group.reason, group.location))
    return rows


def _matched_json(item: RuleExplanation) -> dict[str, Any]:
    """What only rules about several operators have."""
    if not item.funnel.anchors:
        return {}
    matched = [
        {
            "scope": one.scope,
            "operators": [{"node": name, "path": path} for name, path in one.operators],
            "matches": one.count,
        }
        for one in item.matched
    ]
    return {"counted": list(item.funnel.anchors), "matched": matched}


def _group_json(group: LostSites) -> dict[str, Any]:
    return {
        "step": group.step,
        "reason": group.reason,
        "location": group.location,
        "sites": sum(count for _, count in group.paths),
        "paths": [path for path, _ in group.paths],
    }
