"""``pivoted``: r rows of the low-rank weight kept as they are, the others combined from them.

before::

    y = linear(x; W, b)

after::

    h = pivot(x)                              # r x n: the pivot rows of W_r
    rest = combine(h)                         # (m - r) x r: the other rows, as combinations
    y = index_select(cat([h, rest]), order)   # back into the order of W's rows

It computes exactly what W_r computes, with r(m + n - r) parameters instead of r(m + n): the
r x r identity block of a product in echelon form is not stored, so that it saves at
*every* rank below full (arXiv 2501.19090).  The pivot rows are chosen so that the
combination matrix C stays small: LU with partial pivoting on an orthonormal basis of the
column space, then row exchanges until no entry exceeds :data:`LARGEST_ENTRY` (maxvol,
Goreinov et al. 2010), since rounding errors of ``h`` are amplified by ‖C‖.

Measured: the final permutation is not free on narrow batches in bfloat16; it moves
activations, not weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn

from fxcompress.forms.form import (
    Counts,
    Form,
    FormError,
    assign,
    bare_linear,
    linear,
)
from fxcompress.forms.target import Ranks
from fxcompress.operators.linear import LinearShape

LARGEST_ENTRY = 4.0
"""Largest entry of the combination matrix that is left in place."""

EXCHANGES = 1000
"""Row exchanges after which pivoting gives up."""


class _Pivoted(Form):
    name = "pivoted"
    remarks = MappingProxyType({"index_select": "rows back in order"})
    trains_as = "low_rank"  # pivot rows and combinations differ in scale; balanced factors do not

    def parameters(self, shape: LinearShape, ranks: Ranks) -> Counts:
        return ranks * (shape.out_features + shape.in_features - ranks)

    def bytes(self, shape: LinearShape, ranks: Ranks) -> Counts:
        order = shape.out_features * torch.int32.itemsize
        return self.parameters(shape, ranks) * shape.dtype.itemsize + order

    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        root = nn.Module()
        root.pivot = bare_linear(shape.in_features, rank, shape.bias, shape)
        root.combine = bare_linear(rank, shape.out_features - rank, shape.bias, shape)
        order = torch.arange(shape.out_features, dtype=torch.int32, device=shape.device)
        root.register_buffer("order", order)
        graph = fx.Graph()
        x = graph.placeholder("input")
        pivot = graph.call_module("pivot", (x,))
        rest = graph.call_module("combine", (pivot,))
        both = graph.call_function(torch.cat, ((pivot, rest), -1))
        order_node = graph.create_node("get_attr", "order")
        graph.output(graph.call_function(torch.index_select, (both, -1, order_node)))
        return fx.GraphModule(root, graph, class_name="Pivoted")

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        left, right = (factor.to(torch.float64) for factor in factors)
        basis, triangle = torch.linalg.qr(left)
        pivots, combination = choose_pivots(basis)
        others = complement(pivots, len(left))
        kept = basis[pivots] @ (triangle @ right)
        pivot, combine = linear(body, "pivot"), linear(body, "combine")
        assign(pivot.weight, kept)
        assign(combine.weight, combination)
        order = torch.empty(len(left), dtype=torch.int32, device=left.device)
        order[torch.cat([pivots, others])] = torch.arange(
            len(left), dtype=torch.int32, device=left.device
        )
        body.get_buffer("order").copy_(order)
        if bias is not None:
            bias = bias.to(torch.float64)
            assign(pivot.bias, bias[pivots])
            # combine() sees pivot rows with their bias: take its image out again.
            assign(combine.bias, bias[others] - combination @ bias[pivots])

    def weight(self, body: fx.GraphModule, shape: LinearShape) -> Tensor:
        kept = linear(body, "pivot").weight
        rows = torch.cat([kept, linear(body, "combine").weight @ kept])
        return rows.index_select(0, body.get_buffer("order"))

    def bias(self, body: fx.GraphModule, shape: LinearShape) -> Tensor | None:
        pivot, combine = linear(body, "pivot"), linear(body, "combine")
        if pivot.bias is None:
            return None
        rest = combine.bias + combine.weight @ pivot.bias
        return torch.cat([pivot.bias, rest]).index_select(0, body.get_buffer("order"))


def choose_pivots(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of an orthonormal basis Q (m x r) that span the others with small coefficients.

    Returns:
        The pivot rows p (r) and C (m - r x r) with ``Q[others] = C Q[p]``, others in
        increasing order, and no entry of C larger than :data:`LARGEST_ENTRY` in magnitude.

    Raises:
        FormError: no such rows were found within :data:`EXCHANGES` exchanges.
    """
    m, r = basis.shape
    _, swaps = torch.linalg.lu_factor(basis)
    rows = torch.arange(m, device=basis.device)
    for i, j in enumerate(swaps[:r].tolist()):
        rows[[i, j - 1]] = rows[[j - 1, i]]
    if m == r:
        return torch.arange(m, device=basis.device), basis.new_zeros(0, r)
    pivots, others = rows[:r].clone(), rows[r:].clone()
    c = _solve(basis, pivots, others)
    for _ in range(EXCHANGES):
        flat = int(c.abs().argmax())
        i, j = divmod(flat, r)
        pivot = float(c[i, j])
        if abs(pivot) <= LARGEST_ENTRY:
            break
        # Exchange row others[i] for pivots[j]; the determinant of the pivot block grows by
        # |pivot|, so this ends.  Rank-one update of C.
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
        row, column = c[i].clone(), c[:, j].clone()
        row[j] -= 1
        column[i] += 1
        c -= column[:, None] * (row / pivot)
    else:
        raise FormError(f"pivoting did not settle within {EXCHANGES} row exchanges")
    others = others.sort().values
    c = _solve(basis, pivots, others)  # afresh: updates accumulate rounding
    residual = float((c @ basis[pivots] - basis[others]).abs().max())
    largest = float(c.abs().max())
    if not residual < 1e-9 or not largest < 2 * LARGEST_ENTRY:
        raise FormError(f"pivoting is ill-conditioned (residual {residual:.1e}, max |C| {largest})")
    return pivots, c


def _solve(basis: Tensor, pivots: Tensor, others: Tensor) -> Tensor:
    """C with ``C Q[p] = Q[others]``."""
    c: Tensor = torch.linalg.solve(basis[pivots].T, basis[others].T).T
    return c.contiguous()


def complement(pivots: Tensor, m: int) -> Tensor:
    """The rows among m that are no pivots, in increasing order."""
    mask = torch.ones(m, dtype=torch.bool, device=pivots.device)
    mask[pivots] = False
    return mask.nonzero().squeeze(1)


PIVOTED = _Pivoted()
