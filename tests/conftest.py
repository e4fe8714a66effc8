"""Settings for all tests: one thread, no network, the same random numbers every time."""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

from fxcompress.pipeline import speed

torch.set_num_threads(1)

# Processes that tests are shared out to have no main module, and click asks it for its name.
sys.modules.setdefault("__main__", sys.modules[__name__])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every forward pass that is timed takes a second: nothing depends on the machine."""
    ticks = itertools.count()
    monkeypatch.setattr(speed, "now", lambda *devices: float(next(ticks)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="accept texts as they are now")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with a file in the folder ``golden`` beside the test."""

    def compare(name: str, text: str) -> None:
        path = Path(request.path).parent / "golden" / name
        if request.config.getoption("--write-golden"):
            path.write_text(text, encoding="utf-8")
        assert text == path.read_text(encoding="utf-8")

    return compare


def pytest_configure() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    # Models of every age are built here; what they deprecate is not what is tested.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
