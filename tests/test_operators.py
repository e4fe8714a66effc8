"""What is known of a kind of operators stands in its file, and its words are those of the rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.operators.modules import KINDS, canonical_weight, kind_of, parse_shape, shape_of
from fxcompress.operators.shape import Shape, channels_of, extents_of
from fxcompress.operators.words import KINDS as WORDS
from fxcompress.operators.words import OPERATORS
from fxcompress.rules.language.vocabulary import OPERATORS as VOCABULARY
from tests.convolutions import CASES, build

ROOT = Path(fxcompress.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent.name != "operators")

CONVOLUTIONS = {op for op in OPERATORS if op.startswith("conv")}
CLASSES = {"Linear", "Embedding", "_ConvNd", "Conv1D"} | {
    name for name in dir(nn) if name.startswith("Conv")
}
SHAPES = {"LinearShape", "ConvShape", "EmbeddingShape"}


def told_apart(tree: ast.AST) -> Iterator[str]:
    """Where code asks of which kind an operator is, or lists those of a kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            names = {
                each.attr for each in ast.walk(node.args[1]) if isinstance(each, ast.Attribute)
            }
            names |= {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
            if names & (CLASSES | SHAPES):
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
            texts = {each.value for each in ast.walk(node) if isinstance(each, ast.Constant)}
            if len(texts & CONVOLUTIONS) > 1:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom) and {each.name for each in node.names} & {"_ConvNd"}:
            yield f"{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_kinds_are_told_apart_in_their_files_only(path: Path) -> None:
    assert not [*told_apart(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(shape, ConvShape)",
        "isinstance(module, (nn.Linear, Other))",
        "issubclass(cls, torch.nn.modules.conv._ConvNd)",
        "x = {'conv1d', 'conv2d'}",
        "x = {'conv1d': 1, 'conv_transpose2d': 2}",
        "from torch.nn.modules.conv import _ConvNd",
    ],
)
def test_it_would_be_seen(code: str) -> None:
    assert [*told_apart(ast.parse(code))]


def test_it_sees_nothing_else() -> None:
    code = "isinstance(x, Shape); y = ('conv1d', 'linear'); isinstance(x, nn.Module)"
    assert not [*told_apart(ast.parse(code))]


def modules() -> list[nn.Module]:
    others = [nn.Linear(3, 5), nn.Linear(5, 3, bias=False), nn.Embedding(7, 4)]
    return [*others, *(build(case).float() for case in CASES.values())]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_words_are_those_of_the_kind(module: nn.Module) -> None:
    kind = kind_of(module)
    assert kind is not None
    assert kind.is_plain(module)
    shape = shape_of(module)
    (words,) = (each for each in WORDS if each.name == kind.name)
    assert kind.op(module) == shape.op
    assert OPERATORS[shape.op] is words
    assert shape.takes == words.takes
    assert len(shape.kernel_size) == words.ops[shape.op]
    found = kind.attributes(module, (), {})
    assert found == shape.attributes
    assert {*found, "dtype"} == {*words.attributes} == {*VOCABULARY[shape.op]}


def test_every_operator_of_the_rules_has_a_kind() -> None:
    assert VOCABULARY.keys() == OPERATORS.keys()
    assert [kind.name for kind in KINDS] == [words.name for words in WORDS]
    assert {kind_of(module).op(module) for module in modules()} <= OPERATORS.keys()  # type: ignore[union-attr]


@pytest.mark.parametrize("module", modules(), ids=str)
def test_a_shape_describes_its_module(module: nn.Module) -> None:
    shape: Shape = shape_of(module)
    text, bias = str(shape), shape.bias
    assert parse_shape(text, bias, shape.dtype) == shape
    assert shape_of(shape.bare()) == shape
    assert shape.stored_size == tuple(module.weight.shape)
    weight = canonical_weight(module)
    torch.testing.assert_close(shape.stored(weight), module.weight)
    groups, m, n = shape.matrix
    assert weight.numel() == groups * m * n == shape.weights
    applied = shape.counted_on(16, ((2, *(9 for _ in shape.kernel_size)),))
    x, (more,) = applied.example(), applied.examples(torch.Generator())
    assert module(x).shape[channels_of(shape)] == shape.out_features
    assert module(more).dim() >= (extents_of(shape) or 0) + 1


def test_other_modules_have_no_kind() -> None:
    assert kind_of(nn.LayerNorm(3)) is None
    with pytest.raises(ValueError, match="no weight that is a matrix"):
        shape_of(nn.LayerNorm(3))
