"""Functions of the user's, by ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import typer

from fxcompress.errors import LoadError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Says what could not be read, whoever complained about it."""
    try:
        yield
    except typer.BadParameter:
        raise
    except Exception as error:
        raise LoadError(f"cannot read {what}: {type(error).__name__}: {error}") from error


def call(source: str, option: str) -> Any:
    """What a function of the user returns."""
    made = function(source, option)
    with reading(f"{option} {source}"):
        return made()


def function(source: str, option: str) -> Callable[..., Any]:
    """A function of the user."""
    found = _resolve(source, option)
    if not callable(found):
        raise typer.BadParameter(f"{option} {source!r} is a {type(found).__name__}, no function")
    return found  # type: ignore[no-any-return]


def is_code(source: str) -> bool:
    """Whether a text has the form ``place:function``."""
    place, colon, name = source.rpartition(":")
    return bool(colon and place) and name.isidentifier()


def _resolve(source: str, option: str) -> Any:
    place, colon, name = source.rpartition(":")
    if not colon:
        raise typer.BadParameter(
            f"{option} {source!r} is neither an existing directory or file nor module:function"
        )
    try:
        return getattr(import_code(place), name)
    except Exception as error:  # whatever the user's file does
        raise typer.BadParameter(f"{option} {source!r}: {type(error).__name__}: {error}") from error


def import_code(place: str) -> ModuleType:
    """A module by its name, or from a file."""
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.setdefault(Path(place).stem, module)  # classes in it can be pickled
    return module
