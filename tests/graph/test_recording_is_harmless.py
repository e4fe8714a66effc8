"""Recording leaves everything as it was, and costs little more than a forward pass."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.errors import RecordError
from fxcompress.graph.recorder import record
from tests.zoo import ZOO


def facts(model: nn.Module) -> dict[str, Any]:
    """All that recording could leave behind on a model."""
    return {
        name: (
            type(module),
            module.training,
            {key: id(value) for key, value in vars(module).items() if key != "training"},
            [(id(p), p._version, vars(p)) for p in module.parameters(recurse=False)],
            [len(hooks) for key, hooks in vars(module).items() if key.endswith("_hooks")],
        )
        for name, module in model.named_modules()
    }  # fmt: skip


def settings() -> Any:
    return (
        nn.Module.__call__,
        torch.is_grad_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.overrides._get_current_function_mode_stack(),
        torch.nn.modules.module._global_forward_hooks,
        torch.nn.modules.module._global_forward_pre_hooks,
    )


@pytest.mark.parametrize("name", ["llama", "bert", "resnet", "transformer_encoder", "lstm"])
def test_model_and_settings_are_as_before(name: str) -> None:
    case = ZOO[name]
    model = case.build().train()
    # A frozen part in eval mode, as in fine-tuning, must not wake up.
    frozen = next(iter(model.children()))
    frozen.eval()
    before, state = facts(model), {k: v.clone() for k, v in model.state_dict().items()}
    around, examples = settings(), [case.batch(), case.other_batch()]
    random = torch.get_rng_state()
    record(model, examples)
    assert torch.equal(torch.get_rng_state(), random)
    assert facts(model) == before
    assert model.training
    assert not frozen.training
    assert settings() == around
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError(f"after {self.linear(x).shape}")


def test_everything_is_restored_after_a_failure() -> None:
    model = Failing()
    before, around = facts(model), settings()
    with pytest.raises(RecordError, match="ArithmeticError: after"):
        record(model, [torch.randn(2, 4)])
    assert facts(model) == before
    assert settings() == around
    assert model.linear(torch.randn(2, 4)).requires_grad


def test_a_wrong_batch_says_what_a_batch_is() -> None:
    with pytest.raises(RecordError, match="mapping"):
        record(nn.Sequential(nn.Linear(4, 4)), [torch.randn(2, 5)])
    with pytest.raises(RecordError, match="at least one"):
        record(nn.Sequential(nn.Linear(4, 4)), [])


class Counting(nn.Module):
    """Wide enough that matrix products, not the interpreter, take the time."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def test_recording_is_one_forward_pass_an_example() -> None:
    model = Counting()
    record(model, [torch.randn(2, 1024)] * 3)
    assert model.calls == 3


def test_recording_costs_at_most_three_forward_passes() -> None:
    model, x = Counting().eval(), torch.randn(512, 1024)

    def fastest(run: Any) -> float:
        times = []
        for _ in range(5):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        return min(times)

    with torch.no_grad():
        forward = fastest(lambda: model(x))
    assert fastest(lambda: record(model, [x])) <= 3 * forward
