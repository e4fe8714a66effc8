"""Paths of modules: ``layers.0.mlp`` contains ``layers.0.mlp.up``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def above(path: str) -> Iterator[str]:
    """Paths of the modules that contain one, the innermost first; the model's own, '', last.

    >>> list(above("layers.0.up"))
    ['layers.0', 'layers', '']
    """
    while path:
        path = path.rpartition(".")[0]
        yield path


def containing(paths: Iterable[str]) -> frozenset[str]:
    """Paths of all modules that contain one of some modules."""
    return frozenset(outer for path in paths for outer in above(path))
