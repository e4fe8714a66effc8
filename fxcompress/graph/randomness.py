"""Random numbers that models draw: the user's generators stand afterwards where they stood.

Models that draw in eval mode (noise, sampled latents) do so from generators that the whole process
has in common.  While such a model is recorded and calibrated it draws from a stream of its own,
which begins where the user's stands.  What the user's data draw while they are gone through
(a shuffled loader) is the user's.

Models that draw nothing, which recording shows, leave the generators alone: another thread that
draws meanwhile would be set back.  Beside a model that does draw, such a thread draws from the
model's stream.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

_SELDOM = ("attention", "rnn", "lstm")
"""Operators that draw for dropout only, in training."""


@dataclass
class _Stream:
    """Where a model's own stream stands; None before it has drawn."""

    state: Any = None


_stream: ContextVar[_Stream | None] = ContextVar("stream", default=None)
"""Of the model that was recorded last in this thread; None if it draws nothing."""


@cache
def draws(operator: Any) -> bool:
    """Whether an operator of torch's dispatcher draws random numbers in eval mode."""
    name = operator._schema.name
    seeded = torch.Tag.nondeterministic_seeded in operator.tags
    return seeded and not any(word in name for word in _SELDOM)


def expect_draws(expected: bool) -> None:
    """Tell of the model that was recorded whether it draws random numbers."""
    _stream.set(_Stream() if expected else None)


@contextmanager
def own_stream() -> Iterator[None]:
    """What is drawn inside comes from the model's own stream."""
    stream = _stream.get()
    if stream is None:
        yield
        return
    before = _state()
    if stream.state is not None:
        _put(stream.state)
    try:
        yield
    finally:
        stream.state = _state()
        _put(before)


def _state() -> Any:
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = torch.cuda.get_rng_state_all() if started else []
    return torch.get_rng_state(), devices, np.random.get_state(), random.getstate()


def _put(state: Any) -> None:
    host, devices, arrays, plain = state
    torch.set_rng_state(host)
    if devices:
        torch.cuda.set_rng_state_all(devices)
    np.random.set_state(arrays)
    random.setstate(plain)


class Watched:
    """Puts the generators back after a first run, if it turns out to draw.

    Call :meth:`finish` with what torch's operators showed; draws of ``numpy`` and ``random`` are
    seen by their states.
    """

    def __init__(self) -> None:
        self._before = _state()

    def finish(self, drew: bool) -> bool:
        """Whether random numbers were drawn."""
        _, _, arrays, plain = _state()
        old = self._before[2]
        same = arrays[2] == old[2] and np.array_equal(arrays[1], old[1])
        drew = drew or not same or plain != self._before[3]
        if drew:
            _put(self._before)
        return drew
