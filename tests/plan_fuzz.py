"""Fuzzing saved directories: ``python tests/plan_fuzz.py --count 100000 --seed 0``.

Whatever ``plan.json`` and the names of the stored tensors are, loading gives a model or one
LoadError that a terminal can show.  Meanwhile nothing is executed but what torch.fx writes, which
is calls of the model's own layers and of a few torch functions, and no tensor is made that is
larger than twice the model.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import fxcompress
from fxcompress.errors import LoadError
from fxcompress.rules import parse_rules
from tests.watching import watcher

WEIGHTS = "model.fxcompress.safetensors"

RULES = """
budget: {keep: 0.45}
rules:
  - id: own
    match: {inputs: [x], nodes: {fc: {op: linear, input: $x, name: "own"}}}
    rewrite:
      graph:
        small: {op: linear, input: $x, weight: fc.right}
        large: {op: linear, input: $small, weight: fc.left, bias: fc.bias}
  - id: two
    match:
      inputs: [x]
      nodes: {q: {op: linear, input: $x, name: "q"}, k: {op: linear, input: $x, name: "k"}}
    rewrite:
      graph:
        h: {op: linear, input: $x, weight: joint.right}
        a: {op: linear, input: $h, weight: q.left, bias: q.bias}
        b: {op: linear, input: $h, weight: k.left, bias: k.bias}
      outputs: {q: a, k: b}
  - {id: conv, match: {node: {op: conv1d}}, rewrite: {form: channel, fold_batch_norm: true}}
  - {id: rest, match: {node: {op: linear, name: "head"}}, rewrite: {form: pivoted}}
"""


class Net(nn.Module):
    """A convolution with a norm, two layers on one input, and two by themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.own = nn.Linear(16, 16)
        self.q = nn.Linear(16, 12)
        self.k = nn.Linear(16, 12)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).transpose(1, 2)
        x = self.own(x).relu()
        return self.head(torch.cat([self.q(x), self.k(x)], -1))


def written(path: Path) -> int:
    """Save a compressed net; the bytes of the dense one."""
    torch.manual_seed(0)
    model = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batches = [torch.randn(8, 8, 6) for _ in range(2)]
        small = fxcompress.compile(model, parse_rules(RULES, "fuzz.yaml"), batches)
    fxcompress.save(small, path)
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


# ---- mutations ------------------------------------------------------------------------

EVIL = "__import__('os').system('touch /tmp/never')"
WORDS: list[Any] = [
    *("", "x", "a", "in", "self", "training", "forward", "\x1b[2J", "a\nb", "\u202e", "..", "q.k"),
    *(EVIL, f"a={EVIL}", f'a", {EVIL}, "', "h\n  import os", "__class__", "_modules", "graph:two"),
    *("pivoted", "joint", "tucker2", "embedding", "graph:own", "low_rank", "linear", "conv2d"),
    *("q", "k", "own", "conv", "norm", "head", "linear 16→12", "linear 16→1000000000", "bfloat16"),
    *(None, True, False, 0, 1, -1, 2, 3, 12, 10**6, 2**31, 2**62, 10**30, 0.5, 1e308, 1e-300),
    *([], {}, [1, 2], [[]], ["x"], {"x": 1}),
]
"""What takes the place of anything in a plan."""


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values of a plan."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def mutated(rng: random.Random, plan: Any, at: list[tuple[Any, ...]]) -> Any:
    """The plan with a few values exchanged, removed, repeated or renamed."""
    plan = copy.deepcopy(plan)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *path, last = rng.choice(at)
        try:
            holder = plan
            for key in path:
                holder = holder[key]
            kind = rng.random()
            if kind < 0.6:
                holder[last] = copy.deepcopy(rng.choice(WORDS))
            elif kind < 0.75:
                other = plan
                for key in rng.choice(at):
                    other = other[key]
                holder[last] = copy.deepcopy(other)
            elif kind < 0.8:
                del holder[last]
            elif kind < 0.9 and isinstance(holder, list):
                holder.append(copy.deepcopy(holder[last]))
            elif isinstance(holder, dict):
                holder[str(rng.choice(WORDS))] = holder.pop(last)
            elif isinstance(holder, list):
                rng.shuffle(holder)
        except (KeyError, IndexError, TypeError):
            continue
    return plan


def renamed(rng: random.Random, plan: Any) -> tuple[Any, dict[str, str]]:
    """The plan with one word exchanged wherever it stands, and so in the tensors' names."""
    old = rng.choice(["small", "large", "h", "a", "b", "q", "own", "conv", "head", "graph:two"])
    new = str(rng.choice(WORDS))

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {walk(key): walk(one) for key, one in value.items()}
        if isinstance(value, list):
            return [walk(one) for one in value]
        return new if value == old else value

    return walk(plan), {old: new}


# ---- watching -------------------------------------------------------------------------

_SAFE = ("object.", "sys._getframe", "code.__new__", "builtins.id", "gc.")
_CALLS = {
    *("torch.cat", "torch.index_select", "torch.narrow", "torch.unflatten", "torch.flatten"),
    *("torch._C._nn.linear", "torch.conv1d", "getattr", "combine.add_"),
}
_NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Call),
    *(ast.Name, ast.Attribute, ast.Load, ast.Store, ast.Constant, ast.Tuple, ast.List),
    *(ast.UnaryOp, ast.USub, ast.keyword, ast.Expr),
)


def harmless(source: str) -> bool:
    """Whether the source of a graph calls layers of the model and known functions, and no more."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            return False
        if isinstance(node, ast.FunctionDef) and (
            node.name != "forward" or node.decorator_list or node.args.defaults
        ):
            return False
        if isinstance(node, ast.arg) and node.annotation is not None:
            return False
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if isinstance(node.func, ast.Call):  # getattr(self, "0")(x)
                if ast.unparse(node.func.func) != "getattr":
                    return False
            elif "(" in called or not (called in _CALLS or called.startswith("self.")):
                return False
            if called == "getattr" and (
                ast.unparse(node.args[0]) != "self" or not isinstance(node.args[1], ast.Constant)
            ):
                return False
    return True


def _expected(event: str, arguments: tuple[Any, ...]) -> bool:
    if event.startswith(_SAFE):
        return True
    if event == "compile":
        source, name = arguments
        text = source.decode() if isinstance(source, bytes) else source
        if str(name).startswith("<eval_with_key>") and isinstance(text, str) and harmless(text):
            return True
        caller = sys._getframe(2).f_code.co_filename  # of the hook that asks
        return bool(name == "<unknown>" and caller == ast.__file__)  # harmless() itself
    if event == "exec":
        return bool(arguments[0].co_filename.startswith("<eval_with_key>"))  # compiled above
    return event == "open" and str(arguments[1]).startswith("r") and _own(arguments[0])


def _own(path: Any) -> bool:
    return Path(str(path)).name in ("plan.json", WEIGHTS)


watched = watcher(_expected)
"""Collects what happens beside the expected."""


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(  # type: ignore[override]
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not out.is_meta:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def check(path: Path, most: int) -> str:
    """Load a directory; ``"ok"`` or the kind of error.

    Raises:
        AssertionError: something else happened.
    """
    model = Net()
    with watched() as events, Largest() as largest:
        try:
            loaded = fxcompress.load(path, model)
            outcome = "ok"
        except LoadError as error:
            text = str(error)
            assert text.isprintable(), text
            assert "cannot be rewritten as" not in text, text  # the last net, never needed
            outcome = text.replace(str(path), "").split(":")[0][:40]
    assert not events, events[:3]
    assert largest.bytes <= 2 * most, largest.bytes
    if outcome == "ok":
        for shown in (fxcompress.plan_of(loaded), fxcompress.diff(Net(), loaded)):
            assert str(shown).replace("\n", "").isprintable()
        fxcompress.diff(Net(), loaded).to_html()
    return outcome


def fuzz(numbers: Iterable[int], seed: int) -> Counter[str]:
    """Load mutated directories of some numbers; how many gave what."""
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        most = written(path)
        text = (path / "plan.json").read_text()
        plan, state = json.loads(text), load_file(path / WEIGHTS)
        at = list(places(plan))
        # Every kind of place alike: a plan is mostly spectra.
        kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for place in at:
            kinds.setdefault(tuple(k for k in place if not isinstance(k, int)), []).append(place)
        assert check(path, most) == "ok"
        assert check(path, most) == "ok"
        for number in numbers:
            rng = random.Random(f"{seed}/{number}")
            exchanged: dict[str, str] = {}
            if rng.random() < 0.1:
                made, exchanged = renamed(rng, plan)
            else:
                some = [rng.choice(those) for those in rng.choices([*kinds.values()], k=8)]
                made = mutated(rng, plan, some)
            (path / "plan.json").write_text(json.dumps(made))
            if exchanged:
                ((old, new),) = exchanged.items()
                names = {n: n.replace(f".{old}.", f".{new}.") for n in state}
                save_file({names[n]: t for n, t in state.items()}, path / WEIGHTS)
            try:
                outcomes[check(path, most)] += 1
            except BaseException as error:
                raise AssertionError(
                    f"plan {number} of seed {seed}: {type(error).__name__}: {error}"
                ) from error
            finally:
                if exchanged:
                    save_file(state, path / WEIGHTS)
    return outcomes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    end = given.first + given.count
    parts = [range(given.first + job, end, given.jobs) for job in range(given.jobs)]
    with ProcessPoolExecutor(given.jobs) as pool:
        found = list(pool.map(fuzz, parts, [given.seed] * given.jobs))
    for outcome, times in sum(found, Counter()).most_common():
        print(f"{times:8,}  {outcome}")
    print(f"{given.count:,} plans")


if __name__ == "__main__":
    main()
