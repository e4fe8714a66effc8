"""What one call of the command line has left on the disk, and the time that it took."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Run:
    """The call that is running.

    Attributes:
        kept: what stays if it is interrupted now; empty if nothing was written.
        started: reading of the clock.
    """

    kept: str = ""
    started: float = field(default_factory=time.perf_counter)

    @property
    def took(self) -> str:
        """The time since the start: ``"8.2 s"``."""
        return f"{time.perf_counter() - self.started:.1f} s"


RUN = Run()


def restart() -> None:
    """Begin a call."""
    RUN.kept, RUN.started = "", time.perf_counter()
