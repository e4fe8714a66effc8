"""Rules by which marks of padding go through operators of ATen.

A rule is given a call that has run and says which marks (:mod:`fxcompress.graph.marks`) its results
have.  Operators that are tagged pointwise or as reductions need no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxcompress.graph.marks import PAD, Unfollowed, either, product, together, windows

WRITES = {f"aten::{name}_" for name in ("copy", "index_put", "index_copy", "masked_scatter")}
"""What writes values to places of another one."""


class AtenCall:
    """One operator with its arguments by name, and the rule that it falls under.

    Attributes:
        func: the overload.
        name: of the operator, without its namespace.
        args, kwargs, given: what it was called with, and the same by name.
        results: tensors that it returned, but views.
    """

    def __init__(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        results: list[Tensor],
        marks: Callable[[Tensor], Tensor | None],
    ) -> None:
        self.func, self.args, self.kwargs, self.results = func, args, kwargs, results
        self.name: str = func._schema.name.removeprefix("aten::")
        names = [argument.name for argument in func._schema.arguments]
        self.given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)
        self._marks = marks

    def read(self, value: Any) -> Tensor | None:
        """Marks of a tensor; None if neutral, or if it is no tensor."""
        return self._marks(value) if isinstance(value, Tensor) else None

    def full(self, value: Tensor, dtype: torch.dtype = torch.uint8) -> Tensor:
        """Marks of a tensor, zeros if it is neutral."""
        found = self.read(value)
        return (
            torch.zeros(value.shape, dtype=dtype, device=value.device) if found is None else found
        )

    def follow(self) -> list[Tensor | None]:
        """The marks of every result.

        Raises:
            Unfollowed: there is no rule for it, or the rule knows of none.
        """
        name = self.name.removesuffix("_") if self.func._schema.is_mutable else self.name
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in self.func.tags:
            rule = _entrywise
        if rule is None and torch.Tag.reduction in self.func.tags:
            rule = _reduced
        if rule is None:
            raise Unfollowed(f"the operator {self.name} has no rule that follows padding")
        try:
            found = rule(self)
        except Unfollowed as error:
            text = str(error)
            raise Unfollowed(text if " (in " in text else f"{text} (in {self.name})") from None
        except (RuntimeError, IndexError, TypeError, KeyError, ValueError) as error:
            raise Unfollowed(f"{type(error).__name__}: {error} (in {self.name})") from error
        if isinstance(found, list):
            return found + [None] * (len(self.results) - len(found))
        return [found] * len(self.results)


Found = Tensor | None | list[Tensor | None]
Rule = Callable[[AtenCall], Found]
_RULES: dict[str, Rule] = {}


def _rule(names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names.split(), rule))
        return rule

    return add


@_rule(
    "copy _to_copy clone masked_fill where native_dropout dropout lift_fresh lift "
    "alias_copy detach_copy bucketize complex polar view_as_complex_copy view_as_real_copy"
)
def _entrywise(call: AtenCall) -> Found:
    """Entry by entry; a copy overwrites."""
    values = [call.given["src"]] if call.name == "copy_" else tree_leaves((call.args, call.kwargs))
    found: Tensor | None = None
    for value in values:
        marks = call.read(value)
        if marks is not None:
            found = marks if found is None else together(found.to(marks.device), marks)
    return found


@_rule(
    "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin triu tril "
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training cudnn_batch_norm _fused_rms_norm renorm "
    "zeros_like empty_like"
)  # fmt: skip
def _kept(call: AtenCall) -> Found:
    """Whatever is mixed, an entry stays at its place."""
    marks = call.read(next(v for v in call.args if isinstance(v, Tensor)))
    if marks is None:
        return None
    return [marks if each.shape == marks.shape else None for each in call.results]


@_rule("fill zero nonzero bincount histc _unique2 unique_dim unique_consecutive searchsorted "
       "_local_scalar_dense item equal")  # fmt: skip
@_rule("ones_like full_like rand_like randn_like randint_like new_zeros "
       "new_ones new_empty new_full new_empty_strided empty_strided bernoulli")  # fmt: skip
def _neutral(call: AtenCall) -> Found:
    """Numbers of entries, places, constants: no values of tokens."""
    return None


@_rule(
    "cat stack flip roll repeat constant_pad_nd slice_scatter select_scatter diagonal_scatter "
    "permute_copy expand_copy view_copy _reshape_copy unsqueeze_copy squeeze_copy slice_copy "
    "transpose_copy t_copy select_copy unfold_copy pixel_shuffle pixel_unshuffle channel_shuffle "
    "masked_select take rot90 diag_embed block_diag split_with_sizes_copy split_copy "
    "index_fill"
)
def _moved(call: AtenCall) -> Found:
    """Run on the marks themselves."""
    found = [call.read(value) for value in tree_leaves((call.args, call.kwargs))]
    marked = [each for each in found if each is not None]
    if not marked:
        return None
    first = max(marked, key=lambda each: each.dtype.itemsize)

    def instead(name: str, value: Any) -> Any:
        if name in ("index", "mask", "indices", "repeats"):
            return value
        if name == "value" and isinstance(value, (int, float)):
            return 0
        if isinstance(value, Tensor):
            return call.full(value, first.dtype).to(first.dtype)
        if isinstance(value, (list, tuple)):
            return [instead("", each) for each in value]
        return value

    given = {name: instead(name, value) for name, value in call.given.items()}
    func = call.func
    if func._schema.is_mutable:
        func = getattr(getattr(torch.ops.aten, call.name.removesuffix("_")), func._overloadname)
    out = func(**given)
    return [each for each in tree_leaves(out) if isinstance(each, Tensor)]


@_rule("index")
def _indexed(call: AtenCall) -> Found:
    data, places = call.given["self"], list(call.given["indices"])
    marks = call.read(data)
    if marks is not None:
        found: Tensor | None = torch.ops.aten.index(marks, places)
        return found
    # A table that is looked up: the rows are those of the look-ups.
    used = [at for at, each in enumerate(places) if each is not None]
    if any(places[at].dtype in (torch.bool, torch.uint8) for at in used):
        return None
    found = None
    for at in used:
        each = call.read(places[at])
        if each is not None:
            found = each if found is None else together(found, each)
    if found is None:
        return None
    adjacent = used == list(range(used[0], used[0] + len(used)))
    dims = max(places[at].dim() for at in used)
    start = used[0] if adjacent else 0
    rest = call.results[0].dim() - start - dims
    found = found.reshape(*(1,) * (dims - found.dim()), *found.shape)
    return found.reshape(*(1,) * start, *found.shape, *(1,) * rest)


@_rule("index_select embedding")
def _looked_up(call: AtenCall) -> Found:
    table: Any = call.given.get("self")
    places: Any = call.given.get("index")
    dim = call.given.get("dim", 0)
    if table is None:
        table, places, dim = call.given["weight"], call.given["indices"], 0
    marks = call.read(table)
    if marks is not None:
        rows = places.reshape(-1)
        return marks.index_select(dim, rows).reshape(call.results[0].shape)
    found = call.read(places)
    if found is None:
        return None
    dim %= max(1, table.dim())
    return found.reshape(*(1,) * dim, *found.shape, *(1,) * (table.dim() - dim - 1))


@_rule("gather")
def _gathered(call: AtenCall) -> Found:
    data, dim, places = (call.given[name] for name in ("self", "dim", "index"))
    marks, own = call.read(data), call.read(places)
    found = None if marks is None else torch.gather(marks, dim, places)
    if found is None or own is None:
        return own if found is None else found
    return either(found, own)  # a position without a label is none


@_rule("repeat_interleave")
def _repeated(call: AtenCall) -> Found:
    data = call.given.get("self")
    marks = None if data is None else call.read(data)
    return None if marks is None else call.func(**{**call.given, "self": marks})


def _source(call: AtenCall, data: Tensor) -> tuple[Tensor | None, Tensor]:
    """Marks of the values that an operator writes, and of what it writes them to."""
    values = next((call.given[n] for n in ("source", "src", "values") if n in call.given), None)
    source, marks = call.read(values), call.read(data)
    kinds = [each.dtype for each in (source, marks) if each is not None] or [torch.uint8]
    dtype = max(kinds, key=lambda each: each.itemsize)
    base = call.full(data, dtype).to(dtype, copy=True)
    if marks is None and source is not None and constant(data):
        base.fill_(PAD)  # what is left of it stands for no token
    return None if source is None else source.to(dtype), base


def constant(data: Tensor) -> bool:
    """Whether all entries of a tensor are equal, as those of a fresh one are."""
    return bool((data == data.flatten()[:1]).all())


@_rule("index_put _index_put_impl _unsafe_index_put")
def _put(call: AtenCall) -> Found:
    data, places = call.given["self"], [*call.given["indices"]]
    adds = bool(call.given.get("accumulate", False))
    if adds:
        source, base = call.read(call.given["values"]), call.full(data).clone()
    else:
        source, base = _source(call, data)
    if source is None and call.read(data) is None:
        return None
    where = torch.arange(base.numel(), device=base.device).view(base.shape)
    flat = torch.ops.aten.index(where, places)
    if source is None:
        source = base.new_zeros(())
    elif source.dtype.itemsize > base.dtype.itemsize:
        base = base.to(source.dtype)
    values = source.to(base.dtype).expand(flat.shape).reshape(-1)
    if adds:
        base.view(-1).scatter_reduce_(0, flat.reshape(-1), values, "amax")
    else:
        base.view(-1)[flat.reshape(-1)] = values
    return base


@_rule("index_copy index_add scatter_add scatter scatter_reduce index_reduce")
def _written(call: AtenCall) -> Found:
    """Written to places of a value along one dimension, or added up there."""
    data, dim, places = (call.given[name] for name in ("self", "dim", "index"))
    given = call.given.get("source", call.given.get("src"))
    adds = call.name.startswith(("index_add", "index_reduce", "scatter_add", "scatter_reduce"))
    adds = adds or call.given.get("reduce") is not None
    if isinstance(given, Tensor) and not adds:
        source, base = _source(call, data)
    else:  # a number is written where labels say: one-hot
        source = call.read(given if isinstance(given, Tensor) else places)
        base = call.full(data).clone()
    if source is None:
        if call.read(data) is None:
            return None
        shape = given.shape if isinstance(given, Tensor) else places.shape
        source = torch.zeros(shape, dtype=base.dtype, device=base.device)
    if source.dtype.itemsize > base.dtype.itemsize:
        base = base.to(source.dtype)
    source = source.to(base.dtype)
    if call.name.startswith("index"):
        size = [1] * base.dim()
        size[dim] = -1
        places = places.view(size).expand(source.shape)
    source = source[tuple(slice(0, size) for size in places.shape)]
    if adds:
        return base.scatter_reduce_(dim, places, source, "amax")
    return base.scatter_(dim, places, source)


@_rule("masked_scatter")
def _filled(call: AtenCall) -> Found:
    source, base = _source(call, call.given["self"])
    if source is None:
        source = torch.zeros(call.given["source"].shape, dtype=base.dtype, device=base.device)
    shape = call.results[0].shape
    return base.expand(shape).masked_scatter(call.given["mask"], source.to(base.dtype))


@_rule(
    "sum mean amax amin any all max min argmax argmin var std var_mean std_mean logsumexp prod "
    "norm linalg_vector_norm median nanmedian mode count_nonzero nansum kthvalue aminmax"
)
def _reduced(call: AtenCall) -> Found:
    data = call.given.get("self", call.args[0])
    marks = call.read(data)
    if call.name in ("max", "min") and isinstance(call.given.get("other"), Tensor):
        return _entrywise(call)
    if marks is None:
        return None
    dims = call.given.get("dim")
    if dims is None or dims == []:
        return marks.amax() if marks.numel() else None
    return marks.amax(dims, keepdim=bool(call.given.get("keepdim", False)))


@_rule("topk sort")
def _sorted(call: AtenCall) -> Found:
    marks = call.read(call.given["self"])
    if marks is None:
        return None
    dim = call.given.get("dim", -1)
    found = marks.gather(-1 if dim is None else dim, call.results[1])
    return [found, found]


@_rule("argsort")
def _argsorted(call: AtenCall) -> Found:
    marks = call.read(call.given["self"])
    return None if marks is None else marks.gather(call.given.get("dim", -1), call.results[0])


@_rule("glu")
def _halved(call: AtenCall) -> Found:
    marks = call.read(call.given["self"])
    return None if marks is None else together(*marks.chunk(2, call.given.get("dim", -1)))


@_rule("mm bmm dot mv linear addmm baddbmm addmv _grouped_mm mkldnn_linear _linear_pointwise")
def _multiplied(call: AtenCall) -> Found:
    tensors = [value for value in call.args if isinstance(value, Tensor)]
    shape = call.results[0].shape
    added: Tensor | None = None
    if call.name in ("addmm", "baddbmm", "addmv"):
        added, tensors = call.read(tensors[0]), tensors[1:]
    a, b = (call.read(each) for each in tensors[:2])
    if call.name == "_grouped_mm":
        if b is not None or tensors[0].dim() != 2 or tensors[1].dim() != 3:
            raise Unfollowed("weights come from tokens")
        return None if a is None else a.amax(-1, keepdim=True).expand(shape)
    if call.name.endswith(("linear", "linear_pointwise")):
        if b is not None:
            raise Unfollowed("weights come from tokens")
        found = None if a is None else a.amax(-1, keepdim=True).expand(shape)
    elif call.name in ("mv", "dot", "addmv"):
        b = None if b is None else b.unsqueeze(-1)
        a = a if a is None or call.name != "dot" else a.unsqueeze(0)
        full = (*((1,) if call.name == "dot" else shape), 1)
        found = product(a, b, full)
        found = None if found is None else found.reshape(shape)
    else:
        found = product(a, b, shape)
    if added is None or found is None:
        return added if found is None else found
    return together(found, added)


@_rule(
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_attention_math _scaled_dot_product_fused_attention_overrideable"
)
def _attended(call: AtenCall) -> Found:
    """Rows are those of the queries; where there is nothing real to look at, they are none."""
    query, key, value = (call.given[name] for name in ("query", "key", "value"))
    q, shape = call.read(query), call.results[0].shape
    seen = [call.read(each) for each in (key, value)]
    rows = torch.zeros((*shape[:-1], 1), dtype=torch.uint8, device=query.device)
    if q is not None:
        rows = q.amax(-1, keepdim=True)
    marked = [each.amax((-2, -1), keepdim=True) for each in seen if each is not None]
    if marked:
        nothing = torch.stack([each.expand(marked[0].shape) for each in marked]).amax(0) == PAD
        if nothing.shape[1] != rows.shape[1]:
            nothing = nothing[:, :1]
        rows = torch.where(nothing, torch.full_like(rows, PAD), rows)
    elif q is None:
        return None
    return [rows.expand(shape)]


@_rule("convolution _convolution mkldnn_convolution cudnn_convolution")
def _convolved(call: AtenCall) -> Found:
    given = call.given
    data, weight = given.get("input", given.get("self")), given["weight"]
    marks = call.read(data)
    if call.read(weight) is not None:
        raise Unfollowed("weights come from tokens")
    if marks is None:
        return None
    if given.get("transposed"):
        raise Unfollowed("a transposed convolution runs over padding")
    out = call.results[0].shape
    dims = weight.dim() - 2

    def each(values: Any) -> list[int]:
        return [*values] * dims if len(values) == 1 else [*values]

    found = windows(
        marks.amax(1, keepdim=True), out[2:], weight.shape[2:],
        each(given["stride"]), each(given["padding"]), each(given["dilation"]),
    )  # fmt: skip
    return found.expand(out)


@_rule("mkldnn_rnn_layer")
def _recurrent(call: AtenCall) -> Found:
    """Outputs (positions, batch, features) stay at their places."""
    marks = call.read(call.args[0])
    if marks is None:
        return None
    return [marks.amax(-1, keepdim=True).expand(call.results[0].shape)]


@_rule("_pack_padded_sequence")
def _packed(call: AtenCall) -> Found:
    marks = call.read(call.given["input"])
    return None if marks is None else [call.func(**{**call.given, "input": marks})[0]]


@_rule("_pad_packed_sequence")
def _unpacked(call: AtenCall) -> Found:
    marks = call.read(call.given["data"])
    if marks is None:
        return None
    return [call.func(**{**call.given, "data": marks, "padding_value": PAD})[0]]


@_rule("nll_loss_forward nll_loss2d_forward")
def _judged(call: AtenCall) -> Found:
    """One value a row; a row without a label has none."""
    data, labels = call.given["self"], call.given["target"]
    marks, own = call.read(data), call.read(labels)
    dim = 1 if data.dim() > 1 else 0
    found = None if marks is None else marks.amax(dim)
    if found is not None and own is not None:
        found = either(found, own)
    elif found is None:
        found = own
    if found is not None and call.results[0].dim() == 0:
        found = found.amax()
    return [found]


@_rule("mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits "
       "soft_margin_loss l1_loss")  # fmt: skip
def _compared(call: AtenCall) -> Found:
    found = _entrywise(call)
    if isinstance(found, Tensor) and call.results[0].dim() == 0:
        return found.amax()
    return found
