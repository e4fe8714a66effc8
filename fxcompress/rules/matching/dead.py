"""Globs that hit nothing: one of a list of names, or an entry of ``unless``, is misspelt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.diagnostics import Source, suggest
from fxcompress.rules.language.globs import compile_globs
from fxcompress.rules.language.loader import LoadedRule
from fxcompress.rules.language.presets import preset_path
from fxcompress.rules.language.schema import Exclusion
from fxcompress.rules.matching.literals import matches_literal
from fxcompress.rules.matching.patterns import quoted
from fxcompress.rules.matching.run import pattern_nodes
from fxcompress.rules.matching.scopes import enclosing
from fxcompress.rules.matching.sites import SiteIndex

Named = Callable[[str], bool]


def dead_globs(index: SiteIndex) -> Callable[[LoadedRule], Iterator[str]]:
    """A function that tells for each rule what in it hits no operator of the graph.

    Nothing is said of presets, which name what only some models have, and of rules that say
    themselves that they may match nothing (``expect: {matches: {min: 0}}``).
    """
    operators = [
        operator for sites in index.by_op.values() for site in sites for operator in site.operators
    ]
    paths = {operator.path: None for operator in operators}
    around = {path: None for operator in operators for path in enclosing(operator)}

    of_preset = cache(_is_preset)

    @cache
    def hits(glob: str) -> bool:
        return any(map(compile_globs([glob]).match, paths))

    @cache
    def encloses(glob: str) -> bool:
        return any(map(compile_globs([glob]).match, around))

    def told(loaded: LoadedRule) -> Iterator[str]:
        rule = loaded.rule
        if rule.expect is not None and rule.expect.range.min == 0:
            return
        lists = dict.fromkeys(tuple(node.name) for node in pattern_nodes(rule) if node.name)
        for globs in lists:
            if len(globs) > 1:
                for glob in globs:
                    if not hits(glob):
                        yield _text(loaded, ("match",), glob, paths)
        for number, entry in enumerate(rule.unless):
            key = ("unless", number)
            dead = [glob for glob in entry.name or () if not hits(glob)]
            outside = [glob for glob in entry.scope or () if not encloses(glob)]
            for glob in dead:
                yield _text(loaded, key, glob, paths)
            for glob in outside:
                yield _text(loaded, key, glob, around)
            if not dead and not outside and not any(_fits(entry, each) for each in operators):
                shown = ", ".join(f"{key} {value}" for key, value in entry.attributes.items())
                where = loaded.at(*key)
                yield (
                    f"{where} warning[no-match]: rule '{rule.id}': this entry of 'unless' fits no "
                    f"operator{f' ({shown})' if shown else ''}, so it protects nothing"
                )

    return lambda loaded: iter(()) if of_preset(loaded.source) else told(loaded)


def _fits(entry: Exclusion, operator: Operator) -> bool:
    """Whether an operator has the name, the scope and the attributes of an entry."""
    if entry.name is not None and not compile_globs(entry.name).match(operator.path):
        return False
    if entry.scope is not None:
        named = compile_globs(entry.scope).match
        if not any(map(named, enclosing(operator))):
            return False
    return all(matches_literal(operator, *each) for each in entry.attributes.items())


def _text(loaded: LoadedRule, key: Sequence[str | int], glob: str, there: dict[str, None]) -> str:
    words = {part for path in there for part in path.split(".") if part}
    hint = suggest(glob.rpartition(".")[2], words)
    lost = "protects" if key[0] == "unless" else "matches"
    return (
        f"{loaded.at(*key)} warning[no-match]: rule '{loaded.rule.id}': nothing in the "
        f"graph is named {quoted([glob])}, so this {lost} nothing{f'; {hint}' if hint else ''}"
    )


def _is_preset(source: Source) -> bool:
    name = source.filename.replace("\\", "/").rpartition("/")[2].removesuffix(".yaml")
    path = preset_path(name)
    return path is not None and path.read_text(encoding="utf-8") == source.text
