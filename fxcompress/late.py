"""Import a module of this package once a module of another one has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(trigger: str, name: str) -> None:
    """Import ``name`` after ``trigger``: now, if that is imported already, or when it will be."""
    if trigger in sys.modules:
        importlib.import_module(name)
    else:
        sys.meta_path.insert(0, _Finder(trigger, name))


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
