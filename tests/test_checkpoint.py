"""One-shot runs that are interrupted go on after the last block that was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress import CheckpointError
from fxcompress.checkpoint import Checkpoint
from fxcompress.metric import capture
from tests.test_memory import CASES, images, rules, tight

__all__ = ["tight"]

CUT = ["narrowed", "ekfac", "activation", "convolutions"]


class Interrupted(BaseException):
    """As Ctrl-C is."""


def interrupted(after: int, patch: pytest.MonkeyPatch) -> None:
    """End a run behind some files of its checkpoint."""
    write, written = Checkpoint.write, []

    def counted(self: Checkpoint, name: str, content: Mapping[str, Any]) -> None:
        write(self, name, content)
        written.append(name)
        if len(written) == after:
            raise Interrupted

    patch.setattr(Checkpoint, "write", counted)


def compiled(case: str, checkpoint: Path | None, memory: int | None = None) -> Any:
    make, data, metric, rewrite = CASES[case]
    memory = memory or (600_000 if data is images else 80_000)
    return fxcompress.compile(
        make(), rules(metric, rewrite), data(), memory=memory, checkpoint=checkpoint
    )


@pytest.mark.parametrize("case", CUT)
@pytest.mark.parametrize("after", [1, 3, 5])
@pytest.mark.filterwarnings("ignore::fxcompress.FxcompressWarning")
def test_goes_on_to_the_same_numbers(case: str, after: int, tight: None, tmp_path: Path) -> None:
    expected = compiled(case, None)
    with pytest.MonkeyPatch.context() as patch:
        interrupted(after, patch)
        with pytest.raises(Interrupted):
            compiled(case, tmp_path)
    assert len([*tmp_path.iterdir()]) == after
    measured: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        measure = capture._measured
        patch.setattr(
            capture, "_measured", lambda *args: (measured.append(args), measure(*args))[1]
        )
        found = compiled(case, tmp_path)
    assert len(measured) == len([*tmp_path.iterdir()]) - after
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, value in found.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name])
    (one, other) = (
        fxcompress.plan_of(each).model_copy(update={"seconds": {}, "speed": None})
        for each in (found, expected)
    )
    assert one == other


def test_of_another_run(tight: None, tmp_path: Path) -> None:
    compiled("activation", tmp_path)
    with pytest.raises(CheckpointError, match=r"its .*model, calibration data.* differ"):
        compiled("convolutions", tmp_path)
    with pytest.raises(CheckpointError, match="its limit on memory differ"):
        compiled("activation", tmp_path, 60_000)
    (tmp_path / "calibrate-0.pt").write_bytes(b"other")
    with pytest.raises(CheckpointError, match=r"calibrate-0\.pt cannot be read"):
        compiled("activation", tmp_path)
