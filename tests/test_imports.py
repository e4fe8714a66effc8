"""Imports point one way only, and everything public says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxcompress

ROOT = Path(fxcompress.__file__).parent

LAYERS = [
    # What a layer imports stands above it; layers in one row know nothing of each other.
    {"errors", "late", "notebook", "plans.structure", "plans.units", "version"},
    {"operators", "budget", "files", "mapped", "parking", "processes", "plans.record"},
    {"collective", "checkpoint"},
    {"graph", "forms"},
    {"metric", "plans.tradeoff"},
    {"rules", "plans.plan"},
    {"picture", "plans.layers", "progress", "saved.tensors", "pipeline.equal"},
    {"report", "rewrite", "pipeline.sites", "pipeline.latency", "pipeline.request"},
    {
        *("pipeline.decomposition", "pipeline.agreement", "pipeline.influence"),
        *("pipeline.held_back", "pipeline.rigid", "pipeline.data"),
    },
    {"pipeline.room"},
    {"pipeline.survey", "pipeline.pricing", "plans.checks", "saved.pretrained"},
    {"saved.weights"},
    {"saved.fill"},
    {"pipeline.estimate", "pipeline.forecast"},
    {"pipeline.analysis"},
    {"pipeline.solving", "pipeline.measure", "pipeline.speed", "pipeline.unmatched"},
    {"pipeline.tradeoff"},
    {"pipeline.decide"},
    {"pipeline.build", "saved.load"},
    {"isvt"},
    {"pipeline.compile", "pipeline.compare", "pipeline.draw", "saved.plain"},
    {"pipeline.sweep", "saved.save"},
    {"saved.hf"},
    {"cli"},
    {"__main__"},
]
"""The order of the package, the ground first: files and folders by name, and the files of those
folders whose stages stand on several floors."""

SPLIT = {"pipeline", "plans", "saved"}
"""Folders whose files have places of their own."""

DELAYED = {("plans.plan", "report"), ("plans.plan", "saved.hf")}
"""Imports the other way, inside of functions: a plan prints itself as a table, and a
Hugging Face model that gets one is watched where it is saved."""

DEPTH = {part: depth for depth, row in enumerate(LAYERS) for part in row}


def modules() -> list[str]:
    names = (info.name for info in pkgutil.walk_packages([str(ROOT)], "fxcompress."))
    return ["fxcompress", *names]


def source(name: str) -> ast.Module:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return ast.parse(Path(spec.origin).read_text(encoding="utf-8"))


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """Modules that a module imports, and whether it does so on top."""
    tree = source(name)
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found = node.module or ""
            for alias in node.names:
                inner = f"{found}.{alias.name}"
                yield (inner if inner in ALL else found), id(node) in top


ALL = set(modules())


def part(name: str) -> str:
    """``fxcompress.rules.language`` belongs to ``rules``, ``fxcompress.saved.load`` to itself."""
    names = name.split(".")[1:]
    return ".".join(names[: 2 if names[:1] and names[0] in SPLIT else 1])


def test_every_part_has_its_place() -> None:
    assert {part(name) for name in ALL} - {"", "presets"} - SPLIT == DEPTH.keys()


@pytest.mark.parametrize("name", sorted(ALL - {"fxcompress"}))
def test_imports_point_one_way(name: str) -> None:
    here = part(name)
    for target, top in imports(name):
        if target.split(".")[0] != "fxcompress":
            continue
        there = part(target)
        if there == here or ((here, there) in DELAYED and not top):
            continue
        if there == "":
            # The command line is written against the public API, like any other program.
            assert here == "cli", f"{name} imports the package itself"
            continue
        assert DEPTH[there] < DEPTH[here], f"{name} imports {target}, which stands above it"


def test_the_rule_language_knows_nothing_of_matching() -> None:
    language = {name for name in ALL if name.startswith("fxcompress.rules.language")}
    assert len(language) > 5
    for name in language:
        assert not [t for t, _ in imports(name) if t.startswith("fxcompress.rules.matching")], name


def test_no_cycles_inside_a_part() -> None:
    """Modules import one another in an order, too; delayed imports are left out of account."""
    graph = {
        name: {t for t, top in imports(name) if t in ALL and top} - {"fxcompress", name}
        for name in ALL - {"fxcompress", "fxcompress.cli", "fxcompress.__main__"}
    }
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {name for name in graph.keys() - done if graph[name] <= done}
        assert ready, f"a cycle among {sorted(graph.keys() - done)}"
        done |= ready


def reached(start: str) -> set[str]:
    """All that the modules of a part import, directly or not, without the package's own init."""
    queue = [name for name in ALL if part(name) == start]
    seen = set(queue)
    while queue:
        for target, _ in imports(queue.pop()):
            if target not in seen:
                seen.add(target)
                if target in ALL and target != "fxcompress":
                    queue.append(target)
    return seen


@pytest.mark.parametrize("start", ["rules", "budget", "errors"])
def test_rules_and_budget_do_without_torch(start: str) -> None:
    heavy = {"torch", "transformers", "safetensors"}
    assert not {name for name in reached(start) if name.split(".")[0] in heavy}


def test_reached_sees_torch_where_it_is() -> None:
    assert {"torch", "yaml", "pydantic"} <= reached("pipeline.analysis")


LIBRARIES = {
    "torch", "numpy", "yaml", "pydantic", "pydantic_core", "rich", "typer", "safetensors",
    "jinja2", "networkx", "PIL", "datasets", "pandas", "scipy", "transformers", "accelerate",
}  # fmt: skip


def test_only_declared_libraries_are_imported() -> None:
    found = {target.split(".")[0] for name in ALL for target, _ in imports(name)}
    assert found - set(sys.stdlib_module_names) - {"fxcompress"} <= LIBRARIES


def test_transformers_is_never_needed() -> None:
    """Not on top of any module but the one that is only imported once it is there."""
    for name in ALL - {"fxcompress.saved.hf"}:
        assert not any(t.split(".")[0] == "transformers" and top for t, top in imports(name)), name


def loaded(code: str, library: str) -> bool:
    """Whether a fresh interpreter has a library after running some code."""
    code = f"import sys; {code}; sys.exit({library!r} in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Error" not in done.stderr, done.stderr
    return bool(done.returncode)


WHOLE = "import fxcompress; [getattr(fxcompress, name) for name in fxcompress.__all__]"


@pytest.mark.parametrize("library", ["transformers", "typer", "networkx"])
def test_importing_the_package_imports_no_more_than_it_needs(library: str) -> None:
    assert not loaded(WHOLE, library)


CLI = "from fxcompress import cli; cli.app([{}], standalone_mode=False)"


@pytest.mark.parametrize(
    "code",
    [
        "import fxcompress",
        "import fxcompress.rules",
        "import fxcompress.cli",
        CLI.format("'check', 'decoder'"),
        # With a template, which is run on random numbers.
        "from tests.rules.fuzz import EVERYTHING, check; assert check(EVERYTHING) == 'ok'",
        CLI.format("'schema'"),
        CLI.format("'compile', '--help'"),
    ],
)
def test_what_needs_no_torch_does_not_import_it(code: str) -> None:
    assert not loaded(code, "torch")


def test_torch_would_be_seen() -> None:
    assert loaded(WHOLE, "torch")


# ---- docstrings -----------------------------------------------------------------------


def public(tree: ast.Module | ast.ClassDef, prefix: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Classes, functions and methods without an underscore, and what is in such classes.

    Not properties: the class's own docstring is the place for those that need a word.
    """
    for node in tree.body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        if node.name.startswith("_") or {"property", "cached_property"} & set(decorators):
            continue
        yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from public(node, f"{prefix}{node.name}.")


def inherits(path: str, module: object) -> bool:
    """Whether a method says nothing because its base class has said it."""
    owner, _, name = path.rpartition(".")
    cls = module
    for step in filter(None, owner.split(".")):
        cls = getattr(cls, step)
    return inspect.isclass(cls) and any(hasattr(base, name) for base in cls.__mro__[1:])


@pytest.mark.parametrize("name", sorted(ALL))
def test_everything_public_has_a_docstring(name: str) -> None:
    tree, module = source(name), importlib.import_module(name)
    assert ast.get_docstring(tree), f"{name} has no docstring"
    silent = [
        path
        for path, node in public(tree)
        if not ast.get_docstring(node) and not inherits(path, module)  # type: ignore[arg-type]
    ]
    assert not silent


def test_all_of_the_public_api_is_there() -> None:
    for name in fxcompress.__all__:
        value = getattr(fxcompress, name)
        assert inspect.getdoc(value), name
    assert fxcompress.__all__ == sorted(fxcompress.__all__)


LEANING = (
    "The same ", "Those ", "Such ", "That of ", "What it ", "What they ", "What such ", "Of it",
    "Of a ",
    "As of ", "It ", "They ", "Its ", "This ", "These ", "Both ", "Whether it ", "Whether they ",
    "How it ",
)  # fmt: skip
"""Beginnings that lean on a neighbour: a first line has to make sense alone."""


@pytest.mark.parametrize("name", sorted(ALL))
def test_first_lines_make_sense_alone(name: str) -> None:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(source(name)) if isinstance(node, kinds)]
    firsts = [(ast.get_docstring(node) or "").partition("\n")[0] for node in nodes]
    assert not [line for line in firsts if line.startswith(LEANING)]
