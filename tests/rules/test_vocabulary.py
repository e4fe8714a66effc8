"""The words of the language against what recording a model gives."""

from __future__ import annotations

import pytest

from fxcompress.graph.attributes import _ARGUMENTS
from fxcompress.graph.names import MODULES
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, COMMUTATIVE, PLAIN_OPERATORS


def test_operators_of_known_modules_have_a_word() -> None:
    assert set(MODULES.values()) <= ALL_OPERATORS.keys()


@pytest.mark.parametrize("op", sorted(_ARGUMENTS))
def test_attributes_are_those_of_recorded_operators(op: str) -> None:
    assert {argument.name for argument in _ARGUMENTS[op]} == set(PLAIN_OPERATORS[op])


def test_no_attributes_are_made_up() -> None:
    with_attributes = {op for op, attributes in PLAIN_OPERATORS.items() if attributes}
    assert not with_attributes - set(_ARGUMENTS)


def test_commutative_operators_have_a_word() -> None:
    assert PLAIN_OPERATORS.keys() >= COMMUTATIVE
