"""Data as people have them, what a model is worth on them, and the last words of a run."""

from __future__ import annotations

import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import nn

from fxcompress.cli.data import Cut, Inputs, load_data, without_labels
from fxcompress.cli.evaluating import evaluate
from fxcompress.cli.models import load_model
from fxcompress.cli.terminal import within
from fxcompress.errors import CalibrationError, LoadError
from tests.test_cli import LLAMA, NET, TEXT, _Run, place, run

__all__ = ["place", "run"]  # fixtures

X = torch.randn(10, 4)
Y = torch.arange(10) % 3


def write(path: Path) -> None:
    np.save(path / "x.npy", X.double().numpy())
    np.savez(path / "xy.npz", x=X.numpy(), y=Y.numpy())
    torch.save(X, path / "x.pt")
    torch.save({"x": X, "targets": Y}, path / "xy.pt")
    save_file({"images": X}, path / "x.safetensors")


@pytest.mark.parametrize("name", ["x.npy", "x.pt", "x.safetensors"])
def test_tensors_in_files(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    batches = list(load_data(str(tmp_path / name), "file.py:net", Cut(rows=4)) or ())
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat(batches), X)


@pytest.mark.parametrize("name", ["xy.npz", "xy.pt"])
def test_tensors_with_labels(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    pairs = load_data(str(tmp_path / name), "file.py:net", Cut(rows=4))
    assert pairs is not None
    assert torch.equal(torch.cat([y for _, y in pairs]), Y)
    inputs = without_labels(pairs, nn.Linear(4, 3))
    assert torch.equal(torch.cat(list(inputs)), X)
    assert torch.equal(torch.cat(list(inputs)), X)  # again


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"

    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(mark),)

    torch.save({"x": Bad()}, tmp_path / "bad.pt")
    np.save(tmp_path / "bad.npy", np.array([Bad()], dtype=object), allow_pickle=True)
    for name in ("bad.pt", "bad.npy"):
        with pytest.raises(LoadError, match="cannot read tensors"):
            load_data(str(tmp_path / name), "file.py:net", Cut())
    assert not mark.exists()


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    torch.save({"x": X, "y": Y[:3]}, tmp_path / "x.pt")
    with pytest.raises(LoadError, match="a row for every sample; their first extents differ"):
        load_data(str(tmp_path / "x.pt"), "file.py:net", Cut())


def test_pairs_of_a_generator_are_gone_through_once() -> None:
    inputs = without_labels(((X, Y) for _ in range(3)), nn.Linear(4, 3))
    assert isinstance(inputs, Inputs)
    assert len(list(inputs)) == 3


class Two(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y[:, None]


def test_a_model_of_two_arguments_gets_both() -> None:
    pairs = [(X, Y)]
    assert without_labels(pairs, Two()) is pairs


def test_records_and_lines_of_json(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    text = Path("text.txt").read_text().split()
    records = [{"text": " ".join(text[at : at + 50])} for at in range(0, 200, 50)]
    Path("records.jsonl").write_text("\n".join(map(json.dumps, records)))
    Path("records.py").write_text(f"def records(): return {records!r}\n")
    plain = load_data("text.txt", "llama", Cut(4, 20))
    for source in ("records.jsonl", "records.py:records"):
        found = load_data(source, "llama", Cut(4, 20))
        assert found is not None
        assert plain is not None
        for one, other in zip(found, plain, strict=True):
            assert torch.equal(one["input_ids"], other["input_ids"])
    Path("records.jsonl").write_text('{"txt": "a"}\n')
    with pytest.raises(LoadError, match=r"record 0 of records.jsonl has no 'text'"):
        load_data("records.jsonl", "llama", Cut())


def test_folders_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, shade in [("cat", 0), ("dog", 255)]:
        (tmp_path / label).mkdir()
        for number in range(3):
            image.new("RGB", (6, 5), (shade, 0, 0)).save(tmp_path / label / f"{number}.png")
    batches = list(load_data(str(tmp_path), "file.py:net", Cut(rows=4)) or ())
    assert [len(x) for x, _ in batches] == [4, 2]
    images, labels = batches[0]
    assert images.shape == (4, 3, 5, 6)
    assert torch.equal(labels, torch.tensor([0, 0, 0, 1]))
    assert torch.equal(images[:, 0, 0, 0], labels.float())
    image.new("RGB", (9, 9)).save(tmp_path / "cat" / "large.png")
    with pytest.raises(typer.BadParameter, match="the images have 2 sizes"):
        load_data(str(tmp_path), "file.py:net", Cut())


# ---- evaluation -----------------------------------------------------------------------


def test_accuracy_against_counting() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    hits = sum(int(model(x[None]).argmax()) == int(y) for x, y in zip(X, Y, strict=True))
    found = evaluate(model, [(X[:4], Y[:4]), (X[4:], Y[4:])])
    assert found == {"accuracy": hits / 10}


class Tokens(nn.Module):
    """Scores of the next token from the token, without a context."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 7)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.table(input_ids)


def test_perplexity_against_a_sum_token_by_token() -> None:
    model = Tokens()
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    seen = [(1, 2), (2, 3), (3, 4), (5, 6)]
    weight = model.table.weight.detach().double()
    lost = [-float(F.log_softmax(weight[first], 0)[second]) for first, second in seen]
    found = evaluate(model, [{"input_ids": ids, "attention_mask": mask}])
    assert found["perplexity"] == pytest.approx(math.exp(sum(lost) / 4), rel=1e-6)


def test_what_cannot_be_evaluated() -> None:
    with pytest.raises(CalibrationError, match="--evaluate knows language models"):
        evaluate(nn.Linear(4, 3), [X])
    with pytest.raises(CalibrationError, match="nothing to evaluate on"):
        evaluate(nn.Linear(4, 3), [])


def test_evaluate_and_report(run: _Run, tmp_path: Path) -> None:
    out = tmp_path / "o"
    shown, _ = run("compile", "rules.yaml", *TEXT, "--evaluate", "text.txt", "-o", out)
    assert "perplexity" in shown.splitlines()[-2]
    assert f"saved to {out} in " in shown.splitlines()[-1]
    again, _ = run("report", out)
    assert again.splitlines() == shown.splitlines()[:-1]
    found = json.loads(run("report", out, "--json")[0])
    assert found["evaluation"]["before"].keys() == {"perplexity"}
    (out / "evaluation.json").write_text("[]")
    assert "does not hold what --evaluate writes" in run.fails("report", out)
    shown, _ = run("sweep", "rules.yaml", *TEXT, "--keeps", "0.9", "--evaluate", "text.txt")
    assert "perplexity" in shown


def test_json_throughout(run: _Run, tmp_path: Path) -> None:
    found = json.loads(run("compile", "rules.yaml", *NET, "-o", tmp_path / "o", "--json")[0])
    assert found["saved"] == str(tmp_path / "o")
    model = ("--model", "functions.py:net")
    assert json.loads(run("load", tmp_path / "o", *model, "--json")[0])["sites"]
    assert json.loads(run("check", "rules.yaml", "--json")[0])["rules"] == ["all"]
    assert "decoder" in json.loads(run("presets", "--json")[0])


def test_overrides(run: _Run) -> None:
    shown, _ = run("plan", "rules.yaml", *NET, "--exclude", "0", "--metric", "activation",
                   "--seed", "3", "--keep", "0.7", "--json")  # fmt: skip
    plan = json.loads(shown)
    assert [site["name"] for site in plan["sites"]] == ["2"]
    assert (plan["metric"], plan["calibration"]["seed"]) == ("activation", 3)
    assert plan["budget"]["keep"] == 0.7


def test_type_and_device(run: _Run) -> None:
    shown, _ = run("plan", "rules.yaml", *LLAMA, "--dtype", "bfloat16", "--device", "cpu", "--json")
    assert {site["dtype"] for site in json.loads(shown)["sites"]} == {"bfloat16"}
    assert "is none of" in run.fails("plan", "rules.yaml", *LLAMA, "--dtype", "int8", code=2)
    assert "--device nowhere" in run.fails(
        "plan", "rules.yaml", *LLAMA, "--device", "nowhere", code=2
    )


# ---- messages, the terminal, interruptions --------------------------------------------


def test_words_of_other_tools(run: _Run, place: Path, tmp_path: Path) -> None:
    plan = ("plan", "rules.yaml")
    assert "80 % is written 0.8" in run.fails(*plan, *NET, "--keep", "80%", code=2)
    assert "did you mean 'kfac'" in run.fails(*plan, *NET, "--metric", "fisher")
    hub = run.fails(*plan, "--model", "HuggingFaceTB/SmolLM2-135M", *NET[2:], code=2)
    assert "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M" in hub
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((place / "llama" / name).read_bytes())
    text = run.fails(*plan, "--model", tmp_path, "--data", "text.txt", code=2)
    assert "has no tokenizer, which a text file needs" in text


def test_every_help_has_an_example(run: _Run) -> None:
    shown, _ = run("-h")
    assert "Example: fxcompress compile" in shown
    verbs = ("compile", "plan", "sweep", "explain", "diff", "report", "load", "check", "presets")
    for verb in (*verbs, "test", "schema"):
        assert f"Example: fxcompress {verb}" in run(verb, "-h")[0], verb


def test_no_warning_of_a_library_is_shown(run: _Run, place: Path) -> None:
    (place / "noisy.py").write_text(
        "import warnings\nfrom functions import *\n"
        "def noisy():\n    warnings.warn('old', DeprecationWarning)\n"
        "    warnings.warn('of a library', UserWarning)\n    return net()\n"
    )
    (place / "functions").mkdir(exist_ok=True)
    (place / "functions" / "__init__.py").write_text((place / "functions.py").read_text())
    _, err = run("plan", "rules.yaml", "--model", "noisy.py:noisy", *NET[2:])
    assert err == ""


def test_ctrl_c_ends_with_one_line(place: Path) -> None:
    (place / "slow.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "def net():\n    Path('started').touch()\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "fxcompress", "compile", "rules.yaml", "-o", "never"]
    running = subprocess.Popen(
        [*command, "--model", "slow.py:net"], cwd=place, stderr=subprocess.PIPE, text=True
    )
    waited = time.monotonic()
    while not (place / "started").exists() and time.monotonic() - waited < 60:
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert running.returncode == 130
    assert err == "interrupted; nothing was written\n"


def test_lines_fit_the_terminal() -> None:
    line = "- up_proj             linear 576→1536         884,736       KL 0.0004..0.0031"
    pieces = within(line, 40)
    assert all(len(piece) <= 40 for piece in pieces)
    assert " ".join(pieces).split() == line.split()
    assert within(line, 200) == [line]


@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_on_a_terminal(
    run: _Run, place: Path, tmp_path: Path, environment: dict[str, str], coloured: bool
) -> None:
    run("compile", "rules.yaml", *NET, "-o", tmp_path / "o")
    ours, theirs = pty.openpty()
    base = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    environment = {**base, "TERM": "xterm-256color", "COLUMNS": "60", **environment}
    done = subprocess.Popen(
        [sys.executable, "-m", "fxcompress", "diff", str(tmp_path / "o")],
        stdout=theirs, env=environment, cwd=place,
    )  # fmt: skip
    os.close(theirs)
    text = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        text += piece
    assert done.wait() == 0
    assert (b"\x1b[31m- " in text) == coloured
    assert (b"\x1b[" in text) == coloured


def test_a_model_by_a_wrong_name_is_not_looked_up() -> None:
    with pytest.raises(typer.BadParameter, match="nothing is downloaded here"):
        load_model("org/name")
