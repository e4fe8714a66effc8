"""``pivoted``: r columns of the low-rank weight kept as they are, the others combined from them.

before::

    y = linear(x; W, b)

after::

    pivots, rest = x[..., :r], x[..., r:]     # views; x is put in order first where it has to be
    y = pivot(combine(rest) + pivots)         # combine: r x (n - r),  pivot: m x r and the bias

The weight of rank r is ``W_r = P [I T]``: P are r of its columns (the pivots), and T combines the
others from them.  So ``W_r x = P (x_p + T x_rest)``, with r(m + n - r) parameters instead of
r(m + n): the r x r identity block is not stored, so that it saves at *every* rank below full
(arXiv 2501.19090, which has it for rows).  On the side of the input nothing is put together
afterwards: the slices are views, and the sum is made in place.

*Which columns.*  Rounding errors are amplified by P and T.  Any order of the input costs a copy
of it, so it is left as it is where its first r channels are good enough; else whole blocks of
neighbouring channels are moved, the larger the cheaper; at last single ones, found by LU with
partial pivoting on an orthonormal basis of the row space, then exchanges until no entry of T
exceeds :data:`LARGEST_ENTRY` (maxvol, Goreinov et al. 2010).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from fxcompress.forms.ordered import order_input, order_of, spread
from fxcompress.forms.target import Ranks
from fxcompress.operators.linear import LinearShape

LARGEST_ENTRY = 4.0
"""Largest entry of the combination matrix that is left in place."""

EXCHANGES = 1000
"""Row exchanges after which pivoting gives up."""

BLOCKS = (32, 16, 8, 4)
"""Channels of a block that is moved as a whole, the cheapest first."""

LARGE = 1 << 21
"""Entries of a basis from which on blocks are not looked for: that takes seconds to minutes, and
beside products of this size a copy channel by channel takes 3 % of the time at most."""

BLOCK_EXCHANGES = 8
"""Exchanges of blocks, at most; what is left to gain after a few is little."""

AMPLIFIED = {torch.float64: 12.0, torch.float32: 12.0}
"""How many times the rounding error of a dense layer is let pass for a cheaper order.  Not more:
what amplifies errors is ill-conditioned for whoever trains it, too."""

AMPLIFIED_NARROW = 6.0
"""The same in narrower types; single columns have 3 to 5."""

LARGEST_OF_BLOCKS = 4 * LARGEST_ENTRY
"""Largest entry of the combination matrix that is let pass for a cheaper order."""


class _Pivoted(Form):
    name = "pivoted"
    remarks = MappingProxyType({"add_": "the pivots, as they are"})
    trains_as = "low_rank"  # pivots and combinations differ in scale; balanced factors do not

    def parameters(self, shape: LinearShape, ranks: Ranks) -> Counts:
        return ranks * (shape.out_features + shape.in_features - ranks)

    def places(self, shape: LinearShape) -> int:
        return shape.in_features

    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        n = shape.in_features
        root, graph = nn.Module(), fx.Graph()
        root.combine = bare_linear(n - rank, rank, False, shape)
        root.pivot = bare_linear(rank, shape.out_features, shape.bias, shape)
        x = graph.placeholder("input")
        rest = graph.call_function(torch.narrow, (x, -1, rank, n - rank))
        combined = graph.call_module("combine", (rest,))
        pivots = graph.call_function(torch.narrow, (x, -1, 0, rank))
        both = graph.call_method("add_", (combined, pivots))
        graph.output(graph.call_module("pivot", (both,)))
        return fx.GraphModule(root, graph, class_name="Pivoted")

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        left, right = (factor.to(torch.float64) for factor in factors)
        weight = left @ right
        basis, _ = torch.linalg.qr(right.T)
        pivot, combine = linear(body, "pivot"), linear(body, "combine")
        blocks, combination = choose_order(weight, basis, pivot.weight.dtype)
        n, r = basis.shape
        order = torch.arange(n, device=basis.device)
        if blocks is not None:
            order_input(body, n, len(blocks), basis.device)
            body.get_buffer("order").copy_(blocks)
            order = spread(blocks, n)
        assign(pivot.weight, weight[:, order[:r]])
        assign(combine.weight, combination)
        if bias is not None:
            assign(pivot.bias, bias)

    def weight(self, body: fx.GraphModule, shape: LinearShape) -> Tensor:
        kept = linear(body, "pivot").weight
        columns = torch.cat([kept, kept @ linear(body, "combine").weight], 1)
        order = order_of(body, shape.in_features)
        return columns if order is None else columns.index_select(1, order.argsort())

    def bias(self, body: fx.GraphModule, shape: LinearShape) -> Tensor | None:
        return linear(body, "pivot").bias

    def input_order(self, right: Tensor) -> Tensor:
        """The order of the n channels of the input that suits a weight best.

        A body that is filled with factors whose columns are in this order reads its input as it
        is, so whoever makes the input in this order pays nothing for it.

        Args:
            right: the right factor of the weight (r x n).

        Returns:
            The channels (n), int64: the r pivots, then the others in increasing order.

        Raises:
            FormError: no pivots were found.
        """
        basis, _ = torch.linalg.qr(right.to(torch.float64).T)
        pivots, _ = choose_pivots(basis)
        return torch.cat([pivots, complement(pivots, len(basis))])


def choose_order(weight: Tensor, basis: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """The cheapest order of columns whose first r combine the others well enough in some type.

    Args:
        weight: W_r (m x n), float64.
        basis: orthonormal, of its row space (n x r), float64.
        dtype: of the body.

    Returns:
        The blocks of columns in their order, or None if they stay where they are; and T
        (r x n - r).

    Raises:
        FormError: not even single columns do.
    """
    n = len(basis)
    for blocks in _block_orders(basis):
        order = torch.arange(n, device=basis.device) if blocks is None else spread(blocks, n)
        combination = good_enough(weight[:, order], basis[order], dtype)
        if combination is not None:
            return blocks, combination
    pivots, transposed = choose_pivots(basis)
    return torch.cat([pivots, complement(pivots, n)]), transposed.T


def good_enough(weight: Tensor, basis: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The combinations of the first r columns that the others are, if rounding errors stay small.

    Args:
        weight: W_r (m x n), float64.
        basis: orthonormal, of its row space (n x r), float64.
        dtype: of the body.

    Returns:
        T (r x n - r), or None if it does not exist or amplifies rounding errors too much.
    """
    n, r = basis.shape
    if n == r:
        return basis.new_zeros(r, 0)
    combination: Tensor
    combination, info = torch.linalg.solve_ex(basis[:r].T, basis[r:].T)
    largest = float(combination.abs().max())
    if int(info) or not largest <= LARGEST_OF_BLOCKS:
        return None
    limit = AMPLIFIED.get(dtype, AMPLIFIED_NARROW)
    if largest > LARGEST_ENTRY and amplification(weight[:, :r], combination) > limit:
        return None
    return combination


def amplification(pivots: Tensor, combination: Tensor) -> float:
    """How many times the rounding error of a dense layer that of P (x_p + T x_rest) is, about.

    For inputs of equal size and rounding errors independent of one another, those of P and of
    the sum in the middle are ``Σ_i ‖p_i‖² (1 + ‖t_i‖²)``, those of a dense layer ``‖P [I T]‖²``.

    Args:
        pivots: P (m x r).
        combination: T (r x n - r).

    Returns:
        The root of that ratio; infinite if it is not a number.
    """
    middle = (pivots.square().sum(0) * (1 + combination.square().sum(1))).sum()
    whole = pivots.square().sum() + (pivots @ combination).square().sum()
    found = float((middle / whole).sqrt()) if float(middle) else 1.0
    return found if found < float("inf") else float("inf")


def _block_orders(basis: Tensor) -> Iterator[Tensor | None]:
    """Orders of blocks of the rows of a basis (n x r), the cheapest first; None is no order."""
    n, r = basis.shape
    yield None
    for size in BLOCKS if n * r < LARGE else ():
        if n % size == r % size == 0 and r < n:
            yield choose_blocks(basis, size)


def choose_blocks(basis: Tensor, size: int) -> Tensor:
    """An order of blocks of rows of Q (n x r), the first of which have a large volume.

    One after the other, that with the largest volume orthogonal to those before: QR with column
    pivoting, of blocks.  Then exchanges that make the volume of all larger, as maxvol does with
    single rows: by |det C_ij| if block i of the others, which are C times the pivots, takes the
    place of pivot j.

    Args:
        basis: Q, with orthonormal columns.
        size: of a block; divides n and r.

    Returns:
        All n / size blocks, int64; the r / size that are pivots come first.
    """
    n, r = basis.shape
    blocks = basis.reshape(n // size, size, r)
    rest = blocks.clone()
    free = torch.ones(n // size, dtype=torch.bool, device=basis.device)
    chosen = []
    for _ in range(r // size):
        volumes = torch.linalg.slogdet(rest @ rest.mT).logabsdet
        best = int(torch.where(free, volumes, -torch.inf).argmax())
        if not bool(free[best]):  # all volumes are zero
            best = int(free.to(torch.int8).argmax())
        chosen.append(best)
        free[best] = False
        own, _ = torch.linalg.qr(rest[best].T)
        rest -= (rest @ own) @ own.T
    pivots = torch.tensor(chosen, device=basis.device)
    others = free.nonzero().squeeze(1)
    for _ in range(BLOCK_EXCHANGES if len(others) else 0):
        columns = [blocks[at].reshape(-1, r).T for at in (pivots, others)]
        combined, _ = torch.linalg.solve_ex(*columns)
        tiles = combined.reshape(len(pivots), size, len(others), size).transpose(1, 2)
        gains = torch.linalg.det(tiles).abs().nan_to_num(0.0, 0.0)
        j, i = divmod(int(gains.argmax()), len(others))
        if float(gains[j, i]) <= 1.01:
            break
        pivots[j], others[i] = others[i].clone(), pivots[j].clone()
    return torch.cat([pivots, others.sort().values])


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
