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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

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


@dataclass(frozen=True)
class Expression:
    """A checked expression.

    Attributes:
        text: as written.
        tree: its syntax tree, of whitelisted nodes only.
        attributes: the attributes that it reads, in order: ``(("fc", "in_features"),)``.
    """

    text: str
    tree: ast.expr
    attributes: tuple[tuple[str, str], ...]


def parse_expression(text: str, scope: Mapping[str, Collection[str]]) -> Expression:
    """Read and check an expression against the bound names and their attributes.

    >>> parse_expression("c.groups == 1", {"c": {"groups"}}).attributes
    (('c', 'groups'),)

    Raises:
        ExpressionError: not an expression, not allowed, or a name that is not there.
    """
    return _parse(text, scope, frozenset())


def parse_cost(text: str, scope: Mapping[str, Collection[str]]) -> Expression:
    """Read and check an expression that may use the rank, too: :data:`RANK`.

    Raises:
        ExpressionError: as of :func:`parse_expression`.
    """
    return _parse(text, scope, frozenset({RANK}))


_QUIET = threading.Lock()
"""Filters of warnings are the whole process's: two threads that change them restore a wrong one."""


def _parse(text: str, scope: Mapping[str, Collection[str]], numbers: frozenset[str]) -> Expression:
    if len(text) > _MOST_CHARACTERS:
        raise ExpressionError(
            "bad-expression",
            f"an expression of {len(text)} characters; at most {_MOST_CHARACTERS}",
            length=_MOST_CHARACTERS,
        )
    flat = "".join(" " if c in "\r\n" else c for c in text)  # a block scalar may hold line breaks
    body = flat.lstrip()
    checker = _Checker(flat, len(flat) - len(body), scope, numbers)
    if not body:
        raise ExpressionError("bad-expression", "an empty expression", length=len(text))
    try:
        with _QUIET, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "1or 2" and "\d" are only deprecated in Python
            tree = ast.parse(body, mode="eval").body
    except SyntaxError as error:
        offset = min(max((error.offset or 1) - 1, 0), len(body) - 1) + checker.start
        raise ExpressionError(
            "bad-expression", f"not an expression: {error.msg}", offset, 1
        ) from None
    except (ValueError, MemoryError, RecursionError):
        raise ExpressionError("bad-expression", "not an expression", 0, len(text)) from None
    checker.check(tree, 0)
    return Expression(text, tree, tuple(dict.fromkeys(checker.attributes)))


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
    interpreter = _Interpreter(expression, values, counts or {}, {})
    value = interpreter.value(expression.tree)
    if not isinstance(value, bool):
        interpreter.fail(expression.tree, f"gives {value!r}, which is neither true nor false")
    return value


def evaluate_number(expression: Expression, values: Values, rank: int) -> int | float:
    """The value of a cost for given operators at a rank.

    Raises:
        ExpressionError: as of :func:`evaluate`, or a value that is no number.
    """
    interpreter = _Interpreter(expression, values, {}, {RANK: rank})
    value = interpreter.value(expression.tree)
    if isinstance(value, bool) or not isinstance(value, int | float):
        interpreter.fail(expression.tree, f"gives {value!r}, which is not a number")
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
_OF_NAMES = ("present", "count")
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


def _span(text: str, start: int, node: ast.expr) -> tuple[int, int]:
    # The AST counts UTF-8 bytes, an editor counts characters.
    body = text[start:].encode("utf-8", "surrogatepass")
    first = len(body[: node.col_offset].decode("utf-8", "surrogatepass"))
    end = node.end_col_offset if node.end_col_offset is not None else node.col_offset + 1
    last = len(body[:end].decode("utf-8", "surrogatepass"))
    return start + first, max(1, last - first)


@dataclass
class _Checker:
    text: str
    start: int
    scope: Mapping[str, Collection[str]]
    numbers: frozenset[str]

    def __post_init__(self) -> None:
        self.attributes: list[tuple[str, str]] = []

    def check(self, node: ast.expr, depth: int) -> None:
        if depth > _DEEPEST:
            self.fail(node, "bad-expression", f"nested deeper than {_DEEPEST}")
        children: list[ast.expr]
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                children = []
            case ast.Attribute(value=ast.Name()):
                self.check_attribute(node)
                children = []
            case ast.Name(id=name) if name in self.numbers:
                children = []
            case ast.Name():
                children = []
                self.check_name(node)
            case ast.Tuple(elts=children) | ast.List(elts=children):
                pass
            case ast.BoolOp(values=children):
                pass
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                children = [operand]
            case ast.BinOp(op=arithmetic) if type(arithmetic) in _ARITHMETIC:
                children = [node.left, node.right]
            case ast.Compare() if all(type(op) in _COMPARISONS for op in node.ops):
                children = [node.left, *node.comparators]
            case ast.Call(func=ast.Name()):
                children = self.check_call(node)
            case _:
                self.fail(node, "forbidden-expression", f"{_describe(node)} is not allowed here")
        for child in children:
            self.check(child, depth + 1)

    def check_attribute(self, node: ast.Attribute) -> None:
        owner = node.value
        assert isinstance(owner, ast.Name)
        if owner.id not in self.scope:
            self.unbound(owner)
        known = self.scope[owner.id]
        if node.attr not in known:
            offset, length = _span(self.text, self.start, node)
            raise ExpressionError(
                "unknown-attribute",
                f"'{owner.id}' has no attribute '{node.attr}'",
                offset + length - len(node.attr),
                len(node.attr),
                node.attr,
                known,
            )
        self.attributes.append((owner.id, node.attr))

    def check_name(self, node: ast.Name) -> NoReturn:
        if node.id not in self.scope:
            self.unbound(node)
        known = sorted(self.scope[node.id])
        example = f"; write {node.id}.{known[0]}, say" if known else ""
        self.fail(node, "forbidden-expression", f"'{node.id}' is an operator, not a value{example}")

    def check_call(self, node: ast.Call) -> list[ast.expr]:
        """The arguments that are expressions themselves."""
        assert isinstance(node.func, ast.Name)
        name = node.func.id
        if name not in _FUNCTIONS and name not in _OF_NAMES:
            offset, length = _span(self.text, self.start, node.func)
            known = (*_FUNCTIONS, *_OF_NAMES)
            raise ExpressionError(
                "unknown-function", f"unknown function '{name}'", offset, length, name, known
            )
        if node.keywords:
            self.fail(node, "forbidden-expression", f"{name} takes no keyword arguments")
        if name in _OF_NAMES:
            if len(node.args) != 1 or not isinstance(node.args[0], ast.Name):
                example = f"; write {name}({next(iter(self.scope))}), say" if self.scope else ""
                self.fail(node, "bad-expression", f"{name} takes one bound name{example}")
            if node.args[0].id not in self.scope:
                self.unbound(node.args[0])
            return []
        _, fewest, most = _FUNCTIONS[name]
        if not fewest <= len(node.args) <= most:
            wanted = str(fewest) if fewest == most else f"at least {fewest}"
            message = f"{name} takes {wanted} arguments, not {len(node.args)}"
            self.fail(node, "bad-expression", message)
        return node.args

    def unbound(self, node: ast.Name) -> NoReturn:
        offset, length = _span(self.text, self.start, node)
        known = ", ".join(f"'{name}'" for name in self.scope)
        raise ExpressionError(
            "unbound-name",
            f"'{node.id}' is not bound" + (f"; this rule binds {known}" if known else ""),
            offset,
            length,
            node.id,
            self.scope,
        )

    def fail(self, node: ast.expr, code: str, message: str) -> NoReturn:
        raise ExpressionError(code, message, *_span(self.text, self.start, node))


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


@dataclass(frozen=True)
class _Interpreter:
    expression: Expression
    values: Values
    counts: Mapping[str, int]
    numbers: Mapping[str, int]

    def value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant():
                return node.value
            case ast.Attribute(value=ast.Name(id=owner), attr=attribute):
                return self.attribute(node, owner, attribute)
            case ast.Name(id=name):
                return self.numbers[name]
            case ast.Tuple(elts=items) | ast.List(elts=items):
                return tuple(self.value(item) for item in items)
            case ast.BoolOp(op=op, values=operands):
                stop_at = isinstance(op, ast.Or)
                result: _Value = None
                for operand in operands:
                    result = self.value(operand)
                    if bool(result) == stop_at:
                        break
                return result
            case ast.UnaryOp(op=sign, operand=operand):
                value = self.value(operand)
                if not isinstance(sign, ast.Not):
                    self.need_numbers(node, value)
                return _UNARY[type(sign)](value)
            case ast.BinOp(op=arithmetic):
                left, right = self.value(node.left), self.value(node.right)
                self.need_numbers(node, left, right)
                return self.guarded(node, _ARITHMETIC[type(arithmetic)], left, right)
            case ast.Compare():
                return self.compare(node)
            case ast.Call(func=ast.Name(id="present"), args=[ast.Name(id=owner)]):
                return self.values.get(owner) is not None
            case ast.Call(func=ast.Name(id="count"), args=[ast.Name(id=owner)]):
                return self.counts.get(owner, int(self.values.get(owner) is not None))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                values = [self.value(argument) for argument in arguments]
                return self.guarded(node, _FUNCTIONS[name][0], *values)
        raise AssertionError(f"an unchecked {type(node).__name__}")

    def attribute(self, node: ast.expr, owner: str, attribute: str) -> AttributeValue:
        attributes = self.values.get(owner)
        if attributes is None:
            self.fail(node, f"'{owner}' is absent here; guard it with present({owner})")
        value = attributes.get(attribute)
        if value is None:
            self.fail(node, f"the operator has no attribute '{attribute}'")
        return value

    def compare(self, node: ast.Compare) -> bool:
        left = self.value(node.left)
        for op, comparator in zip(node.ops, node.comparators, strict=True):
            right = self.value(comparator)
            if not self.guarded(node, _COMPARISONS[type(op)], left, right):
                return False
            left = right
        return True

    def need_numbers(self, node: ast.expr, *values: _Value) -> None:
        # "a" * 10**9 and "%9999d" % 1 are arithmetic to Python; numbers cannot explode.
        for value in values:
            if not isinstance(value, int | float):
                self.fail(node, f"arithmetic on {value!r}, which is not a number")

    def guarded(self, node: ast.expr, function: Callable[..., _Value], *values: _Value) -> _Value:
        try:
            return function(*values)
        except (TypeError, ValueError, ArithmeticError) as error:
            shown = ", ".join(repr(value) for value in values)
            self.fail(node, f"{error} (on {shown})")

    def fail(self, node: ast.expr, message: str) -> NoReturn:
        text = self.expression.text
        start = len(text) - len(text.lstrip())
        raise ExpressionError("expression-failed", message, *_span(text, start, node))
