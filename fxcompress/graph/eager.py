"""Run what ``torch.compile`` compiled as it was written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_lock = threading.Lock()
_inside = 0
_stance: Any = None


@contextmanager
def eager() -> Iterator[None]:
    """Nothing is compiled inside, nor run compiled: hooks would have it compiled anew.

    The stance is the whole process's, so it is taken by the first thread that comes and given
    back by the last one that goes.
    """
    global _inside, _stance
    with _lock:
        if not _inside:
            _stance = torch.compiler.set_stance("force_eager")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _stance.__exit__(None, None, None)
