"""Which modules enclose an operator: the meaning of ``scope``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.globs import compile_globs


@lru_cache(maxsize=4096)
def _and_above(path: str) -> frozenset[str]:
    """A module and all that it lies in: ``"a.b"`` lies in ``"a"``, and all in the root ``""``."""
    parts = path.split(".") if path else []
    return frozenset(".".join(parts[:length]) for length in range(len(parts) + 1))


def enclosing(operator: Operator) -> frozenset[str]:
    """Paths of the modules that a call lies in: those that hold it, and those that made it.

    >>> call = Operator("q", "linear", "h.0.attn.q", "h.0.attn", {}, (), (), None, None, True)
    >>> sorted(enclosing(call))
    ['', 'h', 'h.0', 'h.0.attn']
    """
    made = _and_above(operator.scope)
    if not operator.module:
        return made
    holder = operator.path.rpartition(".")[0]
    return made if holder == operator.scope else made | _and_above(holder)


def scope_test(globs: Iterable[str]) -> Callable[[Iterable[Operator]], bool]:
    """Whether a module that fits the globs encloses all of several operators."""
    named = compile_globs(globs).match
    known: dict[frozenset[str], bool] = {}

    def test(operators: Iterable[Operator]) -> bool:
        common = frozenset.intersection(*map(enclosing, operators))
        if common not in known:
            known[common] = any(named(path) for path in common)
        return known[common]

    return test


def innermost(globs: Iterable[str]) -> Callable[[Operator], str | None]:
    """The deepest module that fits the globs and encloses an operator; None if none does."""
    named = compile_globs(globs).match

    def find(operator: Operator) -> str | None:
        return max((path for path in enclosing(operator) if named(path)), key=len, default=None)

    return find
