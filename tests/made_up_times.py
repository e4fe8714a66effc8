"""Latencies by a formula instead of a clock."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fxcompress.forms import fit
from fxcompress.pipeline import latency
from fxcompress.pipeline.latency import Timing

CALLS = {"pivoted": 4, "tucker2": 3}
"""Calls of a form's body that count; two for the others."""


def made_up_times(monkeypatch: pytest.MonkeyPatch, cache: Path) -> list[str]:
    """A call costs 1, a multiply-accumulate 1e-6.

    Returns:
        The keys of all operators that are asked for, as they are.
    """
    asked: list[str] = []

    def measured(entries: dict[str, Timing], device: object, tick: object) -> dict[str, float]:
        asked.extend(entries)
        out = {}
        for key, entry in entries.items():
            if entry.form is None:
                out[key] = 1 + 1e-6 * entry.shapes[0].macs
            else:
                macs = int(fit(entry.form, entry.shapes).macs(np.array([entry.rank]))[0])
                out[key] = CALLS.get(entry.form.name, 2) + 1e-6 * macs
        return out

    monkeypatch.setattr(latency, "_measured", measured)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    return asked
