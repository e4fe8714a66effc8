"""The order of the channels that a body reads or returns, where it is not that of its neighbours.

before::

    y = f(x)                                              # x of n channels

after, in k blocks of n / k channels that lie side by side::

    y = f(flatten(index_select(unflatten(x, -1, (k, -1)), -2, order), -2))

The larger the blocks, the less it costs: a block moves as a piece of memory.  Channels of images
are such pieces by themselves; a convolution puts those of its output in order.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

ORDER = "order"
"""Name of the buffer: places of the blocks (k), int32."""


def order_input(body: fx.GraphModule, n: int, blocks: int, device: torch.device) -> None:
    """Make a body read its input (..., n) in an order of blocks, which is not filled in yet."""
    graph = _with_order(body, blocks, device)
    x = next(node for node in graph.nodes if node.op == "placeholder")
    readers = [*x.users]
    with graph.inserting_after(x):
        order = graph.create_node("get_attr", ORDER)
    with graph.inserting_after(order):
        if blocks == n:
            ordered = graph.call_function(torch.index_select, (x, -1, order))
        else:
            split = graph.call_function(torch.unflatten, (x, -1, (blocks, n // blocks)))
            graph.inserting_after(split)
            moved = graph.call_function(torch.index_select, (split, -2, order))
            graph.inserting_after(moved)
            ordered = graph.call_function(torch.flatten, (moved, -2))
    for reader in readers:
        reader.replace_input_with(x, ordered)
    graph.lint()
    body.recompile()


def order_output(body: fx.GraphModule, m: int, dim: int, device: torch.device) -> None:
    """Make a body return its output in an order of single channels, which is not filled in yet.

    Args:
        body: without an order.
        m: its channels.
        dim: of the output that counts them.
        device: of the body.
    """
    graph = _with_order(body, m, device)
    (output,) = (node for node in graph.nodes if node.op == "output")
    (value,) = output.all_input_nodes
    with graph.inserting_before(output):
        order = graph.create_node("get_attr", ORDER)
        moved = graph.call_function(torch.index_select, (value, dim, order))
    output.replace_input_with(value, moved)
    graph.lint()
    body.recompile()


def _with_order(body: fx.GraphModule, blocks: int, device: torch.device) -> fx.Graph:
    body.register_buffer(ORDER, torch.arange(blocks, dtype=torch.int32, device=device))
    return body.graph


def ordering(body: fx.GraphModule) -> frozenset[fx.Node]:
    """The nodes of a body that put channels in order; none if they stay as they are."""
    orders = (node for node in body.graph.nodes if node.op == "get_attr" and node.target == ORDER)
    found = set()
    for order in orders:
        (moved,) = order.users
        around = (moved.args[0], *moved.users)
        found |= {order, moved}
        found |= {node for node in around if node.target in (torch.unflatten, torch.flatten)}
    return frozenset(found)


def blocks_of(body: fx.GraphModule) -> int:
    """In how many blocks a body puts channels in order; 0 if they stay as they are."""
    return len(body.get_buffer(ORDER)) if hasattr(body, ORDER) else 0


def order_of(body: fx.GraphModule, n: int) -> Tensor | None:
    """The channels in the order in which a body reads them (n), int64; None as they are."""
    return spread(body.get_buffer(ORDER), n) if hasattr(body, ORDER) else None


def spread(order: Tensor, n: int) -> Tensor:
    """The channels (n), int64, of blocks in some order.

    >>> spread(torch.tensor([2, 0, 1]), 6)
    tensor([4, 5, 0, 1, 2, 3])
    """
    size = n // len(order)
    within = torch.arange(size, device=order.device)
    return (order.to(torch.int64)[:, None] * size + within).flatten()
