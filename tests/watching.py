"""What a piece of code does beside computing: imports, opened files, executed text, processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


def watcher(
    expected: Callable[[str, tuple[Any, ...]], bool],
) -> Callable[[], AbstractContextManager[list[str]]]:
    """A context manager that collects the audit events (PEP 578) inside it.

    Args:
        expected: whether an event, with its arguments, is of no interest.
    """
    events: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and not expected(event, arguments):
            events.append(f"{event} {arguments!r:.300}")

    sys.addaudithook(audit)

    @contextmanager
    def watched() -> Iterator[list[str]]:
        nonlocal watching
        events.clear()
        watching = True
        try:
            yield events
        finally:
            watching = False

    return watched
