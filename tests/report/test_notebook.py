"""Results in a notebook or at a prompt: one line, small pieces of HTML, tables, progress."""

from __future__ import annotations

import builtins
import sys
import types
import warnings
from html.parser import HTMLParser
from typing import Any

import pytest
from torch import nn

import fxcompress
from fxcompress.errors import (
    CalibrationError,
    FxcompressWarning,
    RecordError,
    RewriteError,
    SaveError,
)
from fxcompress.notebook import Shown, in_notebook
from fxcompress.progress import stages
from tests.small import data, net, rules


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxcompressWarning)
        small = fxcompress.compile(model, rules(0.5), data(), progress=False)
        fxcompress.measure(model, small, data(seed=2), progress=False)
    return model, small


def results(pair: tuple[nn.Module, nn.Module]) -> list[Any]:
    model, small = pair
    plan = fxcompress.plan_of(small)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FxcompressWarning)
        swept = fxcompress.sweep(model, rules(), data(), keeps=(0.9, 0.8), progress=False)
    explained = fxcompress.explain(model, rules(), data()[0])
    return [plan, fxcompress.diff(small), plan.fidelity, swept, explained]


class Tags(HTMLParser):
    """The tags of a piece of HTML."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.add(tag)


def test_every_result_is_one_line_and_small(pair: tuple[nn.Module, nn.Module]) -> None:
    for result in results(pair):
        assert repr(result).startswith(f"<{type(result).__name__}: ")
        assert "\n" not in repr(result)
        assert len(repr(result)) < 200
        page = result._repr_html_()
        tags = Tags()
        tags.feed(page)
        assert tags.seen <= {"details", "summary", "pre", "span"}
        assert result.headline.partition(" ")[0] in page
        assert len(page) < 20_000
        assert type(result).__name__ in fxcompress.__all__


def test_what_is_shown_is_escaped_and_cut() -> None:
    class Long(Shown):
        headline = "<script>alert(1)</script>"

        def __str__(self) -> str:
            return "\n".join(["- <b>", *map(str, range(1000))])

    page = Long()._repr_html_()
    assert "<script" not in page
    assert "<b>" not in page
    assert "and 801 more lines" in page
    assert "999" not in page


def test_the_worst_sites_come_first(pair: tuple[nn.Module, nn.Module]) -> None:
    plan = fxcompress.plan_of(pair[1])
    assert plan.fidelity is not None
    measured = {one.name: one.measured for one in plan.fidelity.sites}
    found = [measured[site.name] for site in plan.worst(10)]
    assert found == sorted(measured.values(), reverse=True)
    assert [site.name for site in plan.worst(1)] == [max(measured, key=lambda n: measured[n])]
    alone = plan.model_copy(update={"fidelity": None})
    predicted = [site.predicted for site in alone.worst(10)]
    assert predicted == sorted((site.predicted for site in plan.rewritten), reverse=True)
    assert plan.worst(0) == ()


def test_a_table_for_pandas(
    pair: tuple[nn.Module, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    plan = fxcompress.plan_of(pair[1])
    table = plan.to_dataframe()
    assert list(table["name"]) == [site.name for site in plan.sites]
    assert table["parameters_after"].sum() == sum(site.after.parameters for site in plan.sites)
    original = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return original(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        plan.to_dataframe()


def test_diff_of_one_model(pair: tuple[nn.Module, nn.Module]) -> None:
    model, small = pair
    assert str(fxcompress.diff(small)) == str(fxcompress.diff(model, small))
    with pytest.raises(RewriteError, match="did not come from"):
        fxcompress.diff(model)
    with pytest.raises(RewriteError, match=r"the first model is the compressed one.*diff\(model"):
        fxcompress.diff(small, model)


def test_arguments_of_another_kind(pair: tuple[nn.Module, nn.Module], tmp_path: Any) -> None:
    model, small = pair
    with pytest.raises(CalibrationError, match=r"not the text 'book.txt': read the file"):
        fxcompress.plan(model, rules(), "book.txt")
    for texts in (["one", "two"], [["one", "two"]]):
        with pytest.raises(RecordError, match="The batch is text, and models take tokens"):
            fxcompress.plan(model, rules(), texts)
    with pytest.raises(RecordError, match=r"not a str .'org/name'.: load it first"):
        fxcompress.plan("org/name", rules(), data())  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=r"model\(batch\[0\]\)"):
        fxcompress.plan(model, rules(), [(x, x) for x in data()])
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file: give a directory"):
        fxcompress.save(small, tmp_path / "file")


def test_progress_in_a_notebook(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shell = type("ZMQInteractiveShell", (), {})()
    fake = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert in_notebook()
    with stages() as progress:
        progress.stage("record")
    assert capsys.readouterr().err.startswith("record  ")
    with stages(False) as progress:
        progress.stage("record")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(fake, "get_ipython", lambda: None)
    assert not in_notebook()
