"""What the recorder knows of models that would fool a recorder going by identity."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fxcompress.graph.recorder import Recording, record

WIDTH = 8


class Model(nn.Module):
    """Three linear layers and a dropout, put together by a function."""

    def __init__(self, function: Callable[[Model, Tensor], Any]) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def recorded(function: Callable[[Model, Tensor], Any]) -> Recording:
    """A recording that passes lint, of a model that gives the same output while recorded."""
    model = Model(function).eval()
    example = torch.randn(3, 4, WIDTH)
    outputs: list[Any] = []

    def forward(module: nn.Module, batch: Tensor) -> Any:
        outputs.append(module(batch))
        return outputs[-1]

    with torch.no_grad():
        wanted = model(example.clone())
    recording = record(model, [example.clone()], forward=forward)
    torch.testing.assert_close(outputs, [wanted], rtol=0, atol=0)
    recording.graph.lint()
    return recording


def share_input(recording: Recording) -> bool:
    """Whether q and k are known to be applied to the same value."""
    q, k = (recording.weights[f"{name}.weight"] for name in ("q", "k"))
    assert q.calls
    assert k.calls
    return q.source == k.source


def ops(recording: Recording) -> list[str]:
    """Operators in execution order, without inputs and outputs."""
    ends = ("input", "output", "parameter")
    return [operator.op for operator in recording.operators if operator.op not in ends]


def chained(recording: Recording, first: str, second: str) -> bool:
    """Whether ``second`` reads the output of ``first`` directly, and nobody else does."""
    by_path = {operator.path: operator for operator in recording.operators}
    return by_path[first].users == (by_path[second].name,)


# ---- one value or two -----------------------------------------------------------------


def plain(m: Model, x: Tensor) -> Tensor:
    return m.q(x) + m.k(x)


def keywords(m: Model, x: Tensor) -> Tensor:
    return m.q(input=x) + m.k(input=x)


def checkpointed(m: Model, x: Tensor) -> Any:
    return checkpoint(lambda y: m.q(y) + m.k(y), x, use_reentrant=False)


def vmapped(m: Model, x: Tensor) -> Tensor:
    return torch.vmap(lambda y: m.q(y) + m.k(y))(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def custom_function(m: Model, x: Tensor) -> Tensor:
    h = Doubled.apply(x)
    return m.q(h) + m.k(h)


def dropped_once(m: Model, x: Tensor) -> Tensor:
    h = m.dropout(x)
    return m.q(h) + m.k(h)


def written_before(m: Model, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 0] = 0
    return m.q(x) + m.k(x)


def inference(m: Model, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = x + 1
        return m.q(h) + m.k(h)


@pytest.mark.parametrize(
    "function",
    [
        plain, keywords, checkpointed, vmapped, custom_function, dropped_once, written_before,
        inference,
    ],
)  # fmt: skip
def test_one_value_is_one_input(function: Callable[..., Any]) -> None:
    assert share_input(recorded(function))


def in_place(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x.relu_()
    return h + m.k(x)


def in_place_operator(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x += 1
    return h + m.k(x)


def in_place_view(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x[:, 0].add_(1.0)
    return h + m.k(x)


def in_place_base(m: Model, x: Tensor) -> Tensor:
    view = x[:]
    h = m.q(view)
    x.add_(1.0)
    return h + m.k(view)


def set_item(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x[:, 0] = 0
    return h + m.k(x)


def through_data(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x.data.mul_(2)
    return h + m.k(x)


def data_exchanged(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    x.data = x.data * 2
    return h + m.k(x)


def out_argument(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    torch.add(x, 1, out=x)
    return h + m.k(x)


def in_leaf(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    nn.ReLU(inplace=True)(x)
    return h + m.k(x)


def in_inference(m: Model, x: Tensor) -> Tensor:
    with torch.inference_mode():
        y = x * 2
        h = m.q(y)
        y.add_(1.0)
        return h + m.k(y)


def in_no_grad_foreach(m: Model, x: Tensor) -> Tensor:
    h = m.q(x)
    torch._foreach_add_([x], 1.0)
    return h + m.k(x)


def dropped_before_one(m: Model, x: Tensor) -> Tensor:
    return m.q(m.dropout(x)) + m.k(x)


def dropped_twice(m: Model, x: Tensor) -> Tensor:
    return m.q(m.dropout(x)) + m.k(m.dropout(x))


@pytest.mark.parametrize(
    "function",
    [
        in_place, in_place_operator, in_place_view, in_place_base, set_item, through_data,
        data_exchanged, out_argument, in_leaf, in_inference, in_no_grad_foreach,
        dropped_before_one, dropped_twice,
    ],
)  # fmt: skip
def test_a_write_between_two_reads_makes_two_inputs(function: Callable[..., Any]) -> None:
    """Dropout does nothing in eval mode, and two noises in training: two inputs as well."""
    assert not share_input(recorded(function))


def test_rows_count_what_vmap_hides() -> None:
    recording = recorded(vmapped)
    assert recording.weights["q.weight"].rows == 12
    assert recording.samples["q.weight"].shape == (12, WIDTH)


def test_a_write_elsewhere_leaves_one_input() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        other = x.clone()
        h = m.q(x)
        other.add_(1.0)
        other.data.mul_(2.0)
        return h + m.k(x) + other

    assert share_input(recorded(function))


# ---- which nodes there are ------------------------------------------------------------


def test_dropout_and_casts_that_do_nothing_stay_visible() -> None:
    recording = recorded(lambda m, x: m.k(m.dropout(m.q(x)).to(torch.float32)))
    assert ops(recording) == ["linear", "dropout", "to", "linear"]
    assert not chained(recording, "q", "k")


def test_an_escaping_value_is_no_chain() -> None:
    assert chained(recorded(lambda m, x: m.k(m.q(x))), "q", "k")

    def returned(m: Model, x: Tensor) -> Any:
        h = m.q(x)
        return m.k(h), h

    def read_twice(m: Model, x: Tensor) -> Any:
        h = m.q(x)
        return m.k(h) + h

    assert not chained(recorded(returned), "q", "k")
    assert not chained(recorded(read_twice), "q", "k")


def test_the_input_itself_may_be_returned() -> None:
    recording = recorded(lambda m, x: (m.q(x), x))
    output = recording.operators[-1]
    assert output.op == "output"
    assert output.inputs == (*[o.name for o in recording.operators if o.path == "q"], "input_1")


def test_a_loop_is_several_calls_of_one_weight() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        for _ in range(3):
            x = m.q(x)
        return m.k(x)

    recording = recorded(function)
    assert len(recording.weights["q.weight"].calls) == 3
    assert recording.weights["q.weight"].rows == 3 * 12
    assert recording.weights["k.weight"].rows == 12


def test_layers_that_do_not_run_have_no_calls() -> None:
    assert recorded(plain).weights["o.weight"].calls == ()


def test_a_view_of_a_tensor_keeps_its_producer() -> None:
    """``x.mT`` and ``x.data`` are operators, though they are written as attributes."""
    recording = recorded(lambda m, x: m.k(m.q(x).mT.mT.data))
    assert [op for op in ops(recording) if op != "linear"] == ["transpose", "transpose", "data"]
    assert sum(operator.op == "input" for operator in recording.operators) == 1


def test_several_results_of_one_operator_are_several_values() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        a, b = torch.cat([x, x], -1).chunk(2, -1)
        return m.q(a) + m.k(b)

    recording = recorded(function)
    assert not share_input(recording)
    assert ops(recording) == ["cat", "chunk", "getitem", "getitem", "linear", "linear", "add"]


def test_calls_past_the_module_are_strangers() -> None:
    """A module whose weight is read while it does not run cannot be replaced unnoticed."""
    for read in (
        lambda m, x: x @ m.q.weight,
        lambda m, x: x @ m.q.weight.T,
        lambda m, x: x @ m.q.weight.t(),
        lambda m, x: x @ m.q.weight.data,
        lambda m, x: nn.functional.linear(x, m.q.weight),
    ):
        recording = recorded(lambda m, x, read=read: m.q(x) + m.k(x) + read(m, x))
        assert recording.weights["q.weight"].strangers == ("",)
        assert recording.weights["k.weight"].strangers == ()


def test_reading_facts_about_a_weight_is_no_read() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        rows = m.q.weight.shape[0] + m.q.weight.size(1) + m.q.weight.dim()
        return m.q(x.to(m.q.weight.dtype).to(m.q.weight.device)) + rows + len(m.q.weight)

    assert recorded(function).weights["q.weight"].strangers == ()


def test_forward_called_directly_is_a_function_call() -> None:
    """Past ``__call__`` there is no leaf module, and what runs is ``F.linear``."""
    recording = recorded(lambda m, x: m.q.forward(x) + m.k(x))
    by_weight = {o.weight: o for o in recording.operators if o.op == "linear"}
    assert not by_weight["q.weight"].module
    assert by_weight["k.weight"].module


# ---- several examples -----------------------------------------------------------------


def sometimes(m: Model, x: Tensor) -> Tensor:
    """q and k share their input only if the batch is large; o is read only if it is small."""
    if len(x) > 2:
        return m.q(x) + m.k(x) + m.o(x)
    return m.q(x) + m.k(x + 1) + m.o(x) + m.o.weight.sum()


def test_only_what_is_true_of_all_examples_is_kept() -> None:
    large, small = torch.randn(3, WIDTH), torch.randn(2, WIDTH)
    model = Model(sometimes)
    assert share_input(record(model, [large]))
    assert share_input(record(model, [large, large]))
    both = record(model, [large, small])
    assert not share_input(both)
    assert both.weights["q.weight"].source == both.weights["o.weight"].source
    assert record(model, [large]).weights["o.weight"].strangers == ()
    assert both.weights["o.weight"].strangers == ("",)
