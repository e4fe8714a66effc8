"""The language of ``where``: Python's own semantics on what is allowed, and nothing else."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxcompress.errors import RuleError
from fxcompress.rules.language.expressions import (
    ExpressionError,
    evaluate,
    evaluate_number,
    parse_cost,
    parse_expression,
)

VALUES = {"a": 3, "b": -2, "c": 2.5, "yes": True, "no": False, "word": "float32", "size": (3, 3)}
SCOPE = {"fc": set(VALUES)}


class Namespace:
    def __init__(self) -> None:
        self.__dict__.update(VALUES)


def same(*values: object) -> bool:
    return all(value == values[0] for value in values)


def truth(text: str) -> bool:
    return evaluate(parse_expression(text, SCOPE), {"fc": VALUES})


numbers = st.recursive(
    st.sampled_from(["fc.a", "fc.b", "fc.c", "0", "1", "7", "2.5", "len(fc.size)"]),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "//", "%"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        )
        | st.tuples(st.sampled_from(["-", "+", "abs"]), inner).map(lambda p: f"{p[0]}({p[1]})")
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(
            lambda p: f"{p[0]}({p[1]}, {p[2]})"
        )
    ),
    max_leaves=4,
)
comparison = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])
conditions = st.recursive(
    st.sampled_from(["fc.yes", "fc.no", "True", "'float' in fc.word", "3 in fc.size"])
    | st.tuples(numbers, comparison, numbers, comparison, numbers).map(" ".join)
    | st.tuples(numbers, comparison, numbers).map(" ".join)
    | st.tuples(numbers, st.sampled_from(["in", "not in"]), numbers, numbers).map(
        lambda p: f"{p[0]} {p[1]} ({p[2]}, {p[3]})"
    )
    | st.tuples(numbers, numbers).map(lambda p: f"same({p[0]}, {p[1]})"),
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(
            lambda p: f"({p[0]}) {p[1]} ({p[2]})"
        )
        | inner.map(lambda c: f"not ({c})")
    ),
    max_leaves=3,
).filter(lambda text: len(text) <= 500)


@settings(max_examples=200, deadline=None)
@given(conditions)
def test_agrees_with_python(text: str) -> None:
    names = {"fc": Namespace(), "same": same, "min": min, "max": max, "abs": abs, "len": len}
    try:
        expected = eval(text, {"__builtins__": {}}, names)
    except ArithmeticError:
        with pytest.raises(ExpressionError):
            truth(text)
    else:
        assert truth(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fc.size == [3, 3]", True),
        ("fc.size in [[1, 1], [3, 3]]", True),
        ("fc.word == 'float32' and not fc.no", True),
        ("0 < fc.a <= 2", False),
        ("fc.yes or 1 / 0 > 1", True),
        ("  fc.yes  # a comment", True),
        ("fc.a >\n 2", True),
        ("same(fc.a, 3, 3.0)", True),
        ("fc.word != None", True),
    ],
)
def test_truth(text: str, expected: bool) -> None:
    assert truth(text) is expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "fc.__class__",
        "fc.a.b > 1",
        "fc.size[0] > 1",
        "2 ** 9 > 1",
        "[x for x in fc.size] == 1",
        "(lambda: 1)() == 1",
        "fc.a if fc.yes else fc.b",
        "(x := 3) > 1",
        "f'{fc.a}' == '3'",
        "min(*fc.size) > 1",
        "min(fc.a, key=abs) > 1",
        "open('f') == 1",
        "fc == 1",
        "fc.a is 3",
        "{1: 2} == 1",
        "{1} == 1",
        "~fc.a == 1",
        "fc.a & 1 == 1",
        "fc.a << 3 == 1",
        "...",
        "b'x' == 'x'",
        "1j == 1",
        "await fc.a",
        "yield",
        "fc.a = 3",
        "import os",
        "",
        "   ",
        "fc.a >",
        "(" * 300,
        "-" * 450 + "1",
        "not " * 40 + "fc.yes",
        "1 + " * 200 + "1 > 0",
        "abs() > 1",
        "abs(1, 2) > 1",
        "same(1)",
        "len > 1",
        "\0",
    ],
)
def test_forbidden(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse_expression(text, SCOPE)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("fc.a / 0 > 1", "division by zero"),
        ("fc.word + 'x' == 'x'", "not a number"),
        ("fc.word * 999999999 == 'x'", "not a number"),
        ("fc.word % 3 == 'x'", "not a number"),
        ("-fc.word == 'x'", "not a number"),
        ("fc.word < 3", "not supported between"),
        ("3 in fc.a", "not iterable"),
        ("len(fc.a) > 1", "has no len"),
        ("abs(fc.word) > 1", "bad operand"),
        ("min(()) > 1", "empty"),
        ("fc.a + 1", "neither true nor false"),
        ("fc.a and fc.b", "neither true nor false"),
    ],
)
def test_failures_at_run_time_are_rule_errors(text: str, part: str) -> None:
    with pytest.raises(RuleError, match=part):
        truth(text)


GUARDED = {"fc": {"a", "b"}, "bn": {"eps"}}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("present(fc)", True),
        ("present(bn)", False),
        ("not present(bn) or bn.eps > 1", True),
        ("present(bn) and bn.eps > 1", False),
        ("count(fc) == 3 and count(bn) == 0", True),
        ("same(count(fc), 3)", True),
    ],
)
def test_present_and_count(text: str, expected: bool) -> None:
    values = {"fc": {"a": 3}, "bn": None}
    assert evaluate(parse_expression(text, GUARDED), values, {"fc": 3}) is expected


def test_what_is_no_group_counts_once() -> None:
    assert evaluate(parse_expression("count(fc) == 1", GUARDED), {"fc": {}})


@pytest.mark.parametrize("text", ["present(fc.a)", "present()", "present(1)", "count(fc, bn)"])
def test_present_and_count_take_a_name(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"takes one bound name; write .*\(fc\), say"):
        parse_expression(text, GUARDED)


def test_an_attribute_of_what_is_absent() -> None:
    expression = parse_expression("fc.a > 1 and bn.eps > 1", GUARDED)
    with pytest.raises(ExpressionError, match=r"'bn' is absent here; guard it with present\(bn\)"):
        evaluate(expression, {"fc": {"a": 3}, "bn": None})


def test_an_attribute_without_a_value() -> None:
    with pytest.raises(ExpressionError, match="no attribute 'a'"):
        evaluate(parse_expression("fc.a > 1", GUARDED), {"fc": {"a": None}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [("r * (fc.a + fc.b)", 80), ("r", 16), ("fc.a // 2 + 0.5", 1.5), ("min(r, fc.b) * 2", 4)],
)
def test_costs(text: str, expected: float) -> None:
    assert evaluate_number(parse_cost(text, GUARDED), {"fc": {"a": 3, "b": 2}}, 16) == expected


def test_a_cost_is_a_number() -> None:
    with pytest.raises(ExpressionError, match="gives True, which is not a number"):
        evaluate_number(parse_cost("r > 1", GUARDED), {}, 16)


def test_the_rank_is_for_costs_only() -> None:
    with pytest.raises(ExpressionError, match="'r' is not bound"):
        parse_expression("r > 1", GUARDED)


def test_an_attribute_that_the_operator_lacks() -> None:
    with pytest.raises(ExpressionError, match="no attribute 'a'") as caught:
        evaluate(parse_expression("1 < fc.a", SCOPE), {"fc": {}})
    assert (caught.value.offset, caught.value.length) == (4, 4)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="fc.ab123<>=!+-*/%()[]{}'\", andornotinminmaxé\\\n", max_size=60))
def test_any_text_is_an_expression_or_an_error(text: str) -> None:
    failure: ExpressionError | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            evaluate(parse_expression(text, SCOPE), {"fc": VALUES})
        except ExpressionError as error:
            failure = error
    assert failure is None or 0 <= failure.offset <= len(text)
