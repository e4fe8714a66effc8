"""Save: ``model.fxcompress.safetensors`` and ``plan.json``; nothing is pickled.

The weights do not lie under the name ``model.safetensors`` on purpose: Hugging Face's
``from_pretrained`` would take that file for the dense model, and fill what it cannot find with
random numbers.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from fxcompress.loading import PLAN, WEIGHTS
from fxcompress.plan import FORMAT, plan_of


def save(model: nn.Module, directory: str | PathLike[str]) -> Path:
    """Write a compressed model: weights, plan and, for a Hugging Face model, its config.

    Args:
        model: came from :func:`fxcompress.compile` or :func:`fxcompress.load`.
        directory: made if it is missing.

    Returns:
        The directory.

    Raises:
        RewriteError: the model carries no plan.
    """
    plan = plan_of(model)
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path / WEIGHTS), metadata={"format": "pt", "fxcompress": str(FORMAT)})
    (path / PLAN).write_text(plan.model_dump_json(indent=1), encoding="utf-8")
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(path)
    return path
