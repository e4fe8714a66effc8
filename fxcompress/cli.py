"""The command line: the verbs of the Python API.

A model is a Hugging Face directory, or ``module:function`` / ``file.py:function`` for a
function without arguments that returns one.  Data are a text file (for a Hugging Face
language model: its tokenizer cuts it into sequences), or again ``file.py:function``,
returning an iterable of batches.  What takes seconds to import (torch) is imported by the commands
that need it: help and ``check`` do not.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxcompress
from fxcompress.errors import FxcompressError, FxcompressWarning, LoadError, SaveError
from fxcompress.files import try_directory
from fxcompress.plans.units import UNITS
from fxcompress.rules import (
    Case,
    LoadedRules,
    MatchResult,
    choices,
    json_schema,
    load_rules,
    preset_names,
    preset_path,
    run_cases,
    suggest,
)
from fxcompress.rules.language.globs import GlobError

if TYPE_CHECKING:
    from torch import nn

    from fxcompress.picture import Picture

app = typer.Typer(
    name="fxcompress",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxcompress {fxcompress.__version__}")
        raise typer.Exit


Rules = Annotated[str, typer.Argument(help="rule file, or a preset: " + ", ".join(preset_names()))]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Hugging Face directory, or file.py:function")
]
Data = Annotated[
    str | None, typer.Option("--data", "-d", help="text file, or file.py:function giving batches")
]
Sequences = Annotated[int, typer.Option(min=1, help="how many sequences to cut from a text file")]
Length = Annotated[int, typer.Option(min=1, help="tokens in each of them")]
Keep = Annotated[float | None, typer.Option(help="overrides budget.keep of the rules")]
Memory = Annotated[
    str | None,
    typer.Option(help="what the work may take beside the model, as in 8GiB; else most of it"),
]
Unit = Annotated[
    str | None, typer.Option(help=f"overrides budget.unit of the rules: {', '.join(UNITS)}")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for other programs")]

MOST_KEEPS = 1000
"""Budgets in one sweep; more come from a mistyped step."""


Modules = Annotated[
    list[str] | None,
    typer.Option("--import", help="module or file.py to import first: it registers forms, metrics"),
]


@app.callback()
def before(
    modules: Modules = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show it and exit"),
    ] = False,
) -> None:
    """Low-rank compression of PyTorch models by declarative graph rewriting."""
    for place in modules or ():
        try:
            _import(place)
        except Exception as error:  # whatever the user's file does
            raise typer.BadParameter(
                f"--import {place}: {type(error).__name__}: {error}"
            ) from error


@app.command()
def compile(
    rules: Rules,
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="directory to save to")],
    data: Data = None,
    keep: Keep = None,
    unit: Unit = None,
    memory: Memory = None,
    held_out: Annotated[
        str | None,
        typer.Option("--measure", help="other data, to measure what every site loses"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="directory for what was measured: a run that was cut off goes on"),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="save it as an ordinary Hugging Face model, without a plan"),
    ] = False,
    sequences: Sequences = 64,
    length: Length = 512,
) -> None:
    """Compress a model and save it: weights, plan.json, diff.txt and diff.html."""
    from fxcompress.report.summary import held_back_line, speed_line
    from fxcompress.saved.plain import check_plain_directory
    from fxcompress.saved.save import check_directory

    standing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise typer.BadParameter(f"--out {out}: {standing} is a file, not a directory")
    check = check_plain_directory if plain else check_directory
    check(out)  # not after hours of work
    if checkpoint is not None:
        try_directory(checkpoint)
    dense = load_model(model)
    small = fxcompress.compile(
        dense,
        rules,
        load_data(data, model, sequences, length),
        keep=keep,
        unit=unit,
        memory=memory,
        progress=True,
        checkpoint=checkpoint,
    )
    _save(small, out, plain=plain)
    if held_out is not None:
        batches = load_data(held_out, model, sequences, length)
        fxcompress.measure(dense, small, batches or (), progress=True)
        _save(small, out, plain=plain)  # again, with what was measured
    difference = fxcompress.diff(dense, small)
    (out / "diff.txt").write_text(f"{difference}\n", encoding="utf-8")
    (out / "diff.html").write_text(difference.to_html(), encoding="utf-8")
    _copy_tokenizer(model, out)
    typer.echo(str(difference))
    typer.echo(f"\n{held_back_line(difference.plan)}\n{speed_line(difference.plan)}")
    loader = f"{type(small).__name__}.from_pretrained" if plain else "fxcompress.load"
    typer.echo(f"saved to {out}; load it with {loader}({str(out)!r})")


def _save(model: nn.Module, out: Path, *, plain: bool) -> None:
    """Save a model; one that cannot be a plain checkpoint is not lost."""
    try:
        fxcompress.save(model, out, plain=plain)
    except SaveError as error:
        if not plain:
            raise
        instead = fxcompress.save(model, out / "with-plan")
        raise SaveError(f"{error}. It was saved to {instead}, with its plan") from error


@app.command()
def plan(
    rules: Rules,
    model: Model,
    data: Data = None,
    keep: Keep = None,
    unit: Unit = None,
    memory: Memory = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only say what memory and time it will take at least"),
    ] = False,
    sequences: Sequences = 64,
    length: Length = 512,
    as_json: Json = False,
) -> None:
    """Show the ranks that compile would choose, without rewriting anything."""
    network, batches = load_model(model), load_data(data, model, sequences, length)
    if dry_run:
        told = fxcompress.forecast(network, rules, batches or (), memory=memory)
        typer.echo(json.dumps(asdict(told), indent=1) if as_json else str(told))
        return
    made = fxcompress.plan(
        network,
        rules,
        batches,
        keep=keep,
        unit=unit,
        memory=memory,
    )
    typer.echo(made.model_dump_json(indent=1) if as_json else str(made))


@app.command()
def sweep(
    rules: Rules,
    model: Model,
    data: Data = None,
    keeps: Annotated[
        str, typer.Option(help="what to keep: 0.9,0.7,0.5, or first:last:step")
    ] = "0.9:0.3:0.1",
    unit: Unit = None,
    memory: Memory = None,
    evaluate: Annotated[
        str | None,
        typer.Option(help="file.py:function from a model to a number, or several by name"),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with a plot to this file")] = None,
    sequences: Sequences = 64,
    length: Length = 512,
    as_json: Json = False,
) -> None:
    """Show what many budgets come to, from one calibration."""
    fractions = _keeps(keeps)
    measure = None if evaluate is None else _function(evaluate, "--evaluate")
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"--html {html}: {html.parent} is not a directory")
    made = fxcompress.sweep(
        load_model(model),
        rules,
        load_data(data, model, sequences, length),
        keeps=fractions,
        unit=unit,
        memory=memory,
        evaluate=measure,
    )
    if html is not None:
        html.write_text(made.to_html(), encoding="utf-8")
    typer.echo(json.dumps(made.to_json(), indent=1) if as_json else str(made))
    if not made.complete:
        raise typer.Exit(130)


@app.command()
def explain(
    rules: Rules,
    model: Model,
    data: Data = None,
    rule: Annotated[str | None, typer.Option("--rule", "-r", help="explain this rule only")] = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="calibrate and solve the budget too: what stays dense")
    ] = False,
    keep: Keep = None,
    unit: Unit = None,
    memory: Memory = None,
    sequences: Sequences = 64,
    length: Length = 512,
    as_json: Json = False,
) -> None:
    """Which operators each rule matches, and why the others not."""
    network = load_model(model)
    batches = load_data(data, model, *((sequences, length) if budget else (1, 16)))
    # Hugging Face models bring inputs to try them on.
    example = getattr(network, "dummy_inputs", None) if batches is None else None
    if budget:
        calibration = () if batches is None else batches
        explanation = fxcompress.explain(
            network,
            rules,
            example,
            rule=rule,
            calibration=calibration,
            keep=keep,
            unit=unit,
            memory=memory,
        )
    else:
        example = example if batches is None else _first(batches)
        if example is None:
            raise typer.BadParameter("explain runs the model once: give --data")
        explanation = fxcompress.explain(
            network, rules, example, rule=rule, unit=unit, memory=memory
        )
    plain = explanation.to_json()
    typer.echo(json.dumps(plain, ensure_ascii=False, indent=2) if as_json else str(explanation))


@app.command()
def diff(
    directory: Annotated[Path, typer.Argument(help="a directory written by save or compile")],
    other: Annotated[
        Path | None, typer.Argument(help="another such directory, to compare with")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write the page to this file")] = None,
    as_json: Json = False,
) -> None:
    """Show what was changed in a saved model, or how two of them differ."""
    from fxcompress.report import diff_plan
    from fxcompress.report.comparison import comparison_text
    from fxcompress.saved.load import read_plan

    difference = diff_plan(read_plan(directory))
    beside = None if other is None else read_plan(other)
    if html is not None:
        html.write_text(difference.to_html(beside), encoding="utf-8")
        typer.echo(f"written to {html}")
    elif beside is not None and not as_json:
        typer.echo(comparison_text(difference.plan, beside))
    else:
        typer.echo(json.dumps(difference.to_json(), indent=1) if as_json else str(difference))


@app.command()
def graph(
    source: Annotated[
        str,
        typer.Argument(
            help="a model, as --model takes it elsewhere; or a directory written by save or "
            "compile, or a plan.json: before and after"
        ),
    ],
    data: Data = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="modules deeper than this are one line")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="only operators of this path, a glob, and their neighbours")
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="write it for Graphviz to this file")] = None,
    model_explorer: Annotated[
        Path | None, typer.Option(help="write it for Google's Model Explorer to this directory")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the graph of a model as rules see it, or what was changed in it."""
    drawn = _picture(source, data)
    if dot is not None:
        dot.write_text(drawn.to_dot(), encoding="utf-8")
        typer.echo(f"written to {dot}")
    if model_explorer is not None:
        for path in drawn.to_model_explorer(model_explorer):
            typer.echo(f"written to {path}")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if node is not None:
        try:
            found = drawn.near(node, width)
        except GlobError as error:
            raise typer.BadParameter(f"--node {node}: {error}") from error
        if not found:
            raise typer.BadParameter(f"--node {node}: no operator has such a path")
        typer.echo(found)
    elif as_json:
        typer.echo(json.dumps(drawn.to_json(), ensure_ascii=False))
    elif dot is None and model_explorer is None:
        typer.echo(drawn.text(depth, width))


def _picture(source: str, data: str | None) -> Picture:
    """The graph of a model, or that of a plan before and after."""
    from fxcompress.saved.load import PLAN, read_plan

    path = Path(source)
    if path.name == PLAN and path.is_file():
        path = path.parent
    if (path / PLAN).is_file():
        return fxcompress.draw(read_plan(path))
    network, batches = load_model(source), load_data(data, source, 1, 16)
    example = getattr(network, "dummy_inputs", None) if batches is None else _first(batches)
    if example is None:
        raise typer.BadParameter("graph runs the model once: give --data")
    return fxcompress.draw(network, example)


@app.command()
def load(
    directory: Annotated[Path, typer.Argument(help="a directory written by save or compile")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="file.py:function; not for Hugging Face")
    ] = None,
) -> None:
    """Load a saved model strictly, to check that the files are whole, and print it."""
    loaded = fxcompress.load(directory, None if model is None else load_model(model))
    typer.echo(str(fxcompress.plan_of(loaded)))


@app.command()
def check(rules: Rules) -> None:
    """Check a rule file without a model; prints every error with its place."""
    loaded = load_rules(rules)
    counts = (_count(len(loaded.rules.rules), "rule"), _count(len(loaded.rules.tests), "test"))
    typer.echo(f"{loaded.filename}: {', '.join(counts)}, no errors")


@app.command()
def presets(
    name: Annotated[str | None, typer.Argument(help="of one that is to be printed")] = None,
) -> None:
    """List the rule files that ship with the package, or print one to start from."""
    if name is None:
        for each in preset_names():
            typer.echo(f"{each:<20} {_headline(each)}")
        return
    path = preset_path(name)
    if path is None:
        names = preset_names()
        raise typer.BadParameter(
            f"no preset is called {name}; {suggest(name, names) or choices(names)}"
        )
    typer.echo(path.read_text(encoding="utf-8"), nl=False)


def _headline(preset: str) -> str:
    """The first sentence of a preset's opening comment."""
    path = preset_path(preset)
    assert path is not None
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line[2:] for line in opening).partition(". ")[0].rstrip(".")


@app.command("test")
def run_tests(
    rules: Rules,
    run_models: Annotated[
        bool,
        typer.Option("--run-models", help="run the code that tests name under 'model' and 'data'"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Run the tests that a rule file carries; exit status 1 if one fails."""
    loaded = load_rules(rules)
    directory = (preset_path(rules) or Path(rules)).parent

    def match(case: Case) -> MatchResult:
        if not run_models:
            named = " and ".join(source for source in (case.model, case.data) if source)
            raise LoadError(
                f"it would run code: it imports {named}; look at that, and allow it with "
                "fxcompress test --run-models"
            )
        return _match_case(loaded, case, directory)

    results = run_cases(loaded, match)
    failed = sum(not result.passed for result in results)
    if as_json:
        plain = {"rules": loaded.filename, "tests": [result.to_json() for result in results]}
        typer.echo(json.dumps(plain, indent=1, ensure_ascii=False))
    elif not results:
        typer.echo(f"{loaded.filename} has no tests; they go under the key 'tests'")
    else:
        for result in results:
            typer.echo(str(result))
        outcome = f"{failed} failed" if failed else "all passed"
        typer.echo(f"{loaded.filename}: {_count(len(results), 'test')}, {outcome}")
    if failed:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    typer.echo(json.dumps(json_schema(), indent=1))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _match_case(loaded: LoadedRules, case: Case, directory: Path) -> MatchResult:
    """What the rules match in the model of a test; its files stand next to the rules."""
    from fxcompress.pipeline.survey import match_model, working_copy
    from fxcompress.rewrite import record_operators

    def beside(source: str) -> str:
        place = source.rpartition(":")[0] or source
        local = place.endswith(".py") or (directory / place).exists()
        return str(directory / source) if local else source

    try:
        model = load_model(beside(str(case.model)))
        data = None if case.data is None else load_data(beside(case.data), "", 1, 16)
        example = getattr(model, "dummy_inputs", None) if data is None else _first(data)
    except typer.BadParameter as error:
        raise LoadError(error.message) from error
    if example is None:
        raise LoadError("the model is run once: give 'data'")
    work = working_copy(model)
    return match_model(work, loaded, record_operators(work, [example]))


def main() -> None:
    """Entry point: errors of ours are printed without a traceback, with exit status 1."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except (FxcompressError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(1)
    except KeyboardInterrupt:
        typer.secho("interrupted; nothing was written", err=True)
        sys.exit(130)


def load_model(source: str) -> nn.Module:
    """A Hugging Face model from a directory, or whatever a function returns."""
    from torch import nn

    if Path(source).is_dir():
        transformers = _transformers()
        with _reading(f"a model from {source}"):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            name = (config.architectures or [None])[0]
            cls = getattr(transformers, name or "", None)
            if cls is None:
                raise LoadError("its config.json names no architecture of transformers")
            model: nn.Module = cls.from_pretrained(source)
        return model.eval()
    made = _call(source, "--model")
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"{source}() returned {type(made).__name__}, not an nn.Module")
    return made


def load_data(source: str | None, model: str, sequences: int, length: int) -> Iterable[Any] | None:
    """Batches from a text file (two sequences each), or whatever a function returns."""
    if source is None:
        return None
    path = Path(source)
    if not path.is_file() or path.suffix == ".py":
        return _call(source, "--data")  # type: ignore[no-any-return]
    if not Path(model).is_dir():
        raise typer.BadParameter("a text file needs the tokenizer of a Hugging Face directory")
    transformers = _transformers()
    with _reading(f"a tokenizer from {model}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    with _reading(f"text from {source}"):
        text = path.read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0]
    count = min(sequences, len(ids) // length)
    if count == 0:
        raise typer.BadParameter(
            f"{source} has {len(ids)} tokens, fewer than one sequence of {length}"
        )
    if count < sequences:
        typer.secho(f"{source} gives {count} sequences, not {sequences}", err=True, fg="yellow")
    return [{"input_ids": part} for part in ids[: count * length].view(count, length).split(2)]


def _keeps(text: str) -> list[float]:
    """``0.9,0.7`` or ``0.9:0.3:0.1``, both ends included if the steps meet the second."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
        steps = abs(last - first) / abs(step)
        if steps >= MOST_KEEPS:
            raise typer.BadParameter(
                f"--keeps {text!r} is more than {MOST_KEEPS} budgets: take larger steps"
            )
        signed = math.copysign(step, last - first)
        # A step that misses the end by a rounding error only does not miss it.
        return [round(first + signed * at, 9) for at in range(math.floor(steps + 1e-6) + 1)]
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            f"--keeps {text!r} is neither numbers (0.9,0.7,0.5) nor first:last:step (0.9:0.3:0.1)"
        ) from error


def _first(batches: Iterable[Any]) -> Any:
    """The first batch; a bare tensor is told apart by whoever runs it."""
    with _reading("a batch from --data"):
        for batch in batches:
            return batch
    raise typer.BadParameter("--data gives no batch")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Says what could not be read, whoever complained about it."""
    try:
        yield
    except Exception as error:
        raise LoadError(f"cannot read {what}: {type(error).__name__}: {error}") from error


def _call(source: str, option: str) -> Any:
    """What a function of the user returns."""
    function = _function(source, option)
    with _reading(f"{option} {source}"):
        return function()


def _function(source: str, option: str) -> Callable[..., Any]:
    """A function of the user."""
    function = _resolve(source, option)
    if not callable(function):
        raise typer.BadParameter(f"{option} {source!r} is a {type(function).__name__}, no function")
    return function  # type: ignore[no-any-return]


def _resolve(source: str, option: str) -> Any:
    """``module:function`` or ``file.py:function``."""
    place, colon, name = source.rpartition(":")
    if not colon:
        raise typer.BadParameter(
            f"{option} {source!r} is neither an existing directory or file nor module:function"
        )
    try:
        return getattr(_import(place), name)
    except Exception as error:  # whatever the user's file does
        raise typer.BadParameter(f"{option} {source!r}: {type(error).__name__}: {error}") from error


def _import(place: str) -> ModuleType:
    """A module by its name, or from a file."""
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.setdefault(Path(place).stem, module)  # classes in it can be pickled
    return module


def _transformers() -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise typer.BadParameter("this needs transformers: pip install 'fxcompress[hf]'") from error
    transformers.utils.logging.disable_progress_bar()  # it has its own, terminal or not
    return transformers


def _copy_tokenizer(model: str, out: Path) -> None:
    if Path(model).is_dir() and (Path(model) / "tokenizer_config.json").exists():
        _transformers().AutoTokenizer.from_pretrained(model).save_pretrained(out)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, FxcompressWarning):
        typer.secho(f"warning: {message}", err=True, fg="yellow")


if __name__ == "__main__":
    main()
