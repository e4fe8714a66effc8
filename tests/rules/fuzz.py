"""Fuzzing rule files: ``python tests/rules/fuzz.py --count 100000 --seed 0``.

Whatever the text is, reading it ends within a second and gives rules, or one RuleError that
starts with the name of the file; nothing of it is executed, and memory stays bounded.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import resource
import sys
import time
import unicodedata  # noqa: F401  (Python imports it where a name in an expression is not ASCII)
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import fxcompress  # noqa: F401  (registers the forms)
from fxcompress.errors import RuleError
from fxcompress.rules import LoadedRules, parse_rules
from tests.watching import watcher

ROOT = Path(__file__).parents[2]
NAME = "r.yaml"
SECONDS = 1.0
MEMORY = 1 << 30
"""Bytes of address space beyond what the process has at the start."""

EVERYTHING = """\
version: 1
budget: {keep: 0.8, of: matched, unit: parameters}
metric: {kind: kfac, damping: {input: 1.0e-3, output: 1.0e-1}, output: auto, seed: 0}
solver: {allocation: global}
defaults: {tied: skip, multi_call: once, multiple_of: 8, min_rank: 1, min_saving: 0.05}
rules:
  - id: qkv
    description: queries, keys and values
    priority: 20
    match:
      scope: "*.self_attn"
      inputs: [x]
      nodes:
        q: {op: linear, input: $x, name: "*.q_proj"}
        k: {op: [linear, conv1d], input: $x, name: ["*.{k,v}_proj", "k?[0-9]"]}
        n: {op: layer_norm, input: $k, eps: 1.0e-5, optional: true}
        s: {op: add, inputs: [$q, $n]}
        t: {op: softmax, inputs: [$s, null], dim: -1}
      outputs: [q, t]
    unless: [{name: "*.0.*", node: q}, {shares_weight_with: embedding}, {scope: "a*"}]
    where: ["same(q.dtype, k.dtype)", "not present(n) or n.eps < 1 / 2", "count(q) == 1"]
    rewrite: {any_of: [pivoted, low_rank], nodes: [q, k], min_rank: 8, max_rank: 64, group: g}
    expect: {matches: {min: 0, max: 30}}
  - id: group
    match: {group: {op: linear, as: fc, name: "*", min: 2, max: 5, bias: true}}
    rewrite: {any_of: [joint, pivoted]}
  - id: either
    match:
      any_of:
        - node: {op: conv2d, as: c, kernel_size: [[1, 1], [3, 3]], padding: same, groups: 1}
        - nodes: {c: {op: conv2d, groups: [1, 2]}}
    rewrite: none
  - id: own
    match: {inputs: [x], nodes: {fc: {op: linear, input: $x}}, outputs: [fc]}
    rewrite:
      graph:
        down: {op: linear, input: $x, weight: fc.right}
        less: {op: sub, inputs: [$down, $gate]}
        gate: {op: sigmoid, input: $down}
        same: {op: add, inputs: [$less, $gate]}
        up: {op: linear, inputs: [$same], weight: fc.left, bias: fc.bias}
      outputs: {fc: up}
      cost: "r * (fc.in_features + fc.out_features)"
tests:
  - name: a layer
    graph:
      q: {op: linear, path: layers.0.q_proj, input: $x, in_features: 64, out_features: 64}
      k: {op: linear, path: layers.0.k_proj, input: $x, weight: q.weight, scope: layers.0}
      s: {op: add, inputs: [$q, $k]}
    matches: {group: [[layers.0.q_proj, layers.0.k_proj]], own: []}
    misses: {qkv: {layers.0.q_proj: pattern}}
  - {name: a model, model: "m.py:net", data: "m.py:rows", matches: {own: [fc]}}
"""
"""A rule file with every key of the language in it."""

_LINES = (
    ": |- |  |\n|\n  |\n    |{|}|[|]|,|*a|&a |>= 4|> || |!!x |!|\"|'|#|%|@|`|\t|---\n|...\n|? |<<: "
    "|no|on|null|~|1e-3|1.0e-3|.inf|-.inf|.nan|0x_|0b_|1:30|2020-13-45|op|as|name|match|any_of"
    "|node|nodes|graph|where|unless|rewrite|form|none|keep|rules|id|expect|matches|misses|tests"
    '|min|max|budget|"\\U0011FFFF"|"\\ud800"|\u2028|\x85|\x07|\x00|\ufeff|é|999999999999999999999'
    "|linear|conv2d|relu|cat|fc.in_features|fc.right|fc.left|joint.right|joint|$x|$q|$|inputs"
    "|outputs|input|optional|true|group|scope|cost|weight|bias|path|model|present(q)|count(q)|r"
    "|kernel_size|[3, 3]|{a,b}|\r\n|!!python/object/apply:os.system ['true']|__import__('os')"
)
TOKENS = [
    *_LINES.split("|"),
    "9" * 5000,
    "{a,b}" * 12,
    "(" * 400,
    "*" * 400,
    "a" * 20000,
    "1e999",
    "-0",
]


def check(text: str) -> str:
    """Read a text; ``"ok"`` or the code of the first error.

    Raises:
        AssertionError: it gave anything else, or was not told where the mistake is.
    """
    try:
        loaded = parse_rules(text, NAME)
    except RuleError as error:
        message = str(error)
        head = message.split("\n", 1)[0]
        assert head.startswith(f"{NAME}:"), head
        line, column = head[len(NAME) + 1 :].split(" ", 1)[0].split(":")
        assert int(line) > 0, head
        assert int(column) > 0, head
        assert " error[" in head, head
        assert len(message) < 100_000, f"an error of {len(message)} characters"
        message.encode()
        return head.split(" error[")[1].split("]")[0]
    assert isinstance(loaded, LoadedRules)
    return "ok"


# ---- texts ----------------------------------------------------------------------------


KEYS = sorted({word for word in TOKENS if word.isidentifier() and len(word) < 20})
WORDS = [*KEYS, "$x", "$q", "$", "1.5", "0", "-3", "1e-3", "fc.right", "joint.left", "[]", "{}"]


def seeds() -> list[str]:
    """The file with every key, whole and rule by rule, and the rule files of the repository."""
    head, rest = EVERYTHING.split("rules:\n")
    rules, tests = rest.split("tests:\n")
    short = "budget: {keep: 0.8}\nrules:\n"
    pieces = [f"{short}  - id:{rule}" for rule in rules.split("  - id:")[1:]]
    minimal = f"{short}  - {{id: own, match: {{node: {{op: linear}}}}, rewrite: none}}\n"
    pieces += [f"{minimal}tests:\n{tests}", f"{head}{minimal[len(short) - 7 :]}"]
    found = sorted([*ROOT.glob("rules/*.yaml"), *ROOT.glob("examples/*.yaml")])
    files = [path.read_text(encoding="utf-8") for path in found]
    # Most of the time goes into reading YAML: without its comments, a file is read faster.
    whole = [EVERYTHING, *(re.sub("(?m)^ *#.*\n", "", text) for text in files)]
    return [*whole, *pieces * 4]


SEEDS = seeds()
LOADED = [yaml.safe_load(text) for text in SEEDS]


def mutated(rng: random.Random) -> str:
    """A rule file with a few pieces replaced by others."""
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(text) + 1)
        length = rng.choice([0, 0, 1, 3, 20])
        text = text[:at] + rng.choice(TOKENS) + text[at + length :]
    return text


def reworded(rng: random.Random) -> str:
    """A rule file with a few words in the place of others; most of these are still YAML."""
    text = rng.choice(SEEDS)
    for _ in range(rng.randint(1, 4)):
        word = rng.choice(list(re.finditer(r"[$]?[\w.]+", text)))
        other = rng.choice([rng.choice(WORDS), rng.choice(re.findall(r"[$]?[\w.]+", text))])
        text = text[: word.start()] + other + text[word.end() :]
    return text


def flipped(rng: random.Random) -> str:
    """A rule file with a few bytes replaced, repeated or left out."""
    raw = bytearray(rng.choice(SEEDS).encode())
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(raw))
        kind = rng.randrange(3)
        if kind == 0:
            raw[at] = rng.randrange(256)
        elif kind == 1:
            del raw[at : at + rng.randint(1, 40)]
        else:
            raw[at:at] = raw[at : at + rng.randint(1, 40)]
    return raw.decode("utf-8", "replace")


def shuffled(rng: random.Random) -> str:
    """A rule file with its lines in another order."""
    lines = rng.choice(SEEDS).splitlines(keepends=True)
    for _ in range(rng.randint(1, 5)):
        first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
        lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines)


def soup(rng: random.Random) -> str:
    """Words of the language in any order."""
    return "".join(rng.choice(TOKENS) for _ in range(rng.randint(0, 60)))


LEAVES: list[Any] = [
    *(None, True, False, 0, -1, 3, 1e308, float("nan"), 10**400, "", "$x", "q", "linear", "*"),
    *("pivoted", "joint", "none", "fc.right", "fc.in_features > 3", "relu", [3, 3], "\ud7ff"),
]


def shape(rng: random.Random, depth: int = 0) -> Any:
    """Any value."""
    kind = rng.random()
    if depth > 4 or kind < 0.4:
        return copy.deepcopy(rng.choice(LEAVES))
    if kind < 0.6:
        return [shape(rng, depth + 1) for _ in range(rng.randint(0, 3))]
    return {rng.choice(KEYS): shape(rng, depth + 1) for _ in range(rng.randint(0, 4))}


def reshaped(rng: random.Random) -> str:
    """A rule file with any value in the place of some of its own."""
    data = copy.deepcopy(rng.choice(LOADED))
    for _ in range(rng.randint(1, 3)):
        place: Any = data
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(place[key], dict | list) and rng.random() < 0.8:
                place = place[key]
                continue
            place[key] = shape(rng)
            break
    return as_yaml(data) if rng.random() < 0.7 else yaml.safe_dump(data)


def as_yaml(data: Any) -> str:
    """Plain data in JSON, which is YAML and is written faster, but for names of odd numbers."""
    text = json.dumps(data)
    return re.sub(r"(?<=[:\[] |, )(-?)(NaN|Infinity)", lambda m: f"{m[1]}.{m[2][:3].lower()}", text)


def extreme(rng: random.Random) -> str:
    """Deep, long and wide texts, and bombs."""
    size = rng.choice([10, 100, 1000, 5000])
    names = [f"n{i}" for i in range(size)]
    rule = "budget: {keep: 0.8}\nrules: [{id: a, rewrite: {form: pivoted}, match: "
    return rng.choice(
        [
            lambda: "[" * size + "]" * size,
            lambda: "{a: " * size + "}" * size,
            lambda: "".join(f"{' ' * i}a:\n" for i in range(min(size, 1000))),
            lambda: "a: &a [x, x]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(size)),
            lambda: f"a: &a [*a, *a]\nb: [{', '.join(['*a'] * size)}]\n",
            lambda: "budget: {keep: " + "9" * size + "}\nrules: []\n",
            lambda: "budget: {keep: 0x" + "f" * size + "}\nrules: []\n",
            lambda: "budget: {keep: " + ":".join(["59"] * size) + "}\nrules: []\n",
            lambda: f'{rule}{{node: {{op: linear, name: "{"{a,b}" * (size // 5)}"}}}}}}]',
            lambda: f'{rule}{{node: {{op: linear, name: "{"*?" * (size // 2)}"}}}}}}]',
            lambda: f'{rule}{{node: {{op: linear}}}}, where: ["{"(" * size}"]}}]',
            lambda: f'{rule}{{node: {{op: linear}}}}, where: ["{"not " * size} 1"]}}]',
            lambda: f'{rule}{{node: {{op: linear}}}}, where: ["{"9" * size} > 1"]}}]',
            lambda: f"{rule}{{node: {{op: {'linear' * size}}}}}}}]",
            lambda: f"{rule}{{nodes: {{{', '.join(f'{n}: {{op: relu}}' for n in names)}}}}}}}]",
            lambda: f"{rule}{{nodes: {{q: {{op: cat, inputs: [{', '.join(['$q'] * size)}]}}}}}}}}]",
            lambda: (
                f"{rule}{{node: {{op: linear}}}}, unless: [{', '.join(['{name: a}'] * size)}]}}]"
            ),
            lambda: f"{rule}{{any_of: [{', '.join(['{node: {op: linear}}'] * size)}]}}}}]",
            lambda: f"{rule}{{any_of: [{', '.join(['{node: {op: linaer, x: 1}}'] * size)}]}}}}]",
            lambda: "budget: {" + ", ".join(f"{n}: 1" for n in names) + "}\n",
            lambda: "x: 1\n" * size,
            lambda: "\n".join(f"? [{n}]" for n in names),
            lambda: (
                "tests: [{graph: {"
                + ", ".join(f"{n}: {{op: relu, input: ${n}}}" for n in names)
                + "}}]"
            ),
            lambda: '"' + "\\n" * size + '": 1',
            lambda: "rules: |\n" + "  x\n" * size,
            lambda: "%YAML 1.1\n---\n" + "- " * size,
        ]
    )()


MAKERS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (mutated, 23),
    (reworded, 25),
    (flipped, 15),
    (shuffled, 10),
    (soup, 10),
    (reshaped, 15),
    (extreme, 2),
)
"""Makers of texts, and how many of a hundred texts each of them makes."""


def text_of(number: int, seed: int) -> tuple[str, str]:
    """(Name of the maker, text), the same for the same number and seed."""
    makers, weights = zip(*MAKERS, strict=True)
    rng = random.Random(f"{seed}/{number}")
    maker = rng.choices(makers, weights)[0]
    return maker.__name__, maker(rng)


# ---- running --------------------------------------------------------------------------


EXPECTED = ("compile", "object.__getattr__", "sys._getframe")
"""Audit events of reading rules: ``ast.parse`` compiles a text to a tree, which is not run."""

watched = watcher(lambda event, _: event in EXPECTED)
"""Collects what reading does beside reading: import, open, exec, subprocess and the like."""


@contextmanager
def bounded_memory() -> Iterator[None]:
    """A limit on the address space: what needs more gets a MemoryError."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def fuzz(numbers: Iterable[int], seed: int) -> tuple[Counter[str], float]:
    """Read the texts of some numbers; how many gave what, and the seconds that the slowest took.

    Raises:
        AssertionError: with the text that failed.
    """
    check(EVERYTHING)  # imports and caches
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    with bounded_memory():
        for number in numbers:
            maker, text = text_of(number, seed)
            try:
                with watched() as events:
                    outcome, seconds = timed(text)
                assert not events, f"it did: {events[:5]}"
                assert seconds < SECONDS, f"it took {seconds:.2f} s"
            except BaseException as error:
                note = f"text {number} of seed {seed} ({maker}): {text[:3000]!r}"
                raise AssertionError(f"{type(error).__name__}: {error}\n{note}") from error
            outcomes[outcome] += 1
            slowest = max(slowest, seconds)
    return outcomes, slowest


def timed(text: str) -> tuple[str, float]:
    """What a text gives, and processor seconds: the best of three if it seems slow.

    Other work on the machine slows this one down, and no bug makes it faster.
    """
    seconds = math.inf
    for _ in range(3):
        start = time.process_time()
        outcome = check(text)
        seconds = min(seconds, time.process_time() - start)
        if seconds < SECONDS:
            break
    return outcome, seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    start = time.perf_counter()
    parts = [range(job, given.count, given.jobs) for job in range(given.jobs)]
    with ProcessPoolExecutor(given.jobs) as pool:
        found = list(pool.map(fuzz, parts, [given.seed] * given.jobs))
    outcomes = sum((outcomes for outcomes, _ in found), Counter())
    slowest = max(slowest for _, slowest in found)
    for code, times in outcomes.most_common():
        print(f"{times:8,}  {code}")
    took = time.perf_counter() - start
    print(
        f"{given.count:,} files in {took:.0f} s; the slowest took {slowest:.3f} s of processor time"
    )


if __name__ == "__main__":
    main()
