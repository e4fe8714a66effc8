"""Imports that wait: for a module of another package, or until a public name is asked for.

Plug-ins wait, too, until something is looked up that they may have registered.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def exported(
    package: str, places: Mapping[str, tuple[str, ...]]
) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    """``__all__``, ``__getattr__`` and ``__dir__`` of a package that imports its names on demand.

    What checks rule files does without torch, which takes seconds to import.

    Args:
        package: its ``__name__``.
        places: public names by the module that has them; a package that is public has no names.
    """
    place_of = {name: place for place, names in places.items() for name in names}
    packages = {place.rpartition(".")[2]: place for place, names in places.items() if not names}
    public = sorted(place_of)

    def get(name: str) -> object:
        if name in packages:
            return importlib.import_module(packages[name])
        if name not in place_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return public, get, lambda: [*vars(sys.modules[package]), *public, *packages]


def import_after(trigger: str, name: str) -> None:
    """Import ``name`` after ``trigger``: now, if that is imported already, or when it will be."""
    if trigger in sys.modules:
        importlib.import_module(name)
    else:
        sys.meta_path.insert(0, _Finder(trigger, name))


@cache
def load_plugins(group: str) -> None:
    """Import what installed packages offer; one that is broken is reported and left out.

    Args:
        group: of the entry points that name modules.
    """
    for entry in importlib.metadata.entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"the plug-in {entry.name} ({entry.value}) cannot be imported: "
                f"{type(error).__name__}: {error}",
                stacklevel=3,
            )


class _Finder(MetaPathFinder):
    """Finds the trigger where everyone else does, and lets its execution be followed by ours."""

    def __init__(self, trigger: str, name: str) -> None:
        self.trigger = trigger
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of the trigger; None for any other module."""
        if fullname != self.trigger or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            importlib.import_module(self.name)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
