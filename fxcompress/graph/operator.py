"""The frozen view of a recorded graph that rules are matched against.

A recording is a true ``torch.fx.Graph`` (:mod:`fxcompress.graph.recorder`).  Rules never
see its raw targets: they see one :class:`Operator` per node, in execution order, with a
canonical operator name and attributes normalized by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fxcompress.operators.words import AttributeValue as AttributeValue


@dataclass(frozen=True)
class Operator:
    """One call of one operator in a recorded forward pass.

    Attributes:
        name: name of the fx node, unique in the graph (``"model_layers_0_mlp_up_proj"``).
        op: canonical operator name (``"linear"``, ``"conv2d"``, ``"embedding"``, otherwise the
            plain torch name: ``"relu"``, ``"add"``, ``"softmax"``); ``"input"``, ``"parameter"``
            and ``"output"`` for the graph's own nodes.
        path: module path of the leaf module that was called; for a torch function, the path
            of the module in whose ``forward`` it was called (empty for the root).
        scope: path of the innermost module whose ``forward`` made the call.
        attributes: normalized attributes with defaults filled in (``in_features``,
            ``out_features``, ``bias``, ``dtype`` as in ``"float32"``, ...).
        inputs: names of the producing nodes, in argument order.
        users: names of the nodes that read this one's value.
        shape: shape of the output tensor in the recorded run, None if it has no single one.
        weight: name of the weight parameter that the call reads
            (``"model.layers.0.mlp.up_proj.weight"``, the first of its names if it is tied),
            None for an operator without weight.
        module: True if ``path`` names a leaf module that can be replaced in the module tree.
    """

    name: str
    op: str
    path: str
    scope: str
    attributes: Mapping[str, AttributeValue]
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    shape: tuple[int, ...] | None
    weight: str | None = None
    module: bool = False
