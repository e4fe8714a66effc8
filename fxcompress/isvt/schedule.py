"""How a budget falls from the dense model to its target."""

from __future__ import annotations

from typing import Literal

Schedule = Literal["soft", "hard"]


def share(schedule: Schedule, progress: float) -> float:
    """Share of what a budget takes away that is gone at a point of the way.

    ``soft`` is the cubic schedule of Zhu and Gupta (arXiv 1710.01878): fast while there is much
    to spare, slow towards the end.  ``hard`` takes away everything at once.

    Args:
        schedule: which.
        progress: from 0, the dense model, to 1; beyond that nothing changes.

    >>> [round(share("soft", at / 4), 3) for at in range(6)]
    [0.0, 0.578, 0.875, 0.984, 1.0, 1.0]
    >>> share("hard", 0.01)
    1.0
    """
    if schedule == "hard":
        return 1.0
    return 1.0 - (1.0 - min(max(progress, 0.0), 1.0)) ** 3
