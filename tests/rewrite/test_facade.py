"""The module in the place of a linear layer answers as the linear layer did."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fxcompress.rewrite import Factorized
from tests.full_rank import factorized, rewrite

N, M = 10, 6
# Float64 through a metric with condition numbers of 100 on both sides.
ATOL = 1e-11


def facade(layer: nn.Module, form: str, rank: int | None = None) -> tuple[nn.Module, Factorized]:
    """A layer with a random bias, and what replaces it in a model."""
    if getattr(layer, "bias", None) is not None:
        nn.init.normal_(layer.bias)
    x = torch.randn(4, N, dtype=torch.float64)
    pair = rewrite(nn.Sequential(layer).double(), x, form, rank)
    (found,) = factorized(pair.model).values()
    return pair.original[0], found


FORMS = pytest.mark.parametrize("form", ["low_rank", "pivoted"])
LAYERS = pytest.mark.parametrize(
    "layer", [nn.Linear(N, M), nn.Linear(N, M, bias=False), Conv1D(M, N)], ids=str
)


@FORMS
@LAYERS
def test_weight_and_bias_are_the_dense_ones(form: str, layer: nn.Module) -> None:
    dense, new = facade(copy.deepcopy(layer), form)
    torch.testing.assert_close(new.weight, dense.weight.data, rtol=0, atol=ATOL)
    if dense.bias is None:
        assert new.bias is None
    else:
        torch.testing.assert_close(new.bias, dense.bias.data, rtol=0, atol=ATOL)


@FORMS
@LAYERS
def test_weight_describes_what_runs_below_full_rank(form: str, layer: nn.Module) -> None:
    dense, new = facade(copy.deepcopy(layer), form, rank=3)
    x = torch.randn(5, N, dtype=torch.float64)
    weight = new.weight.T if isinstance(dense, Conv1D) else new.weight
    assert torch.linalg.matrix_rank(weight) == 3
    wanted = torch.nn.functional.linear(x, weight, new.bias)
    torch.testing.assert_close(new(x), wanted, rtol=0, atol=ATOL)


@FORMS
def test_weight_is_differentiable(form: str) -> None:
    _, new = facade(nn.Linear(N, M), form, rank=3)
    (new.weight.square().sum() + new.bias.square().sum()).backward()
    for parameter in new.body.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.abs().sum() > 0)


def test_attributes_are_mirrored() -> None:
    layer = nn.Linear(N, M)
    layer.note = "mine"
    _, new = facade(layer, "low_rank")
    assert (new.in_features, new.out_features, new.note) == (N, M, "mine")
    _, new = facade(Conv1D(M, N), "low_rank")
    assert (new.nx, new.nf, tuple(new.weight.shape)) == (N, M, (N, M))


@FORMS
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_assignment_is_a_clear_error(form: str, name: str) -> None:
    _, new = facade(nn.Linear(N, M), form)
    with pytest.raises(AttributeError, match=f"{name} of a factorized layer is computed"):
        setattr(new, name, nn.Parameter(torch.zeros(M, N)))
    assert set(new._parameters) == set()


def test_the_argument_may_be_named() -> None:
    x = torch.randn(4, N, dtype=torch.float64)
    _, new = facade(nn.Linear(N, M), "low_rank")
    assert torch.equal(new(input=x), new(x))
    _, new = facade(Conv1D(M, N), "pivoted")
    assert torch.equal(new(x=x), new(x))


def test_repr_shows_form_and_rank() -> None:
    _, new = facade(nn.Linear(N, M), "pivoted", rank=3)
    assert "Linear as pivoted of rank 3" in repr(new)


@FORMS
def test_it_can_be_copied_pickled_moved_and_trained(form: str) -> None:
    _, new = facade(nn.Linear(N, M), form, rank=3)
    x = torch.randn(4, N, dtype=torch.float64)
    for other in (copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        assert torch.equal(other(x), new(x))
        assert not {p.data_ptr() for p in other.parameters()} & {
            p.data_ptr() for p in new.parameters()
        }
    assert new.float()(x.float()).dtype == torch.float32
    assert new.weight.dtype == torch.float32
    before = new(x.float()).detach()
    new(x.float()).square().sum().backward()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter -= 1e-3 * parameter.grad
    assert bool(new(x.float()).square().sum() < before.square().sum())


def test_frozen_stays_frozen_and_modes_are_kept() -> None:
    layer = nn.Linear(N, M).requires_grad_(False).eval()
    _, new = facade(layer, "low_rank")
    assert not any(p.requires_grad for p in new.parameters())
    assert not new.training
    assert not new.body.training
    _, new = facade(nn.Linear(N, M).train(), "low_rank")
    assert new.training
    assert new.body.training


def test_saved_state_can_be_loaded_back() -> None:
    _, new = facade(nn.Linear(N, M), "pivoted", rank=3)
    other = copy.deepcopy(new)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x: Tensor = torch.randn(4, N, dtype=torch.float64)
    assert not torch.equal(other(x), new(x))
    other.load_state_dict(new.state_dict())
    assert torch.equal(other(x), new(x))
