"""Follow marks of padding through a forward pass, operator by operator.

Every tensor has marks (:mod:`fxcompress.graph.marks`) *by storage*: one a storage entry, read with
the tensor's own sizes and strides.  So views need no rule, and a write through one is seen in
all.  Below autograd and vmap few operators remain: what computes entry by entry is known by its
tag; what moves entries is run on the marks; reductions, products, convolutions and attention have
a rule each.  After any other operator it is unknown which rows are padding, and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from fxcompress.graph.marks import PAD, Unfollowed, either, product, together, windows


@dataclass(eq=False)
class _Shadow:
    """Marks of a storage.

    Attributes:
        alive: says whether the storage still is.
        marks: one for each entry.
        itemsize: of an entry, in bytes.
        soft: the values are derived from a mask itself: where they meet others, these decide.
        lost: why nothing is known any more; empty if all is.
    """

    alive: Any
    marks: Tensor
    itemsize: int
    soft: bool
    lost: str = ""


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, knows which entries of which tensors belong to padding."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shadows: dict[int, _Shadow] = {}
        self._sweep = 1024

    # ---- reading and writing -----------------------------------------------------

    def marks(self, tensor: Tensor) -> Tensor | None:
        """Marks of a tensor's entries, of its shape; None if all are neutral.

        Raises:
            Unfollowed: they are not known.
        """
        shadow = self._shadow(tensor)
        if shadow is None:
            return None
        if shadow.lost:
            raise Unfollowed(shadow.lost)
        return _viewed(shadow, tensor)

    def mark(self, tensor: Tensor, marks: Tensor | None, *, soft: bool = False) -> None:
        """Set the marks of a tensor's entries; they broadcast.  None makes them neutral."""
        shadow = self._shadow(tensor)
        if shadow is None:
            if marks is None or not tensor.numel():
                return
            shadow = self._new(tensor, marks.dtype, soft)
        if shadow.itemsize != tensor.element_size():
            shadow.lost = shadow.lost or "a value is written to as one of another type"
            return
        if marks is not None and marks.dtype.itemsize > shadow.marks.dtype.itemsize:
            shadow.marks = shadow.marks.to(marks.dtype)
        shadow.soft = soft if shadow.marks.numel() == tensor.numel() else shadow.soft and soft
        if shadow.marks.numel() == tensor.numel():
            shadow.lost = ""
        view = _viewed(shadow, tensor)
        with torch.no_grad():
            if marks is None:
                view.zero_()
            else:
                view.copy_(marks.expand(tensor.shape))

    def lose(self, tensor: Tensor, why: str, *, soft: bool = False) -> None:
        """From here on it is not known which entries of a tensor are padding."""
        if not tensor.numel():
            return
        shadow = self._shadow(tensor) or self._new(tensor, torch.uint8, soft)
        shadow.lost, shadow.soft = why, shadow.soft and soft

    def _new(self, tensor: Tensor, dtype: torch.dtype, soft: bool) -> _Shadow:
        storage = tensor.untyped_storage()
        if len(self._shadows) >= self._sweep:
            gone = [key for key, each in self._shadows.items() if each.alive.expired()]
            for key in gone:
                del self._shadows[key]
            self._sweep = 2 * len(self._shadows) + 1024
        size = tensor.element_size()
        entries = torch.zeros(storage.nbytes() // size, dtype=dtype, device=tensor.device)
        shadow = _Shadow(_reference(storage), entries, size, soft)
        self._shadows[storage._cdata] = shadow
        return shadow

    def _shadow(self, tensor: Tensor) -> _Shadow | None:
        try:
            key = tensor.untyped_storage()._cdata
        except (NotImplementedError, RuntimeError):
            return None  # without memory of its own: sparse, or wrapped
        found = self._shadows.get(key)
        if found is not None and found.alive.expired():
            del self._shadows[key]
            return None
        return found

    def keep(self, tensors: list[Tensor]) -> None:
        """Forget all but these: what is known of them stays for as long as they do."""
        kept = {shadow for tensor in tensors if (shadow := self._shadow(tensor)) is not None}
        self._shadows = {key: each for key, each in self._shadows.items() if each in kept}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not followed."""
        with _disable_current_modes():
            yield

    # ---- one operator ------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        shadows = [shadow for each in given if (shadow := self._shadow(each)) is not None]
        out = func(*args, **kwargs)
        if not shadows:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        mutable = func._schema.is_mutable
        if not mutable:
            places = {each.untyped_storage()._cdata for each in given}
            results = [
                each for each in results
                if each.layout == torch.strided and each.untyped_storage()._cdata not in places
            ]  # fmt: skip
            if not results:
                return out  # a view
        # What a mask itself was made to says nothing beside values of tokens.
        soft = all(shadow.soft for shadow in shadows)
        call = _Call(self, func, args, kwargs, results, soft)
        with torch.no_grad():
            try:
                found = call.follow()
            except Unfollowed as error:
                for each in results:
                    self.lose(each, str(error), soft=soft)
            else:
                for each, marks in zip(results, found, strict=True):
                    self.mark(each, marks, soft=soft)
        return out


def _reference(storage: Any) -> Any:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _viewed(shadow: _Shadow, tensor: Tensor) -> Tensor:
    marks, size = shadow.marks, tensor.element_size()
    if size < shadow.itemsize:  # a complex value seen as pairs
        marks = marks.repeat_interleave(shadow.itemsize // size)
    elif size > shadow.itemsize:
        group = size // shadow.itemsize
        marks = marks[: len(marks) // group * group].view(-1, group).amax(1)
    return marks.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


class _Call:
    """One operator with its arguments by name, and the rule that it falls under."""

    def __init__(
        self, following: Following, func: Any, args: Any, kwargs: Any,
        results: list[Tensor], soft: bool,
    ) -> None:  # fmt: skip
        self.following, self.func, self.results, self.soft = following, func, results, soft
        self.args, self.kwargs = args, kwargs
        self.name: str = func._schema.name.removeprefix("aten::")
        names = [argument.name for argument in func._schema.arguments]
        self.given: dict[str, Any] = dict(zip(names, args, strict=False)) | dict(kwargs)

    def read(self, value: Any) -> Tensor | None:
        """Marks of a tensor; None if neutral, or if it is no tensor."""
        if not isinstance(value, Tensor):
            return None
        shadow = self.following._shadow(value)
        if shadow is None or (shadow.soft and not self.soft):
            return None
        return self.following.marks(value)

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
Rule = Callable[[_Call], Found]
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
def _entrywise(call: _Call) -> Found:
    """Entry by entry; a copy overwrites."""
    values = [call.given["src"]] if call.name == "copy_" else tree_leaves((call.args, call.kwargs))
    found: Tensor | None = None
    for value in values:
        marks = call.read(value)
        if marks is not None:
            found = marks if found is None else together(found.to(marks.device), marks)
    return found


@_rule(
    "_softmax _log_softmax _safe_softmax cumsum cumprod logcumsumexp cummax cummin "
    "native_layer_norm native_group_norm native_batch_norm _native_batch_norm_legit "
    "_native_batch_norm_legit_no_training batch_norm cudnn_batch_norm rms_norm "
    "_fused_rms_norm layer_norm triu tril log_softmax softmax "
    "fake_quantize_per_tensor_affine hardtanh gelu relu renorm zeros_like empty_like"
)  # fmt: skip
def _kept(call: _Call) -> Found:
    """Whatever is mixed, an entry stays at its place."""
    marks = call.read(next(v for v in call.args if isinstance(v, Tensor)))
    if marks is None:
        return None
    return [marks if each.shape == marks.shape else None for each in call.results]


@_rule("fill zero nonzero bincount histc _unique2 unique_dim unique_consecutive searchsorted "
       "_local_scalar_dense item equal")  # fmt: skip
@_rule("ones_like full_like rand_like randn_like randint_like new_zeros "
       "new_ones new_empty new_full new_empty_strided empty_strided bernoulli")  # fmt: skip
def _neutral(call: _Call) -> Found:
    """Numbers of entries, places, constants: no values of tokens."""
    return None


@_rule(
    "cat stack flip roll repeat constant_pad_nd slice_scatter select_scatter diagonal_scatter "
    "permute_copy expand_copy view_copy _reshape_copy unsqueeze_copy squeeze_copy slice_copy "
    "transpose_copy t_copy select_copy unfold_copy pixel_shuffle pixel_unshuffle channel_shuffle "
    "masked_select take index_copy rot90 diag_embed block_diag split_with_sizes_copy split_copy "
    "masked_scatter index_fill"
)
def _moved(call: _Call) -> Found:
    """Run on the marks themselves."""
    read = (call.read(value) for value in tree_leaves((call.args, call.kwargs)))
    first = next((marks for marks in read if marks is not None), None)
    if first is None:
        return None

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
def _indexed(call: _Call) -> Found:
    data, places = call.given["self"], list(call.given["indices"])
    marks = call.read(data)
    if marks is not None:
        picked: Tensor = torch.ops.aten.index(marks, places)
        return picked
    # A table that is looked up: the rows are those of the look-ups.
    used = [at for at, each in enumerate(places) if each is not None]
    if any(places[at].dtype in (torch.bool, torch.uint8) for at in used):
        return None
    found: Tensor | None = None
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
def _looked_up(call: _Call) -> Found:
    table: Any = call.given.get("self")
    places: Any = call.given.get("index")
    dim = call.given.get("dim", 0)
    if table is None:
        table, places, dim = call.given["weight"], call.given["indices"], 0
    marks = call.read(table)
    if marks is not None:
        if call.name == "embedding":
            return marks[places]
        return marks.index_select(dim, places)
    found = call.read(places)
    if found is None:
        return None
    dim %= max(1, table.dim())
    return found.reshape(*(1,) * dim, *found.shape, *(1,) * (table.dim() - dim - 1))


@_rule("gather")
def _gathered(call: _Call) -> Found:
    data, dim, places = (call.given[name] for name in ("self", "dim", "index"))
    marks, own = call.read(data), call.read(places)
    found = None if marks is None else torch.gather(marks, dim, places)
    if found is None or own is None:
        return own if found is None else found
    return either(found, own)  # a position without a label is none


@_rule("repeat_interleave")
def _repeated(call: _Call) -> Found:
    data = call.given.get("self")
    marks = None if data is None else call.read(data)
    return None if marks is None else call.func(**{**call.given, "self": marks})


def _source(call: _Call, *names: str) -> Tensor | None:
    values = [call.given[name] for name in names if name in call.given]
    return call.read(values[0]) if values else None


@_rule("index_add scatter_add scatter scatter_reduce index_reduce index_put _index_put_impl "
       "_unsafe_index_put")  # fmt: skip
def _written(call: _Call) -> Found:
    """Written to places of a value, or added up there."""
    data = call.given["self"]
    source = _source(call, "source", "src", "values")
    marks = call.read(data)
    many = call.given.get("indices")
    if source is None and many is None and call.name.startswith("scatter"):
        source = call.read(call.given["index"])  # one-hot: the labels' marks
    if source is None and marks is None:
        return None
    dtype = (marks if marks is not None else source).dtype  # type: ignore[union-attr]
    full = call.full(data, dtype).clone()
    if many is not None:
        sizes = torch.ops.aten.index(full, list(many)).shape
        source = torch.zeros(sizes, dtype=dtype, device=full.device) if source is None else source
        source = source.to(dtype).expand(sizes)
        if not call.given.get("accumulate", False):
            torch.ops.aten.index_put_(full, list(many), source)
            return full
        if any(each is not None and each.dtype == torch.bool for each in many):
            before = torch.ops.aten.index(full, list(many))
            torch.ops.aten.index_put_(full, list(many), torch.maximum(before, source))
            return full
        places = torch.arange(full.numel(), device=full.device).view(full.shape)
        flat = torch.ops.aten.index(places, list(many)).reshape(-1)
        return full.view(-1).scatter_reduce_(0, flat, source.reshape(-1), "amax").view(full.shape)
    dim, places = call.given["dim"], call.given["index"]
    given = call.given.get("source", call.given.get("src"))
    if source is None:
        shape = given.shape if isinstance(given, Tensor) else places.shape
        source = torch.zeros(shape, dtype=dtype, device=full.device)
    source = source.to(dtype)
    if call.name.startswith("index"):
        size = [1] * full.dim()
        size[dim] = -1
        places = places.view(size).expand(source.shape)
    source = source[tuple(slice(0, size) for size in places.shape)]
    adds = call.name.startswith(("index_", "scatter_add", "scatter_reduce"))
    adds = adds or call.given.get("reduce") is not None
    if adds:
        return full.scatter_reduce_(dim, places, source, "amax")
    return full.scatter_(dim, places, source)


@_rule(
    "sum mean amax amin any all max min argmax argmin var std var_mean std_mean logsumexp prod "
    "norm linalg_vector_norm median nanmedian mode count_nonzero nansum kthvalue aminmax"
)
def _reduced(call: _Call) -> Found:
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
def _sorted(call: _Call) -> Found:
    marks = call.read(call.given["self"])
    if marks is None:
        return None
    dim = call.given.get("dim", -1)
    found = marks.gather(-1 if dim is None else dim, call.results[1])
    return [found, found]


@_rule("argsort")
def _argsorted(call: _Call) -> Found:
    marks = call.read(call.given["self"])
    return None if marks is None else marks.gather(call.given.get("dim", -1), call.results[0])


@_rule("glu")
def _halved(call: _Call) -> Found:
    marks = call.read(call.given["self"])
    return None if marks is None else together(*marks.chunk(2, call.given.get("dim", -1)))


@_rule(
    "mm bmm matmul dot mv linear addmm baddbmm addmv _grouped_mm mkldnn_linear "
    "_mkldnn_linear_pointwise"
)
def _multiplied(call: _Call) -> Found:
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
def _attended(call: _Call) -> Found:
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
def _convolved(call: _Call) -> Found:
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
def _recurrent(call: _Call) -> Found:
    """Outputs (positions, batch, features) stay at their places."""
    marks = call.read(call.args[0])
    if marks is None:
        return None
    return [marks.amax(-1, keepdim=True).expand(call.results[0].shape)]


@_rule("_pack_padded_sequence")
def _packed(call: _Call) -> Found:
    marks = call.read(call.given["input"])
    return None if marks is None else [call.func(**{**call.given, "input": marks})[0]]


@_rule("_pad_packed_sequence")
def _unpacked(call: _Call) -> Found:
    marks = call.read(call.given["data"])
    if marks is None:
        return None
    return [call.func(**{**call.given, "data": marks, "padding_value": PAD})[0]]


@_rule("nll_loss_forward nll_loss2d_forward")
def _judged(call: _Call) -> Found:
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
def _compared(call: _Call) -> Found:
    found = _entrywise(call)
    if isinstance(found, Tensor) and call.results[0].dim() == 0:
        return found.amax()
    return found


RULES: Mapping[str, Rule] = _RULES
"""What is done at operators of ATen, by name; those that are tagged pointwise need none."""
