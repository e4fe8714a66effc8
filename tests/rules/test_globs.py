"""Globs over module paths."""

from __future__ import annotations

import time

import pytest

from fxcompress.rules.language.globs import GlobError, compile_globs, expand


@pytest.mark.parametrize(
    ("glob", "path", "expected"),
    [
        ("*.mlp.*", "model.layers.0.mlp.up_proj", True),
        ("*.mlp.*", "mlp.up_proj", False),
        ("{,*.}mlp.*", "mlp.up_proj", True),
        ("*.{q,k}_proj", "a.q_proj", True),
        ("*.{q,k}_proj", "a.v_proj", False),
        ("{a{b,c},d}", "ac", True),
        ("layers.[0-3].fc", "layers.3.fc", True),
        ("layers.[!0-3].fc", "layers.3.fc", False),
        ("layers.?.fc", "layers.10.fc", False),
        ("[{]a", "{a", True),
        ("*.FC", "a.fc", False),
        ("fc", "fc2", False),
        ("*", "", True),
        ("a.b", "axb", False),
    ],
)
def test_matching(glob: str, path: str, expected: bool) -> None:
    assert bool(compile_globs([glob]).match(path)) is expected


@pytest.mark.parametrize("glob", ["", "{a", "a}", "[a", "{a,b" * 3, "{a,b}" * 9, "x" * 501])
def test_bad_globs(glob: str) -> None:
    with pytest.raises(GlobError):
        compile_globs([glob])


def test_expansion_keeps_the_order() -> None:
    assert expand("{a,b}.{c,d}") == ("a.c", "a.d", "b.c", "b.d")


def test_many_stars_do_not_backtrack() -> None:
    start = time.perf_counter()
    assert not compile_globs(["*a" * 60 + "b"]).match("a" * 400)
    assert time.perf_counter() - start < 1
