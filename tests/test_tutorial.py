"""The tutorial notebook runs from its first cell to its last."""

from __future__ import annotations

import os

import pytest

from tests.documents import ROOT

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")


def test_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    book = nbformat.read(ROOT / "examples" / "tutorial.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells)  # nothing that was once true
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    nbclient.NotebookClient(book, timeout=300, kernel_name="python3").execute()
    shown = [
        output["data"]["text/html"]
        for cell in book.cells
        for output in cell.get("outputs", ())
        if "text/html" in output.get("data", {})
    ]
    kinds = [page.partition("<summary>")[2].partition(":")[0] for page in shown]
    assert kinds == ["Explanation", "Plan", "Diff", "Fidelity", "Sweep"]
    assert not any("<script" in page for page in shown)
