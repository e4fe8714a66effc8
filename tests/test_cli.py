"""The command line: every verb, and errors in one clean message."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

import fxcompress
from fxcompress import cli
from tests.made_up_times import made_up_times
from tests.zoo import DECODER

MODELS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10)).eval()

def other():
    return nn.Sequential(nn.Linear(8, 8))

def batches():
    torch.manual_seed(1)
    return [torch.randn(64, 24) for _ in range(3)]

def tokens():
    torch.manual_seed(1)
    return [{"input_ids": torch.randint(3, 100, (2, 16))} for _ in range(3)]

def none(): return []
def nothing(): return None
def row(): return torch.randn(4, 24)
def number(): return 3
def broken(): raise KeyError("oh no")
def stops(): raise KeyboardInterrupt
CONSTANT = 3
"""
WORDS = [f"w{i}" for i in range(100)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory with a tokenizer, a text, and a file of functions."""
    path = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**DECODER))
    model.save_pretrained(path / "llama")
    words = Tokenizer(models.WordLevel({w: i + 3 for i, w in enumerate(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(path / "llama")
    text = " ".join(WORDS[i * i % 97] for i in range(200))
    (path / "text.txt").write_text(text)
    (path / "functions.py").write_text(MODELS)
    (path / "bad.py").write_text("def f(:\n")
    (path / "raises.py").write_text("1 / 0\n")
    (path / "rules.yaml").write_text(
        "budget: {keep: 0.5}\n"
        "rules:\n"
        "  - {id: all, match: {node: {op: linear}}, rewrite: {form: pivoted}}\n"
    )
    (path / "wrong.yaml").write_text("budget: {keep: 2}\nrules: [{id: a}]\n")
    (path / "latin.txt").write_bytes(b"caf\xe9")
    (path / "empty").mkdir()
    return path


class _Run:
    def __init__(
        self, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.place, self.monkeypatch, self.capsys = place, monkeypatch, capsys

    def __call__(self, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
        """Standard output and standard error of a command that ends with this code."""
        self.monkeypatch.chdir(self.place)
        self.monkeypatch.setattr(sys, "argv", ["fxcompress", *map(str, arguments)])
        self.capsys.readouterr()
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = self.capsys.readouterr()
        assert (ended.value.code or 0) == code, (out, err)
        assert "Traceback" not in out + err
        return out, err

    def fails(self, *arguments: str | Path, code: int = 1) -> str:
        """The one message of a command that fails; nothing else is printed."""
        out, err = self(*arguments, code=code)
        assert out == ""
        assert err.startswith("error: " if code == 1 else "Usage: ")
        return " ".join(err.replace("│", " ").split())


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> _Run:
    # Wide enough for a message on one line, and not coloured.
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "dumb")
    return _Run(place, monkeypatch, capsys)


NET = ("--model", "functions.py:net", "--data", "functions.py:batches")
LLAMA = ("--model", "llama", "--data", "functions.py:tokens")
TEXT = ("--model", "llama", "--data", "text.txt", "--length", "20")


# ---- verbs ----------------------------------------------------------------------------


WIDTHS = """
budget: {{keep: 0.8}}
metric: {{kind: activation}}
rules:
  - id: hidden
    match: {{node: {{op: linear, name: "*.down_proj"}}}}
    rewrite: {{form: narrow{}}}
"""


def test_compile_to_a_plain_checkpoint(run: _Run, tmp_path: Path) -> None:
    (tmp_path / "equal.yaml").write_text(WIDTHS.format(", group: widths"))
    out, _ = run("compile", tmp_path / "equal.yaml", *TEXT, "--plain", "--out", tmp_path / "o")
    assert "load it with LlamaForCausalLM.from_pretrained(" in out
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert made.config.intermediate_size == made.model.layers[0].mlp.up_proj.out_features
    assert made.config.intermediate_size < DECODER["intermediate_size"]
    transformers.AutoTokenizer.from_pretrained(tmp_path / "o")
    assert {"diff.txt", "diff.html"} <= {path.name for path in (tmp_path / "o").iterdir()}
    _, err = run("compile", "rules.yaml", *LLAMA, "--plain", "--out", tmp_path / "p", code=1)
    assert "has layers that no config of its class has" in err
    assert "with-plan, with its plan" in err
    assert fxcompress.load(tmp_path / "p" / "with-plan") is not None
    run("compile", "rules.yaml", *LLAMA, "--out", tmp_path / "q")
    refused = run.fails("compile", "rules.yaml", *LLAMA, "--plain", "--out", tmp_path / "q")
    assert "holds plan.json of a compressed model" in refused


@pytest.mark.parametrize("arguments", [NET, LLAMA, TEXT])
def test_compile_and_what_it_writes(run: _Run, tmp_path: Path, arguments: Any) -> None:
    out, err = run("compile", "rules.yaml", *arguments, "--out", tmp_path / "o")
    assert "saved to" in out
    shown = [line.split()[0] for line in err.splitlines() if "sequences" not in line]
    assert [name for name in shown if name != "warning:"][-1] == "speed"
    written = {path.name for path in (tmp_path / "o").iterdir()}
    files = {"model.fxcompress.safetensors", "plan.json", "diff.txt", "diff.html"}
    assert files <= written
    assert (tmp_path / "o" / "diff.txt").read_text().strip() in out
    assert "<html" in (tmp_path / "o" / "diff.html").read_text()
    hugging_face = arguments is not NET
    assert {"config.json", "tokenizer_config.json"} <= written if hugging_face else True
    if hugging_face:
        loaded = fxcompress.load(tmp_path / "o")
        assert type(loaded) is transformers.LlamaForCausalLM

    # And the verbs that read it again.
    model = () if hugging_face else ("--model", "functions.py:net")
    shown, _ = run("load", tmp_path / "o", *model)
    assert shown.startswith("plan for ")
    shown, _ = run("diff", tmp_path / "o")
    assert shown == (tmp_path / "o" / "diff.txt").read_text()
    shown, _ = run("diff", tmp_path / "o", "--json")
    assert json.loads(shown)
    assert "0 of " in run("diff", tmp_path / "o", tmp_path / "o")[0]
    shown, _ = run("diff", tmp_path / "o", "--html", tmp_path / "page.html")
    assert "page.html" in shown
    assert (tmp_path / "page.html").read_text() == (tmp_path / "o" / "diff.html").read_text()


def test_plan(run: _Run) -> None:
    out, err = run("plan", "rules.yaml", *NET)
    assert out.startswith("plan for Sequential: rules rules.yaml, metric kfac")
    assert err == ""
    out, _ = run("plan", "rules.yaml", *NET, "--json", "--keep", "0.7")
    plan = fxcompress.Plan.model_validate_json(out)
    assert plan.budget.keep == 0.7
    assert plan.budget.cost <= 0.7 * plan.budget.dense
    out, err = run("plan", "decoder", *TEXT, "--sequences", "4", "--json")
    calibration = json.loads(out)["calibration"]
    assert (calibration["batches"], calibration["held back"]) == (1, 1)
    assert calibration["predictions"] == 2 * 20
    assert err == ""


def test_memory(run: _Run, tmp_path: Path) -> None:
    out, _ = run("plan", "rules.yaml", *NET, "--dry-run")
    assert out.startswith("model ")
    assert "the model is run as a whole" in out
    told = json.loads(run("plan", "rules.yaml", *NET, "--dry-run", "--json", "--memory", "1GB")[0])
    assert told["limit"] == 10**9
    assert [stage["name"] for stage in told["stages"]][-1] == "rewrite"
    enough = run("plan", "rules.yaml", *NET, "--json")[0]
    ranks = [[s["rank"] for s in json.loads(text)["sites"]] for text in (
        enough, run("plan", "rules.yaml", *NET, "--json", "--memory", "300kB")[0],
    )]  # fmt: skip
    assert ranks[0] == ranks[1]
    out, err = run("plan", "rules.yaml", *NET, "--memory", "9 bytes", code=1)
    assert out == ""
    assert "memory is a number of bytes, or one with a unit, as in '8GiB'" in err
    _, err = run("compile", "rules.yaml", *NET, "--memory", "9", "-o", tmp_path / "o", code=1)
    assert "the limit on memory is 9 bytes" in err
    assert not (tmp_path / "o").exists()


def test_another_unit(run: _Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = run("plan", "rules.yaml", *NET, "--unit", "macs", "--json")
    assert json.loads(out)["budget"]["unit"] == "macs"
    assert "MACs per sample" in run("plan", "rules.yaml", *NET, "--unit", "macs")[0]
    out, _ = run("sweep", "rules.yaml", *NET, "--unit", "macs", "--keeps", "0.8,0.6", "--json")
    assert {point["budget"]["unit"] for point in json.loads(out)["points"]} == {"macs"}
    out, _ = run("explain", "rules.yaml", *NET, "--unit", "macs", "--budget", "--keep", "0.9")
    assert "2 linear → 2 name" in out
    made_up_times(monkeypatch, tmp_path)
    loud = ("--keep", "0.95", "-o", tmp_path / "o")
    out, _ = run("compile", "rules.yaml", *NET, "--unit", "latency", *loud, code=1)
    assert out == ""  # a call more costs more than these layers could save


def test_the_forward_time_is_shown(run: _Run, tmp_path: Path) -> None:
    out, _ = run("compile", "rules.yaml", *NET, "-o", tmp_path / "o")
    line = "forward pass 1.00 s → 1.00 s, 1.00 times as fast (1.00; cpu, 1 thread, float32)"
    assert out.count(line) == 2  # in the diff, and at the end
    assert line in run("load", tmp_path / "o", "--model", "functions.py:net")[0]
    plain = json.loads(run("diff", tmp_path / "o", "--json")[0])
    assert (plain["speed"]["ratio"], plain["batch"]["samples"]) == (1.0, 64)
    out, _ = run("plan", "rules.yaml", *NET)
    assert "forward pass: not measured (nothing is rewritten yet)" in out


def test_a_short_text_is_told(run: _Run) -> None:
    out, err = run("plan", "rules.yaml", *TEXT, "--json")
    assert "text.txt gives 10 sequences, not 64" in err
    calibration = json.loads(out)["calibration"]
    assert calibration["batches"] + calibration["held back"] == 5


def test_explain(run: _Run) -> None:
    out, _ = run("explain", "rules.yaml", *NET)
    assert "2 linear → 2 name" in out
    out, _ = run("explain", "rules.yaml", "--model", "llama")  # with inputs of its own
    assert "15 linear → 15 name" in out
    out, _ = run("explain", "rules.yaml", *TEXT[:4])
    assert "15 linear → 15 name" in out
    out, _ = run("explain", "rules.yaml", *NET, "--json")
    assert json.loads(out)["rules"][0]["funnel"]["kept"] == 2


def test_check_and_schema(run: _Run) -> None:
    out, _ = run("check", "rules.yaml")
    assert out == "rules.yaml: 1 rule, 0 tests, no errors\n"
    for preset in ("decoder", "encoder", "every-linear"):
        out, _ = run("check", preset)
        assert out.startswith(f"{preset}.yaml: ")
    out, _ = run("schema")
    assert json.loads(out)["anyOf"][0] == {"required": ["budget", "rules"]}


def test_help_names_every_verb(run: _Run) -> None:
    out, _ = run("--help")
    assert run("-h")[0] == out
    for verb in ("compile", "plan", "explain", "diff", "load", "check", "presets", "schema"):
        assert verb in out
        assert "--help" in run(verb, "-h")[0]


def test_version_and_module(run: _Run) -> None:
    assert run("--version")[0] == f"fxcompress {fxcompress.__version__}\n"
    words = [sys.executable, "-m", "fxcompress", "--version"]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert said == f"fxcompress {fxcompress.__version__}\n"


def test_presets_are_listed_and_printed(run: _Run, tmp_path: Path) -> None:
    out, _ = run("presets")
    assert [line.split()[0] for line in out.splitlines()] == list(fxcompress.rules.preset_names())
    assert "decoder              Decoder language models: Llama" in out
    text, _ = run("presets", "decoder")
    (tmp_path / "mine.yaml").write_text(text)
    assert run("check", tmp_path / "mine.yaml")[0].startswith(str(tmp_path / "mine.yaml"))
    _, err = run("presets", "decodr", code=2)
    assert "did you mean 'decoder'?" in err


def test_warnings_are_one_line_each(run: _Run, place: Path, tmp_path: Path) -> None:
    rules = (place / "rules.yaml").read_text()
    more = "  - {id: b, match: {node: {op: linear, name: x}}, rewrite: {form: pivoted}}\n"
    (tmp_path / "two.yaml").write_text(rules + more)
    _, err = run("compile", tmp_path / "two.yaml", *NET, "-o", tmp_path / "o")
    assert "warning: two.yaml:4 warning[no-match]: rule 'b' matches nothing" in err
    assert "FxcompressWarning" not in err


def test_it_starts_as_a_program(place: Path) -> None:
    program = Path(sys.executable).parent / "fxcompress"
    command = [str(program)] if program.exists() else [sys.executable, "-m", "fxcompress.cli"]
    done = subprocess.run(
        [*command, "check", "wrong.yaml"], capture_output=True, text=True, cwd=place, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: wrong.yaml:1")


# ---- errors ---------------------------------------------------------------------------


def test_rules_that_cannot_be_used(run: _Run) -> None:
    assert "wrong.yaml:1" in run.fails("check", "wrong.yaml")
    assert "No such file" in run.fails("check", "nowhere.yaml")
    assert "did you mean 'decoder'" in run.fails("plan", "decodr", *NET)
    assert "nothing to compress" in run.fails("plan", "encoder", *NET)


def test_budgets_that_cannot_be_met(run: _Run) -> None:
    assert "keep must be" in run.fails("plan", "rules.yaml", *NET, "--keep", "7")
    assert "need at least" in run.fails("plan", "rules.yaml", *NET, "--keep", "0.001")
    message = run.fails("plan", "rules.yaml", *NET, "--unit", "flops")
    assert "unknown unit 'flops'; did you mean 'macs'? (units: parameters, macs," in message


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("none", "empty or exhausted"),
        ("nothing", "needs calibration data"),
        ("row", "not one Tensor"),
        ("number", "not one int"),
        ("tokens", "the model failed on the example batch"),
        ("broken", "functions.py:broken: KeyError: 'oh no'"),
    ],
)
def test_data_that_cannot_be_used(run: _Run, data: str, words: str, tmp_path: Path) -> None:
    arguments = ("rules.yaml", "--model", "functions.py:net", "--data", f"functions.py:{data}")
    assert words in run.fails("plan", *arguments)
    assert words in run.fails("compile", *arguments, "--out", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_data_is_left_out(run: _Run) -> None:
    assert "needs calibration data" in run.fails("plan", "rules.yaml", *NET[:2])
    assert "give --data" in run.fails("explain", "rules.yaml", *NET[:2], code=2)
    empty = ("--data", "functions.py:none")
    assert "gives no batch" in run.fails("explain", "rules.yaml", *NET[:2], *empty, code=2)
    number = ("--data", "functions.py:number")
    assert "not iterable" in run.fails("explain", "rules.yaml", *NET[:2], *number)


def test_text_that_cannot_be_used(run: _Run) -> None:
    plan = ("plan", "rules.yaml")
    assert "200 tokens, fewer than one sequence of 512" in run.fails(*plan, *TEXT[:4], code=2)
    assert "tokenizer of a Hugging Face" in run.fails(*plan, *NET[:2], "--data", "text.txt", code=2)
    assert "text from latin.txt" in run.fails(*plan, *TEXT[:2], "--data", "latin.txt")
    for option in ("--length", "--sequences"):
        assert option in run.fails(*plan, *TEXT[:4], option, "0", code=2)


@pytest.mark.parametrize(
    ("model", "words", "code"),
    [
        ("empty", "a model from empty", 1),
        ("nowhere", "neither an existing directory", 2),
        ("functions.py", "neither an existing directory", 2),
        ("functions.py:nosuch", "nosuch", 2),
        ("nosuch.py:net", "nosuch.py", 2),
        ("nosuch:net", "No module named 'nosuch'", 2),
        ("bad.py:f", "SyntaxError", 2),
        ("raises.py:f", "ZeroDivisionError", 2),
        ("functions.py:CONSTANT", "is a int, no function", 2),
        ("functions.py:number", "returned int, not an nn.Module", 2),
        ("functions.py:broken", "KeyError: 'oh no'", 1),
    ],
)
def test_models_that_cannot_be_used(run: _Run, model: str, words: str, code: int) -> None:
    arguments = ("--model", model, "--data", "functions.py:batches")
    assert words in run.fails("plan", "rules.yaml", *arguments, code=code)
    assert words in run.fails("explain", "rules.yaml", *arguments, code=code)


def test_hugging_face_directories_that_cannot_be_used(
    run: _Run, place: Path, tmp_path: Path
) -> None:
    config = json.loads((place / "llama" / "config.json").read_text())
    for change, words in [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["NoSuchModel"]}, "names no architecture"),
        ({"model_type": "nosuch"}, "nosuch"),
        ({}, "model.safetensors"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        data = ("--data", "functions.py:tokens")
        text = run.fails("plan", "rules.yaml", "--model", tmp_path, *data)
        assert words in text
        assert "a model from" in text


def test_explain_one_rule_and_the_budget(run: _Run) -> None:
    out, _ = run("explain", "rules.yaml", *NET, "--budget", "--keep", "0.9", "--rule", "all")
    assert out.splitlines()[1].endswith("rewritten")
    assert "2 kept" not in out  # as many are legal: it is not said twice
    found = json.loads(run("explain", "rules.yaml", *NET, "--budget", "--json")[0])
    assert found["rules"][0]["funnel"]["rewritten"] <= 2
    words = run.fails("explain", "rules.yaml", *NET, "--rule", "al")
    assert "no rule has the id 'al'; did you mean 'all'?" in words
    model = ("--model", "functions.py:net")
    assert "give --data" in run.fails("explain", "rules.yaml", *model, code=2)
    assert "calibration" in run.fails("explain", "rules.yaml", *model, "--budget")


def test_saved_files_that_cannot_be_used(run: _Run, tmp_path: Path) -> None:
    assert "plan.json is missing" in run.fails("diff", tmp_path)
    assert "plan.json is missing" in run.fails("load", tmp_path)
    run("compile", "rules.yaml", *NET, "--out", tmp_path / "o")
    assert "load(directory, model)" in run.fails("load", tmp_path / "o")
    assert "not what the plan was made for" in run.fails(
        "load", tmp_path / "o", "--model", "functions.py:other"
    )
    assert "No such file" in run.fails("diff", tmp_path / "o", "--html", tmp_path / "no" / "p.html")
    (tmp_path / "o" / "plan.json").write_text("{")
    assert "cannot be read" in run.fails("diff", tmp_path / "o", "--json")


def test_nothing_is_computed_if_it_cannot_be_written(run: _Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = ("--model", "functions.py:broken", *NET[2:])
    for out in (tmp_path / "file", tmp_path / "file" / "deep" / "o"):
        text = run.fails("compile", "rules.yaml", *model, "--out", out, code=2)
        assert "is a file" in text


@pytest.mark.parametrize(
    "arguments", [("compile",), ("nosuch",), ("plan", "rules.yaml"), ("diff",)]
)
def test_wrong_usage(run: _Run, arguments: tuple[str, ...]) -> None:
    run.fails(*arguments, code=2)


# ---- tests of rules -------------------------------------------------------------------

RULES_WITH_TESTS = """\
budget: {keep: 0.5}
rules:
  - {id: all, match: {node: {op: linear}}, rewrite: {form: pivoted}}
tests:
  - name: a graph
    graph: {fc: {op: linear, input: $x}}
    matches: {all: [fc]}
  - name: a model
    model: functions.py:net
    data: functions.py:batches
    matches: {all: ["0", "2"]}
"""


def test_rule_tests_pass(run: _Run, place: Path) -> None:
    (place / "tested.yaml").write_text(RULES_WITH_TESTS)
    assert run("test", "--run-models", "tested.yaml")[0].splitlines() == [
        "ok    a graph",
        "ok    a model",
        "tested.yaml: 2 tests, all passed",
    ]
    assert run("check", "tested.yaml")[0] == "tested.yaml: 1 rule, 2 tests, no errors\n"


def test_rule_tests_run_no_code_unless_they_may(run: _Run, place: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    (place / "marks.py").write_text(f"open({str(mark)!r}, 'w').close()\ndef net(): pass\n")
    text = RULES_WITH_TESTS.replace("functions.py:net", "marks.py:net")
    (place / "marks.yaml").write_text(text)
    out, _ = run("test", "marks.yaml", code=1)
    assert "ok    a graph" in out
    assert "marks.yaml:9:12: did not run: it would run code: it imports marks.py:net and" in out
    assert "--run-models" in out
    assert not mark.exists()
    run("test", "marks.yaml", "--run-models", code=1)
    assert mark.exists()


def test_files_of_rule_tests_stand_next_to_the_rules(run: _Run, place: Path) -> None:
    (place / "tested.yaml").write_text(RULES_WITH_TESTS)
    run.place = place / "empty"
    assert "all passed" in run("test", "--run-models", place / "tested.yaml")[0]


def test_rule_tests_fail(run: _Run, place: Path) -> None:
    text = RULES_WITH_TESTS.replace("[fc]", "[]").replace("functions.py:net", "functions.py:nope")
    (place / "failing.yaml").write_text(text)
    out, _ = run("test", "--run-models", "failing.yaml", code=1)
    assert "FAIL  a graph  (failing.yaml:5:5)" in out
    assert "failing.yaml:7:20: rule 'all' should match nothing; it matches fc" in out
    assert "rule all (failing.yaml:3)\n      1 linear" in out
    assert "failing.yaml:9:12: did not run:" in out
    assert "no attribute 'nope'" in out
    assert out.endswith("failing.yaml: 2 tests, 2 failed\n")


def test_rule_tests_as_json(run: _Run, place: Path) -> None:
    (place / "failing.yaml").write_text(RULES_WITH_TESTS.replace("[fc]", "[]"))
    found = json.loads(run("test", "--run-models", "failing.yaml", "--json", code=1)[0])
    assert [(case["name"], case["passed"]) for case in found["tests"]] == [
        ("a graph", False),
        ("a model", True),
    ]
    assert found["tests"][0]["failures"][0]["location"] == "failing.yaml:7:20"


def test_a_model_without_data_is_told(run: _Run, place: Path) -> None:
    text = RULES_WITH_TESTS.replace("    data: functions.py:batches\n", "")
    (place / "failing.yaml").write_text(text)
    assert (
        "the model is run once: give 'data'"
        in run("test", "--run-models", "failing.yaml", code=1)[0]
    )


def test_a_file_without_tests(run: _Run) -> None:
    assert run("test", "rules.yaml")[0].startswith("rules.yaml has no tests")


def test_compiling_runs_no_tests(run: _Run, place: Path, tmp_path: Path) -> None:
    text = RULES_WITH_TESTS.replace("functions.py:net", "raises.py:net")
    (place / "unrun.yaml").write_text(text)
    run("compile", "unrun.yaml", *NET, "--out", tmp_path / "out")
