"""Settings for all tests: one thread, no network, the same random numbers every time."""

from __future__ import annotations

import os
import warnings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def pytest_configure() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    # Models of every age are built here; what they deprecate is not what is tested.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
