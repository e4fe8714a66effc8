"""Record the operator graph of a model by running it.

Symbolic tracing fails on most real models and ``torch.export`` loses their class; running
the model on an example always works.  :func:`record` does that under a
``TorchFunctionMode``, with a wrapper around the calls of the model's own modules: every leaf
module becomes a ``call_module`` node, every torch function a ``call_function`` node.  The result
is a true ``torch.fx.Graph``, used for matching and analysis; it is not executed.

Other threads and other models notice nothing: a mode belongs to its thread, and a wrapper to one
module (:func:`fxcompress.graph.calling.called_through`).

What makes two values "the same input" is the same producing node *and* the same tensor
version: a tensor that was written in place between two reads is two values.
"""

from __future__ import annotations

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.errors import RecordError
from fxcompress.graph.calling import called_through
from fxcompress.graph.canonical import canonicalize, is_leaf
from fxcompress.graph.eager import eager
from fxcompress.graph.flops import FlopCounter
from fxcompress.graph.inputs import Forward, device_of, run_model, to_device
from fxcompress.graph.names import function_operator
from fxcompress.graph.operator import Operator
from fxcompress.graph.ownership import Ownership
from fxcompress.graph.physical import physical
from fxcompress.graph.randomness import Watched, expect_draws
from fxcompress.graph.union import union
from fxcompress.graph.values import is_tensor, shape_of, tensors_in
from fxcompress.graph.versions import Version, Versions, counter
from fxcompress.operators.applied import any_applied, displayed, run
from fxcompress.operators.calls import Application, function_name
from fxcompress.operators.shape import Shape
from fxcompress.operators.words import OPERATORS

# Reading these tells the reader about a tensor without reading its values.  So does an
# attribute (``__get__``) that is no tensor itself: ``x.shape``, but not ``x.T``.
_METADATA = {
    *("size", "dim", "numel", "stride", "is_floating_point", "is_complex", "element_size"),
    *("data_ptr", "__len__", "is_contiguous", "get_device", "storage_offset"),
    *("requires_grad_", "_version", "is_inference", "__hash__", "__repr__", "__format__"),
}
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, slice, type(...))


@dataclass(frozen=True)
class Weight:
    """What the recording knows of one parameter (by storage, not by name).

    Attributes:
        name: its first name in ``model.named_parameters()`` order.
        aliases: all of its names; more than one if it is tied.
        shape: as stored.
        dtype: e.g. ``"float32"``.
        device: e.g. ``"cpu"``.
        bytes: size in bytes.
        calls: names of the operators that read it as their weight, in execution order.
        rows: positions it was applied to, summed over the calls of the recorded example.
        inputs: sizes of the values it was applied to, one per call: for a convolution without
            their channels, (items, then extents); empty for anything that applies rows.
        strangers: scopes that read its values while no owner of it was running.
        source: key of the value it was applied to; equal for weights with the same input.
        readers: (function, scope) of the calls that computed with its values, one of each.
        applied: for every call of a function that applied it, the shape of that operator, or the
            reason why it cannot be one.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    device: str
    bytes: int
    calls: tuple[str, ...]
    rows: int
    inputs: tuple[tuple[int, ...], ...]
    strangers: tuple[str, ...]
    source: str
    readers: tuple[tuple[str, str], ...] = ()
    applied: tuple[Shape | str, ...] = ()


@dataclass(frozen=True, eq=False)
class Recording:
    """The operator graph of one forward pass, or of several.

    Attributes:
        graph: nodes carry ``meta["op"]``, ``["scope"]``, ``["path"]``, ``["shape"]`` and
            ``["attributes"]``; of the first pass.
        operators: the same as frozen values, in execution order; those of all passes.
        weights: facts per parameter, by its first name.
        macs: multiply-accumulates of the recorded passes (matrix products, convolutions and
            attention, as counted by ``torch.utils.flop_counter``).
        samples: for each weight, some of the input that it met, to verify a rewrite on: up to
            :data:`SAMPLE_ROWS` rows per call (rows x features), as many indices of an embedding, or
            items of a convolution (items x channels x extents).
        called: how often each module was called, by its path, in the order of the first calls; the
            most of all passes.
        opaque: paths of those that returned something other than tensors and plain values.
        drew: whether the (first) pass drew random numbers.
    """

    graph: fx.Graph
    operators: tuple[Operator, ...]
    weights: Mapping[str, Weight]
    macs: int
    samples: Mapping[str, Tensor]
    called: Mapping[str, int]
    opaque: frozenset[str] = frozenset()
    drew: bool = False

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each operator stands in :attr:`operators`, by its name."""
        return {operator.name: place for place, operator in enumerate(self.operators)}


PART = "it is applied in part"
"""Why a weight is no operator of which functions take slices."""

_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]

SAMPLE_ROWS = 32
SAMPLE_ENTRIES = 1 << 18
"""Of a convolution's input, no more entries are kept than this, but one item at least."""


def record(
    model: nn.Module, examples: Sequence[Any], *, forward: Forward | None = None
) -> Recording:
    """Run ``model`` once on every example and return the graph of all runs.

    Args:
        model: any module that runs; it is not changed.
        examples: one or more batches (see :mod:`fxcompress.graph.inputs`).  Facts about
            weights (who shares an input, who reads them) are kept only if true of all runs that
            use them; sizes and multiply-accumulates are added up.
        forward: how to call the model on a batch, if neither its type nor the convention of
            :mod:`fxcompress.graph.inputs` says so.

    Raises:
        RecordError: there is no example, or the model fails on one.
    """
    if not examples:
        raise RecordError("recording needs at least one example batch, and got none")
    expect_draws(False)
    runs = [_record_one(model, example, forward) for example in examples]
    expect_draws(any(run.drew for run in runs))
    return together(runs)


def together(runs: Sequence[Recording]) -> Recording:
    """The graph of several runs of a model.

    Args:
        runs: recordings of one run each, one at least.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    whole = union([run.operators for run in runs])
    weights = {
        name: _agree([run.weights[name] for run in runs], whole.names) for name in first.weights
    }
    samples = {name: each for run in reversed(runs) for name, each in run.samples.items()}
    called: dict[str, int] = {}
    for one in runs:
        called |= {name: max(count, called.get(name, 0)) for name, count in one.called.items()}
    opaque = frozenset[str]().union(*(run.opaque for run in runs))
    macs = sum(run.macs for run in runs)
    return Recording(first.graph, whole.operators, weights, macs, samples, called, opaque)


def _agree(facts: Sequence[Weight], names: Sequence[Mapping[str, str]]) -> Weight:
    """One weight in all recordings together.

    Args:
        facts: of each.
        names: of the operators of each in the whole.
    """
    pairs = zip(facts, names, strict=True)
    calls = dict.fromkeys(called[call] for fact, called in pairs for call in fact.calls)
    return replace(
        facts[0],
        calls=tuple(calls),
        rows=sum(fact.rows for fact in facts),
        inputs=tuple(size for fact in facts for size in fact.inputs),
        strangers=tuple(dict.fromkeys(scope for fact in facts for scope in fact.strangers)),
        # Joined keys are equal for two weights only if they shared their input in every run; one
        # that is not used in a run shares it with nothing that is.
        source="|".join(fact.source for fact in facts),
        readers=tuple(dict.fromkeys(reader for fact in facts for reader in fact.readers)),
        applied=tuple(each for fact in facts for each in fact.applied),
    )


def _record_one(model: nn.Module, example: Any, forward: Forward | None) -> Recording:
    recorder = _Recorder(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    flops, random = FlopCounter(), Watched()
    try:
        example = to_device(example, device_of(model))  # before, so that no node comes of it
        with flops:
            recorder.run(lambda: run_model(model, example, forward))
    except RecordError:
        raise
    except Exception as error:
        several = isinstance(example, (list, tuple)) and len(example) > 0
        texts = isinstance(example[0] if several else example, str)
        hint = "The batch is text, and models take tokens: tokenizer(text, return_tensors='pt')\n"
        raise RecordError(
            f"the model failed on the example batch: {type(error).__name__}: {error}\n"
            f"{hint if texts else ''}"
            "A batch is a tensor (one positional argument), a tuple (positional arguments) or a "
            "mapping (keyword arguments); for anything else, such as (inputs, labels), pass "
            "forward=lambda model, batch: model(batch[0])"
        ) from error
    finally:
        drew = random.finish(flops.drew)
        for module in training:
            module.training = True
    return replace(recorder.finish(flops.total // 2), drew=drew)


class _Recorder(TorchFunctionMode):
    """Turns one real forward pass into an ``fx.Graph``.

    Tags live in a weak dictionary beside the tensors, never on them; the nodes of arguments
    are computed before a call runs, because the call may write to its arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        # Typed as a GraphModule; any module will do for lint() to look targets up in.
        self.graph = fx.Graph(model)  # type: ignore[arg-type]
        self.producers: Any = WeakTensorKeyDictionary()
        self.module_names = {id(module): name for name, module in model.named_modules()}
        self.ownership = Ownership(model)
        self.versions = Versions()
        self.stack: list[str] = []
        self.leaf_depth = 0
        self.strangers: dict[int, list[str]] = defaultdict(list)
        self.readers: dict[int, dict[tuple[str, str], None]] = defaultdict(dict)
        self.reads: dict[int, list[fx.Node]] = defaultdict(list)
        self.sources: dict[int, list[str]] = defaultdict(list)
        self.rows: dict[int, int] = defaultdict(int)
        self.inputs: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        self.samples: dict[int, list[Tensor]] = defaultdict(list)
        self.applications: dict[int, list[Shape | str]] = defaultdict(list)
        self.called: dict[str, int] = {}
        self.opaque: set[str] = set()
        self.thread = threading.get_ident()

    # ---- running -----------------------------------------------------------------

    def run(self, function: Callable[[], Any]) -> None:
        """Call ``function`` and record all that happens inside."""
        with called_through(self.model.modules(), self.call), torch.no_grad(), eager(), self:
            result = function()
        if isinstance(result, Iterator):
            raise RecordError(
                "the model returns a generator, which computes nothing until somebody reads it: "
                "pass forward=lambda model, batch: list(model(batch)), or what fits your batches"
            )
        with torch._C.DisableTorchFunction():
            outputs = tuple(self.node_of(tensor) for tensor in tensors_in(result))
        self.graph.output(outputs).meta.update(op="output", scope="", path="", attributes={})

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the ``__call__`` of a module of the model while recording."""
        if threading.get_ident() != self.thread:  # a model may have its modules run by workers
            return module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        name = self.module_names[id(module)]
        self.called[name] = self.called.get(name, 0) + 1
        leaf = not self.leaf_depth and is_leaf(module)
        if leaf:
            assert name is not None
            with torch._C.DisableTorchFunction():
                nodes, before = self.arguments(args, kwargs)
        self.stack.append(name)
        self.leaf_depth += leaf
        try:
            out = module._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.leaf_depth -= leaf
            self.stack.pop()
        if leaf:
            with torch._C.DisableTorchFunction():
                node = self.graph.call_module(name, *nodes)
                meta = canonicalize(module=module, args=args, kwargs=kwargs)
                node.meta.update(meta, path=displayed(self.model, name), scope=self.scope())
                scripted = isinstance(module, torch.jit.ScriptModule)
                weight = None if scripted else module._parameters.get("weight")
                key = None if weight is None else self.ownership.key(weight)
                if key is not None and before:
                    self.applied(key, node, before[0][0])
                out = self.emit(node, before, out)
        if not all(isinstance(each, (Tensor, *_PLAIN)) for each in tree_leaves(out)):
            self.opaque.add(name)
        return out

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if any_applied(args, kwargs):
            with self:  # what it comes to is seen, not the call
                return run(function, args, kwargs)
        name = getattr(function, "__name__", "")
        if name in _METADATA:
            return function(*args, **kwargs)
        if name == "__get__":
            out = function(*args, **kwargs)
            if not isinstance(out, Tensor) or self.ownership.key(out) is not None:
                return out
        self.notice_readers(function, args, kwargs)
        nodes, before = ((), []) if self.leaf_depth else self.arguments(args, kwargs)
        arguments = tensors_in((args, kwargs))
        counters = [counter(tensor) for tensor in arguments]
        out = function(*args, **kwargs)
        self.versions.notice(name, arguments, counters)
        if self.leaf_depth:
            return out
        if name in ("__setitem__", "__set__"):
            node = self.function_node(function, nodes, args, kwargs)
            self.tag(args[0], node)
        elif tensors_in(out):
            out = self.emit(self.function_node(function, nodes, args, kwargs), before, out)
        return out

    def function_node(self, function: Any, nodes: Any, args: Any, kwargs: Any) -> fx.Node:
        node = self.graph.call_function(function, *nodes)
        parameter = self.ownership.parameter
        meta = canonicalize(function=function, args=args, kwargs=kwargs, parameter=parameter)
        key, application = meta.pop("weight", None), meta.pop("application", None)
        node.meta.update(meta, path=self.scope(), scope=self.scope())
        if key is not None:
            self.applications[key].append(self.shape_of(key, application, node.meta["op"]))
            data = next(t for t in tensors_in((args, kwargs)) if parameter(t) is None)
            self.applied(key, node, data)
        return node

    # ---- values and nodes --------------------------------------------------------

    def tag(self, tensor: Tensor, node: fx.Node) -> fx.Node:
        self.producers[tensor] = (node, self.versions.of(tensor))
        node.meta["shape"] = shape_of(tensor)
        return node

    def node_of(self, value: Any) -> Any:
        """The node that produced a tensor; plain values stay themselves."""
        if not isinstance(value, Tensor):
            return value if isinstance(value, _PLAIN) else str(type(value).__name__)
        node, version = self.producers.get(value, (None, None))
        if node is not None:
            if version == self.versions.of(value):
                return node
            # Somebody wrote through a view or through .data: from here on another value.
            written = self.graph.call_function(Tensor.copy_, (node,))
            written.meta.update(op="write", attributes={}, scope=self.scope(), path="")
            return self.tag(value, written)
        key = self.ownership.key(value)
        if key is not None:
            target = self.ownership.names(key)[0]
            # Not create_node("get_attr") through get_attr(): that one resolves the target.
            node = self.graph.create_node("get_attr", target)
            node.meta.update(op="parameter", attributes={}, scope="", path=target)
        else:
            node = self.graph.placeholder("input")
            node.meta.update(op="input", attributes={}, scope="", path="")
        return self.tag(value, node)

    def nodes(self, value: Any) -> Any:
        """An argument with nodes in the place of tensors.

        Containers of other classes become tuples: theirs may take nothing but tensors.
        """
        if type(value) in (list, tuple):
            return type(value)(map(self.nodes, value))
        if type(value) is dict:
            return {str(key): self.nodes(each) for key, each in value.items()}
        leaves = tree_leaves(value, is_leaf=is_tensor)
        if len(leaves) == 1 and leaves[0] is value:
            return self.node_of(value)
        return tuple(map(self.nodes, leaves))

    def arguments(self, args: Any, kwargs: Any) -> tuple[Any, list[tuple[Tensor, Version]]]:
        nodes = tuple(map(self.nodes, args)), {key: self.nodes(kwargs[key]) for key in kwargs}
        return nodes, [(tensor, self.versions.of(tensor)) for tensor in tensors_in((args, kwargs))]

    def emit(self, node: fx.Node, before: list[tuple[Tensor, Version]], out: Any) -> Any:
        if isinstance(out, Tensor) and any(
            out is tensor and version == self.versions.of(tensor) for tensor, version in before
        ):
            # Dropout in eval mode and no-op .to() hand back their argument: give the result
            # an identity of its own, so that the node stays visible.
            out = out.view_as(out)
        tensors = tensors_in(out)
        if len(tensors) == 1:
            self.tag(tensors[0], node)
        else:
            for index, tensor in enumerate(tensors):
                item = self.graph.call_function(_item, (node, index))
                attributes = {"index": index}
                item.meta.update(op="getitem", attributes=attributes, scope=self.scope(), path="")
                self.tag(tensor, item)
        return out

    def scope(self) -> str:
        return self.stack[-1] if self.stack else ""

    # ---- facts about weights -----------------------------------------------------

    def applied(self, key: int, node: fx.Node, data: Tensor) -> None:
        producer = self.producers.get(data, (None, None))[0]
        self.reads[key].append(node)
        self.sources[key].append(f"{producer}@{self.versions.of(data)}")
        op = node.meta["op"]
        takes = OPERATORS[op].takes if op in OPERATORS else "rows"
        extents = OPERATORS[op].ops[op] if takes == "patches" else None
        data = physical(data, extents).detach()
        if not data.dim() or not data.numel():
            return
        if extents is not None:
            items = data.unsqueeze(0) if data.dim() < extents + 2 else data
            self.inputs[key].append((len(items), *items.shape[2:]))
            few = max(1, SAMPLE_ENTRIES // max(1, items[:1].numel()))
            self.samples[key].append(items[: min(few, SAMPLE_ROWS)].nan_to_num(0, 0, 0))
            return
        rows = data.reshape(-1) if takes == "indices" else data.reshape(-1, data.shape[-1])
        self.rows[key] += len(rows)
        if data.is_floating_point() or takes == "indices":
            step = max(1, len(rows) // SAMPLE_ROWS)
            some = rows[::step][:SAMPLE_ROWS]
            # Padding may hold anything.
            self.samples[key].append(some.nan_to_num(0, 0, 0) if takes == "rows" else some.clone())

    def shape_of(self, key: int, application: Application | None, op: str) -> Shape | str:
        """The operator that a function call is, with the weight as it is stored, or why it is none.

        Args:
            key: of the weight.
            application: of it, if the call is one.
            op: that the call is.
        """
        if application is None:
            return f"{op} applies it in a way that no operator does"
        if self.in_autograd_function(key):
            return "an autograd.Function applies it, which takes nothing but tensors"
        stored, given = self.ownership.tensor(key), application.weight
        if _layout(given) == _layout(stored):
            return application.shape
        if stored.dim() == 2 and _layout(given) == _layout(stored.T):
            shape = application.shape.mirrored()
            return f"{op} applies its transpose" if shape is None else shape
        whole = given.numel() == stored.numel()
        return f"{op} applies its entries in another order" if whole else PART

    def in_autograd_function(self, key: int) -> bool:
        """Whether a function that is running was given a weight, and may save it for later."""
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code is _APPLY:
                given = tensors_in(frame.f_locals["args"])
                if any(self.ownership.parameter(tensor) == key for tensor in given):
                    return True
            frame = frame.f_back
        return False

    def notice_readers(self, function: Any, args: Any, kwargs: Any) -> None:
        """Who reads a parameter's values, and who does while no owner of it is running."""
        for tensor in tensors_in((args, kwargs)):
            key = self.ownership.key(tensor)
            if key is not None:
                op = function_operator(function_name(function), args, kwargs)
                self.readers[key].setdefault((op, self.scope()))
            if key is not None and not self.ownership.owners(key) & set(self.stack):
                self.strangers[key].append(self.scope())

    # ---- the frozen result -------------------------------------------------------

    def finish(self, macs: int) -> Recording:
        weights, weight_of, samples = {}, {}, {}
        for key, tensor in self.ownership.parameters():
            aliases = self.ownership.names(key)
            name = aliases[0]
            weights[name] = Weight(
                name=name,
                aliases=aliases,
                shape=tuple(tensor.shape),
                dtype=str(tensor.dtype).removeprefix("torch."),
                device=str(tensor.device),
                bytes=tensor.numel() * tensor.element_size(),
                calls=tuple(node.name for node in self.reads[key]),
                rows=self.rows[key],
                inputs=tuple(self.inputs[key]),
                strangers=tuple(dict.fromkeys(self.strangers[key])),
                source=" ".join(self.sources[key]),
                readers=tuple(self.readers[key]),
                applied=tuple(self.applications[key]),
            )
            weight_of.update({node.name: name for node in self.reads[key]})
            parts = self.samples[key]
            if len({part.shape[1:] for part in parts}) == 1:
                samples[name] = torch.cat(parts)
        operators = tuple(_operator(node, weight_of.get(node.name)) for node in self.graph.nodes)
        opaque = frozenset(self.opaque)
        return Recording(self.graph, operators, weights, macs, samples, self.called, opaque)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _operator(node: fx.Node, weight: str | None) -> Operator:
    return Operator(
        name=node.name,
        op=node.meta["op"],
        path=node.meta["path"],
        scope=node.meta["scope"],
        attributes=node.meta["attributes"],
        inputs=_operands(node),
        users=tuple(user.name for user in node.users),
        shape=node.meta.get("shape"),
        weight=weight,
        module=node.op == "call_module",
    )


def _operands(node: fx.Node) -> tuple[str, ...]:
    """Names of the nodes that a node reads, in the order of its arguments, repeated ones too."""
    found: list[str] = []

    def note(source: fx.Node) -> fx.Node:
        found.append(source.name)
        return source

    fx.map_arg((node.args, node.kwargs), note)
    return tuple(found)


def _item(values: Any, index: int) -> Any:
    """Stands for one of several tensors that an operator returned."""
    return values[index]
