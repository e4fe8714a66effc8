"""ISVT as a callback of ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fxcompress.errors import TrainingError

if TYPE_CHECKING:
    from fxcompress.isvt.training import ISVT

FILE = "isvt.pt"
"""The state in a checkpoint's directory."""


def callback(isvt: ISVT[Any]) -> Any:
    """A callback that steps an :class:`ISVT`, and saves and restores it with checkpoints.

    Raises:
        TrainingError: while training, if a checkpoint that is resumed from has no state.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        """Thresholds after every optimizer step (gradient accumulation counts as one)."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 0 or state.global_step == isvt.count:
                return
            given = args.resume_from_checkpoint
            folder = _checkpoint(args.output_dir, state.global_step)
            if isinstance(given, str) and (Path(given) / FILE).exists():
                folder = Path(given)
            if not (folder / FILE).exists():
                raise TrainingError(
                    f"training is resumed at step {state.global_step}, and {folder} has no {FILE}: "
                    "it was saved without this callback. Load a state (isvt.load_state_dict) "
                    "before, or start from the beginning"
                )
            device = next(isvt.model.parameters()).device
            saved = torch.load(folder / FILE, map_location=device, weights_only=True)
            isvt.load_state_dict(saved)

        def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            isvt.step()

        def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.is_world_process_zero:
                folder = _checkpoint(args.output_dir, state.global_step)
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(isvt.state_dict(), folder / FILE)

    return Callback()


def _checkpoint(directory: str, step: int) -> Path:
    return Path(directory) / f"checkpoint-{step}"
