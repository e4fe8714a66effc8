"""The language of ``where``: small Python-like expressions, read from the AST, never executed.

Comparisons (chained ones and ``in`` too), ``+ - * / // %`` on numbers, ``and``, ``or``,
``not``, literals, attributes of bound operators (``fc.in_features``), and the functions
``min``, ``max``, ``abs``, ``len`` and ``same``.  Lists are tuples, so that
``c.kernel_size == [3, 3]`` reads as it does in YAML.  ``present(bn)`` says whether an optional
operator is there, ``count(fc)`` how many members a group has.

>>> e = parse_expression("min(fc.in_features, 512) >= 256", {"fc": {"in_features"}})
>>> evaluate(e, {"fc": {"in_features": 300}})
True

The ``cost`` of a template is written in the same language, with the rank as ``r``:

>>> e = parse_cost("r * fc.in_features", {"fc": {"in_features"}})
>>> evaluate_number(e, {"fc": {"in_features": 300}}, rank=16)
4800
"""

from __future__ import annotations

import ast
import operator
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

from fxcompress.errors import RuleError
from fxcompress.graph.operator import AttributeValue

_MOST_CHARACTERS = 500
_DEEPEST = 30

RANK = "r"
"""The rank, as a cost names it."""

Values = Mapping[str, Mapping[str, AttributeValue] | None]
"""Bound name -> attributes of its operator, or None for an optional one that is absent."""

_Value = Any  # bool, int, float, str, None, or a tuple of these


class ExpressionError(RuleError):
    """An expression that cannot be read or has no value.

    Attributes:
        code: short name of the kind of error (``"unknown-attribute"``).
        message: what is wrong.
        offset: first character of the offending part.
        length: number of its characters.
        word: the unknown word to find a suggestion for, if there is one.
        known: the words that would have been right.
    """

    def __init__(
        self,
        code: str,
        message: str,
        offset: int = 0,
        length: int = 1,
        word: str = "",
        known: Collection[str] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.offset = offset
        self.length = length
        self.word = word
        self.known = known


class Given(NamedTuple):
    """What an expression is about.

    Attributes:
        values: attributes of operators by their names; None for one that is absent.
        counts: numbers of members, for groups.
        rank: what a cost calls :data:`RANK`.
    """

    values: Values
    counts: Mapping[str, int]
    rank: int = 0


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as written.
        attributes: the attributes that it reads, in order: ``(("fc", "in_features"),)``.
        value: what computes it.
        error: what makes the error of a value of the wrong kind.
    """

    text: str
    attributes: tuple[tuple[str, str], ...]
    value: Callable[[Given], Any] = field(repr=False)
    error: Callable[[str], ExpressionError] = field(repr=False)


def parse_expression(text: str, scope: Mapping[str, Collection[str]]) -> Expression:
    """Read and check an expression against the bound names and their attributes.

    >>> parse_expression("c.groups == 1", {"c": {"groups"}}).attributes
    (('c', 'groups'),)

    Raises:
        ExpressionError: not an expression, not allowed, or a name that is not there.
    """
    return _parse(text, scope, ranked=False)


def parse_cost(text: str, scope: Mapping[str, Collection[str]]) -> Expression:
    """Read and check an expression that may use the rank, too: :data:`RANK`.

    Raises:
        ExpressionError: as of :func:`parse_expression`.
    """
    return _parse(text, scope, ranked=True)


_QUIET = threading.Lock()
"""Filters of warnings are the whole process's: two threads that change them restore a wrong one."""


def _parse(text: str, scope: Mapping[str, Collection[str]], *, ranked: bool) -> Expression:
    if len(text) > _MOST_CHARACTERS:
        raise ExpressionError(
            "bad-expression",
            f"an expression of {len(text)} characters; at most {_MOST_CHARACTERS}",
            length=_MOST_CHARACTERS,
        )
    flat = "".join(" " if c in "\r\n" else c for c in text)  # a block scalar may hold line breaks
    body = flat.lstrip()
    compiler = _Compiler(flat, len(flat) - len(body), scope, ranked)
    if not body:
        raise ExpressionError("bad-expression", "an empty expression", length=len(text))
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1or 2" and "\d" are only deprecated in Python
            tree = ast.parse(body, mode="eval").body
    except SyntaxError as error:
        offset = min(max((error.offset or 1) - 1, 0), len(body) - 1) + compiler.start
        raise ExpressionError(
            "bad-expression", f"not an expression: {error.msg}", offset, 1
        ) from None
    except (ValueError, MemoryError, RecursionError):
        raise ExpressionError("bad-expression", "not an expression", 0, len(text)) from None
    value = compiler.compile(tree)
    attributes = tuple(dict.fromkeys(compiler.attributes))
    return Expression(text, attributes, value, partial(compiler.failed, tree))


def evaluate(
    expression: Expression, values: Values, counts: Mapping[str, int] | None = None
) -> bool:
    """The truth of an expression for given operators.

    >>> evaluate(parse_expression("not present(bn) or bn.eps > 0", {"bn": ["eps"]}), {"bn": None})
    True

    Args:
        expression: from :func:`parse_expression`.
        values: bound name -> attributes of its operator; None for an optional one that is absent.
        counts: bound name -> number of members, for groups; 1 is what others count.

    Raises:
        ExpressionError: a division by zero, operands that do not fit together, an attribute
            of an operator that is absent, or a value that is neither true nor false.
    """
    value = expression.value(Given(values, counts or {}))
    if not isinstance(value, bool):
        raise expression.error(f"gives {value!r}, which is neither true nor false")
    return value


def evaluate_number(expression: Expression, values: Values, rank: int) -> int | float:
    """The value of a cost for given operators at a rank.

    Raises:
        ExpressionError: as of :func:`evaluate`, or a value that is no number.
    """
    value = expression.value(Given(values, {}, rank))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise expression.error(f"gives {value!r}, which is not a number")
    return value


def _same(*values: _Value) -> bool:
    return all(value == values[0] for value in values)


_FUNCTIONS: Mapping[str, tuple[Callable[..., _Value], int, int]] = MappingProxyType(
    {
        # name -> function, fewest arguments, most arguments
        "min": (min, 1, 100),
        "max": (max, 1, 100),
        "abs": (abs, 1, 1),
        "len": (len, 1, 1),
        "same": (_same, 2, 100),
    }
)
_OF_NAMES: Mapping[str, Callable[[str, Given], _Value]] = MappingProxyType(
    {
        "present": lambda name, given: given.values.get(name) is not None,
        "count": lambda name, given: given.counts.get(
            name, int(given.values.get(name) is not None)
        ),
    }
)
"""Functions of a bound operator as such, not of a value."""
_ARITHMETIC: Mapping[type[ast.operator], Callable[[_Value, _Value], _Value]] = MappingProxyType(
    {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: operator.floordiv,
        ast.Mod: operator.mod,
    }
)
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[_Value, _Value], bool]] = MappingProxyType(
    {
        ast.Eq: operator.eq,
        ast.NotEq: operator.ne,
        ast.Lt: operator.lt,
        ast.LtE: operator.le,
        ast.Gt: operator.gt,
        ast.GtE: operator.ge,
        ast.In: lambda left, right: left in right,
        ast.NotIn: lambda left, right: left not in right,
    }
)
_UNARY: Mapping[type[ast.unaryop], Callable[[_Value], _Value]] = MappingProxyType(
    {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}
)


_Run = Callable[[Given], _Value]


@dataclass
class _Compiler:
    """Checks a syntax tree, and makes of it what computes its value."""

    text: str
    start: int
    scope: Mapping[str, Collection[str]]
    ranked: bool
    attributes: list[tuple[str, str]] = field(default_factory=list)

    def compile(self, node: ast.expr, depth: int = 0) -> _Run:
        if depth > _DEEPEST:
            raise self.error(node, "bad-expression", f"nested deeper than {_DEEPEST}")

        def inner(*children: ast.expr) -> list[_Run]:
            return [self.compile(child, depth + 1) for child in children]

        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None as value):
                return lambda given: value
            case ast.Attribute(value=ast.Name() as owner, attr=attribute):
                return self.attribute(node, owner, attribute)
            case ast.Name(id=name) if self.ranked and name == RANK:
                return lambda given: given.rank
            case ast.Name(id=name):
                self.need_bound(node)
                known = sorted(self.scope[name])
                example = f"; write {name}.{known[0]}, say" if known else ""
                message = f"'{name}' is an operator, not a value{example}"
                raise self.error(node, "forbidden-expression", message)
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return self.applied(node, lambda *values: values, inner(*items))
            case ast.BoolOp(op=op, values=operands):
                return partial(_until, isinstance(op, ast.Or), inner(*operands))
            case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
                numeric = not isinstance(sign, ast.Not)
                return self.applied(node, _UNARY[type(sign)], inner(operand), numeric=numeric)
            case ast.BinOp(left=left, op=arithmetic, right=right) if (
                type(arithmetic) in _ARITHMETIC
            ):
                function = _ARITHMETIC[type(arithmetic)]
                return self.applied(node, function, inner(left, right), numeric=True)
            case ast.Compare(ops=ops) if all(type(op) in _COMPARISONS for op in ops):
                links = [_COMPARISONS[type(op)] for op in ops]
                return partial(self.compared, node, links, inner(node.left, *node.comparators))
            case ast.Call(func=ast.Name(id=name)):
                if name in _OF_NAMES:
                    return partial(_OF_NAMES[name], self.bound_argument(node, name))
                self.check_call(node, name)
                return self.applied(node, _FUNCTIONS[name][0], inner(*node.args))
        raise self.error(node, "forbidden-expression", f"{_describe(node)} is not allowed here")

    def attribute(self, node: ast.expr, owner: ast.Name, attribute: str) -> _Run:
        self.need_bound(owner)
        name, known = owner.id, self.scope[owner.id]
        if attribute not in known:
            offset, length = self.span(node)
            offset, length = offset + length - len(attribute), len(attribute)
            message = f"'{name}' has no attribute '{attribute}'"
            raise ExpressionError("unknown-attribute", message, offset, length, attribute, known)
        self.attributes.append((name, attribute))

        def read(given: Given) -> AttributeValue:
            attributes = given.values.get(name)
            if attributes is None:
                raise self.failed(node, f"'{name}' is absent here; guard it with present({name})")
            value = attributes.get(attribute)
            if value is None:
                raise self.failed(node, f"the operator has no attribute '{attribute}'")
            return value

        return read

    def applied(
        self,
        node: ast.expr,
        function: Callable[..., _Value],
        parts: Sequence[_Run],
        *,
        numeric: bool = False,
    ) -> _Run:
        """A function of some values."""

        def run(given: Given) -> _Value:
            values = [part(given) for part in parts]
            # "a" * 10**9 and "%9999d" % 1 are arithmetic to Python; numbers cannot explode.
            for value in values if numeric else ():
                if not isinstance(value, int | float):
                    raise self.failed(node, f"arithmetic on {value!r}, which is not a number")
            return self.guarded(node, function, *values)

        return run

    def compared(
        self,
        node: ast.expr,
        links: Sequence[Callable[..., bool]],
        parts: Sequence[_Run],
        given: Given,
    ) -> bool:
        """The truth of a chain of comparisons, read up to the first that is false."""
        left = parts[0](given)
        for link, part in zip(links, parts[1:], strict=True):
            right = part(given)
            if not self.guarded(node, link, left, right):
                return False
            left = right
        return True

    def guarded(self, node: ast.expr, function: Callable[..., _Value], *values: _Value) -> _Value:
        try:
            return function(*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            shown = ", ".join(map(repr, values))
            raise self.failed(node, f"{error} (on {shown})") from None

    def check_call(self, node: ast.Call, name: str) -> None:
        if name not in _FUNCTIONS:
            offset, length = self.span(node.func)
            known = (*_FUNCTIONS, *_OF_NAMES)
            message = f"unknown function '{name}'"
            raise ExpressionError("unknown-function", message, offset, length, name, known)
        self.no_keywords(node, name)
        _, fewest, most = _FUNCTIONS[name]
        if not fewest <= len(node.args) <= most:
            wanted = str(fewest) if fewest == most else f"at least {fewest}"
            message = f"{name} takes {wanted} arguments, not {len(node.args)}"
            raise self.error(node, "bad-expression", message)

    def bound_argument(self, node: ast.Call, name: str) -> str:
        """The operator that ``present`` or ``count`` is about."""
        self.no_keywords(node, name)
        match node.args:
            case [ast.Name() as owner]:
                self.need_bound(owner)
                return owner.id
        example = f"; write {name}({next(iter(self.scope))}), say" if self.scope else ""
        raise self.error(node, "bad-expression", f"{name} takes one bound name{example}")

    def no_keywords(self, node: ast.Call, name: str) -> None:
        if node.keywords:
            raise self.error(node, "forbidden-expression", f"{name} takes no keyword arguments")

    def need_bound(self, node: ast.Name) -> None:
        if node.id not in self.scope:
            known = ", ".join(f"'{name}'" for name in self.scope)
            message = f"'{node.id}' is not bound" + (f"; this rule binds {known}" if known else "")
            raise ExpressionError("unbound-name", message, *self.span(node), node.id, self.scope)

    def error(self, node: ast.expr, code: str, message: str) -> ExpressionError:
        return ExpressionError(code, message, *self.span(node))

    def failed(self, node: ast.expr, message: str) -> ExpressionError:
        return self.error(node, "expression-failed", message)

    def span(self, node: ast.expr) -> tuple[int, int]:
        # The AST counts UTF-8 bytes, an editor counts characters.
        body = self.text[self.start :].encode("utf-8", "surrogatepass")
        end = node.end_col_offset if node.end_col_offset is not None else node.col_offset + 1
        first, last = (
            len(body[:offset].decode("utf-8", "surrogatepass")) for offset in (node.col_offset, end)
        )
        return self.start + first, max(1, last - first)


def _until(stop_at: bool, operands: Sequence[_Run], given: Given) -> _Value:
    """The first operand that decides an ``or`` (true) or an ``and`` (false), or the last."""
    result: _Value = None
    for operand in operands:
        result = operand(given)
        if bool(result) == stop_at:
            break
    return result


def _describe(node: ast.expr) -> str:
    match node:
        case ast.BinOp(op=ast.Pow()):
            return "'**'"
        case ast.Compare():
            return "'is'"
        case ast.Attribute():
            return "an attribute of an attribute"
        case ast.Constant():
            return f"a literal such as {node.value!r}"
    words = {
        "IfExp": "'if ... else'",
        "NamedExpr": "':='",
        "Subscript": "indexing",
        "Call": "calling anything but a named function",
        "Lambda": "'lambda'",
        "JoinedStr": "an f-string",
        "Starred": "'*'",
    }
    kind = type(node).__name__
    return words.get(kind, f"this ({kind})")
