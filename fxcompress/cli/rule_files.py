"""``check``, ``presets``, ``test`` and ``schema``: rule files, without a model."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxcompress.cli import options
from fxcompress.cli.app import app
from fxcompress.cli.data import Cut, first_batch, load_data, without_labels
from fxcompress.cli.models import load_model
from fxcompress.errors import LoadError
from fxcompress.rules.language.presets import preset_names, preset_path

if TYPE_CHECKING:
    from fxcompress.rules import Case, LoadedRules, MatchResult


@app.command(epilog="Example: fxcompress check mine.yaml")
def check(rules: options.Rules, as_json: options.Json = False) -> None:
    """Check a rule file without a model; prints every error with its place."""
    from fxcompress.rules import load_rules

    loaded = load_rules(rules)
    if as_json:
        ids = [rule.id for rule in loaded.rules.rules]
        found = {"file": loaded.filename, "rules": ids, "tests": len(loaded.rules.tests)}
        typer.echo(json.dumps(found, indent=1))
        return
    counts = (_count(len(loaded.rules.rules), "rule"), _count(len(loaded.rules.tests), "test"))
    typer.echo(f"{loaded.filename}: {', '.join(counts)}, no errors")


@app.command(epilog="Example: fxcompress presets decoder > mine.yaml")
def presets(
    name: Annotated[str | None, typer.Argument(help="of one that is to be printed")] = None,
    as_json: options.Json = False,
) -> None:
    """List the rule files that ship with the package, or print one to start from."""
    if name is None:
        if as_json:
            typer.echo(json.dumps({each: _headline(each) for each in preset_names()}, indent=1))
            return
        for each in preset_names():
            typer.echo(f"{each:<20} {_headline(each)}")
        return
    path = preset_path(name)
    if path is None:
        from fxcompress.rules.language.diagnostics import choices, suggest

        names = preset_names()
        raise typer.BadParameter(
            f"no preset is called {name}; {suggest(name, names) or choices(names)}"
        )
    text = path.read_text(encoding="utf-8")
    typer.echo(json.dumps({name: text}) if as_json else text, nl=as_json)


def _headline(preset: str) -> str:
    """The first sentence of a preset's opening comment."""
    path = preset_path(preset)
    assert path is not None
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = itertools.takewhile(lambda line: line.startswith("# "), lines)
    return " ".join(line[2:] for line in opening).partition(". ")[0].rstrip(".")


@app.command("test", epilog="Example: fxcompress test mine.yaml")
def run_tests(
    rules: options.Rules,
    run_models: Annotated[
        bool,
        typer.Option("--run-models", help="run the code that tests name under 'model' and 'data'"),
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Run the tests that a rule file carries; exit status 1 if one fails."""
    from fxcompress.rules import load_rules, run_cases

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


@app.command(epilog="Example: fxcompress schema > rules.schema.json")
def schema() -> None:
    """Print the JSON Schema of rule files, for editors."""
    from fxcompress.rules import json_schema

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
        data = (
            None
            if case.data is None
            else without_labels(load_data(beside(case.data), "", Cut(1, 16)), model)
        )
        example = getattr(model, "dummy_inputs", None) if data is None else first_batch(data)
    except typer.BadParameter as error:
        raise LoadError(error.message) from error
    if example is None:
        raise LoadError("the model is run once: give 'data'")
    work = working_copy(model)
    return match_model(work, loaded, record_operators(work, [example]))
