"""What README and ``docs/`` show is what the package does: blocks run, links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import typer
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

from fxcompress import cli
from fxcompress.errors import RuleError
from fxcompress.rules import parse_rules
from tests.documents import ROOT, Block, Document, documents
from tests.made_up_times import made_up_times
from tests.small import data, net

GUIDES = documents("README.md", "docs/*.md")
PAGES = [*GUIDES, *documents("CONTRIBUTING.md", "CHANGELOG.md")]
LANGUAGES = {"console", "py", "python", "text", "toml", "yaml"}
"""Of fenced blocks; ``py`` is a script of several processes, which ``test_processes.py`` starts."""
FILES = {b.file: b.text for page in GUIDES for b in page.of("yaml") if b.file is not None}
HUB = "HuggingFaceTB/SmolLM2-135M"
BOOK = ROOT / "examples" / "data" / "moby_dick.txt"
PACKAGE = ROOT / "fxcompress"
SCHEMA = json.loads(next(PACKAGE.rglob("schema.json")).read_text("utf-8"))


def each(pages: list[Document]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=[page.name for page in pages])


def blocks(language: str) -> pytest.MarkDecorator:
    """The blocks of a language that are no files: those are for commands and Python to read."""
    found = [(page, block) for page in PAGES for block in page.of(language) if block.file is None]
    ids = [f"{page.name}:{block.line}" for page, block in found]
    return pytest.mark.parametrize("block", [block for _, block in found], ids=ids)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of the repository as a reader has it, with the rule files of the documents."""
    path = tmp_path_factory.mktemp("reader")
    shutil.copytree(ROOT / "examples", path / "examples")
    for name, text in FILES.items():
        (path / name).write_text(text, encoding="utf-8")
    llama(path / "tiny-llama")
    return path


def llama(path: Path) -> None:
    """A language model of one layer with a tokenizer that knows the words of a book."""
    words = dict.fromkeys(re.findall(r"\w+|[^\w\s]+", BOOK.read_text("utf-8")[:4000]))
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="the"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)


# What the documents speak of as the reader's own.


def of_readme() -> dict[str, Any]:
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
    )
    images = TensorDataset(torch.randn(128, 3, 16, 16), torch.randint(10, (128,)))
    return {"network": network, "loader": DataLoader(images, batch_size=16)}


def of_training() -> dict[str, Any]:
    model = net()
    batches = [(x, torch.randint(10, (len(x),))) for x in data()]
    return {
        "model": model,
        "calibration": data(),
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": batches,
        "loss": lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
    }


def of_using() -> dict[str, Any]:
    def accuracy(model: nn.Module) -> float:
        (x,) = data(1, seed=2)
        return float((model(x).argmax(1) == net()(x).argmax(1)).float().mean())

    return {
        "model": net(),
        "calibration": data(),
        "held_out": data(seed=2),
        "accuracy": accuracy,
        "build": net,
    }


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": of_readme,
    "docs/training.md": of_training,
    "docs/using.md": of_using,
}


@each([page for page in PAGES if page.of("python")])
def test_python_runs(
    page: Document, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a document one after the other, as a reader would type them."""
    monkeypatch.chdir(place)
    made_up_times(monkeypatch, tmp_path)
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoTokenizer):
        local = auto.from_pretrained
        names = {HUB: place / "tiny-llama"}
        monkeypatch.setattr(
            auto, "from_pretrained", lambda name, load=local, to=names: load(to[name])
        )
    names = GIVEN[page.name]() if page.name in GIVEN else {}
    for block in page.of("python"):
        code = "\n" * (block.line - 1) + block.text
        exec(compile(code, page.name, "exec"), names)


@blocks("console")
def test_commands_print_what_is_shown(
    block: Block, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where output is shown it is the whole; where none is, the command works."""
    monkeypatch.chdir(place)
    for command, expected in block.commands:
        words = shlex.split(command, comments=True)
        if words[0] != "fxcompress":
            assert not expected
            may_be_typed(words)
        elif "--import" in words:
            # In a process of its own: what a module registers stays registered.
            run = [sys.executable, "-m", "fxcompress.cli", *words[1:]]
            alone = os.environ | {"OMP_NUM_THREADS": "1"}
            done = subprocess.run(run, cwd=place, capture_output=True, text=True, env=alone)
            assert done.returncode == 0, done.stderr
            assert expected in ("", done.stdout)
        else:
            printed = invoke(words[1 : words.index(">")] if ">" in words else words[1:])
            assert expected in ("", printed)
            assert expected.startswith("error: ") == printed.startswith("error: ")


def invoke(arguments: list[str]) -> str:
    """What a command prints, errors of rule files as ``main()`` prints them."""
    result = CliRunner().invoke(cli.app, arguments)
    if isinstance(result.exception, RuleError):
        return f"error: {result.exception}\n"
    assert result.exit_code == 0, result.output
    return result.stdout


def may_be_typed(words: list[str]) -> None:
    """Whether a command exists with its options; one of seconds is run."""
    match [words[0].removeprefix(".venv/bin/"), *words[1:]]:
        case ["python", *arguments]:
            python(arguments)
        case ["make", *targets]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            known = re.findall(r"^([\w-]+):", makefile, flags=re.MULTILINE)
            assert {target for target in targets if "=" not in target} <= {*known}, words
        case ["pip", "install", what]:
            project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
            (extra,) = re.findall(r"^\.\[(\w+)\]$", what)
            assert extra in project["project"]["optional-dependencies"], words
        case [tool, *_]:
            assert tool in {"git", "ruff"}, words


def python(arguments: list[str]) -> None:
    """A script of the repository, or its tests, called with these arguments."""
    if arguments[:2] == ["-m", "pytest"]:
        paths = [a for a in arguments[2:] if a.startswith("tests")]
        assert all((ROOT / path.partition("::")[0]).exists() for path in paths), arguments
        return
    script, *options = arguments
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in source, f"{script} has no {option}"
    if script == "examples/train.py":
        main = sys.modules.pop("__main__", None)
        try:
            runpy.run_path(script, run_name="__main__")
        finally:
            if main is not None:
                sys.modules["__main__"] = main


@each([page for page in PAGES if page.name != "CHANGELOG.md"])  # which tells of the past, too
def test_code_in_lines_is_of_things_that_exist(page: Document) -> None:
    """Commands as in blocks, and paths."""
    for code in page.inline:
        if re.match(r"(make|python|pip install) [\w./'-]+", code):
            may_be_typed(shlex.split(code))
        elif re.match(r"fxcompress( |$)", code):
            verb_and_options(code.split()[1:])
        elif re.fullmatch(r"[a-z][\w-]*/[\w./-]*", code) and not code.startswith("out/"):
            assert any((root / code).exists() for root in (ROOT, PACKAGE)), f"{page.name}: {code}"


def verb_and_options(words: list[str]) -> None:
    """Whether the command line has them."""
    group = typer.main.get_command(cli.app)
    command: Any = group
    for word in words:
        if word in getattr(group, "commands", {}):
            command = group.commands[word]  # type: ignore[attr-defined]
        elif word.startswith("--"):
            options = [name for option in command.params for name in option.opts]
            assert word in options, words


@blocks("yaml")
def test_pieces_of_rule_files_are_valid(block: Block) -> None:
    """What is shown without the name of a file is a part of one."""
    whole = {"budget": {"keep": 0.5}, "rules": [{"id": "a", "match": {"node": {"op": "linear"}}}]}
    whole["rules"][0]["rewrite"] = {"form": "low_rank"}  # type: ignore[index]
    parse_rules(json.dumps(whole | yaml.safe_load(block.text)), "piece.yaml")


@blocks("toml")
def test_toml_can_be_read(block: Block) -> None:
    assert tomllib.loads(block.text)


@each(PAGES)
def test_every_block_has_a_language_that_is_tested(page: Document) -> None:
    assert page.text.count("```") == 2 * len(page.blocks)
    assert {block.language for block in page.blocks} <= LANGUAGES


def test_every_rule_file_is_used_and_has_a_name_of_its_own() -> None:
    shown = [b.file for page in GUIDES for b in page.of("yaml") if b.file is not None]
    assert len(shown) == len(FILES)
    read = [b.text for page in GUIDES for b in [*page.of("console"), *page.of("python")]]
    assert {name for name in FILES if not any(name in text for text in read)} == set()


def test_the_error_of_a_template_is_the_one_shown() -> None:
    text = FILES["template.yaml"]
    broken = text.replace("$small, weight: fc.left", "$small, weight: fc.right")
    errors = [b.text for page in GUIDES for b in page.of("text") if "template.yaml:" in b.text]
    with pytest.raises(RuleError) as caught:
        parse_rules(broken, "template.yaml")
    (shown,) = errors
    assert str(caught.value).startswith(shown)


@each(PAGES)
def test_links_lead_somewhere(page: Document) -> None:
    for link in page.links:
        if re.match(r"https?://", link):
            continue
        target, _, anchor = link.partition("#")
        path = (page.path.parent / target).resolve() if target else page.path
        assert path.exists(), f"{page.name}: nothing is at {link}"
        if anchor:
            there = Document(path.relative_to(ROOT).as_posix())
            assert anchor in there.anchors, f"{page.name}: no heading for {link}"


def test_every_guide_is_reached_from_the_readme() -> None:
    readme, *others = GUIDES
    assert {page.name for page in others} <= {link.partition("#")[0] for link in readme.links}


def test_the_source_distribution_has_what_is_linked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packed = set(project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])
    linked = {
        (page.path.parent / link.partition("#")[0]).resolve().relative_to(ROOT).parts[0]
        for page in PAGES
        for link in page.links
        if not re.match(r"https?://|#", link)
    }
    assert linked | {page.path.relative_to(ROOT).parts[0] for page in PAGES} <= packed


def keys(schema: Any) -> set[str]:
    """All keys of rule files, but the attributes of operators."""
    if isinstance(schema, list):
        return set().union(*map(keys, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    here = set(schema.get("properties", {}))
    attributes = {"CaseNode", "GraphNode", "TemplateNode"}
    inside = [value for key, value in schema.items() if key not in attributes]
    return here.union(*map(keys, inside))


def words_of(name: str) -> set[str]:
    return set(re.findall(r"[\w-]+", Document(name).text))


def test_every_key_of_the_language_is_explained() -> None:
    assert keys(SCHEMA) - words_of("docs/rules.md") == set()


def test_forms_metrics_and_presets_are_explained() -> None:
    (forms,) = (
        option["enum"]
        for option in SCHEMA["$defs"]["Rewrite"]["properties"]["form"]["anyOf"]
        if "enum" in option
    )
    assert set(forms) <= words_of("docs/how-it-works.md")
    metrics = SCHEMA["$defs"]["Metric"]["properties"]["kind"]["enum"]
    assert set(metrics) <= words_of("docs/forms-and-metrics.md")
    presets = {path.stem for path in (ROOT / "rules").glob("*.yaml")}
    for name in ("README.md", "docs/rules.md"):
        assert presets <= words_of(name)


def test_every_target_of_make_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert {f"make {target}" for target in phony.split()} <= {*Document("CONTRIBUTING.md").inline}


def test_no_figure_is_missing() -> None:
    assert not [page.name for page in PAGES if "<!--" in page.text]
