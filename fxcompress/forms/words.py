"""The names of forms that rule files may use, and what each applies to.

Apart from the forms themselves, so that rules can be checked without torch.
:mod:`fxcompress.forms.registry` holds both in step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fxcompress.late import load_plugins
from fxcompress.operators.words import TRANSPOSED, operators_of

GROUP = "fxcompress.forms"
"""Entry points of this group name modules that register forms when they are imported."""


@dataclass(frozen=True)
class FormWord:
    """A form as the rule language knows it.

    Attributes:
        name: as written in a rule file.
        operators: canonical operators that it can rewrite.
        joint: True for a form that rewrites several operators on one input together.
        hidden: True for a form that rewrites an operator together with what produces its input.
    """

    name: str
    operators: frozenset[str]
    joint: bool = False
    hidden: bool = False


_BOTH_WAYS = operators_of("convolution")
_CONVOLUTIONS = _BOTH_WAYS - TRANSPOSED

BUILT_IN: Mapping[str, FormWord] = {
    "fxcompress.forms.low_rank:LOW_RANK": FormWord("low_rank", frozenset({"linear"})),
    "fxcompress.forms.separable:POINTWISE": FormWord("low_rank", _CONVOLUTIONS),
    "fxcompress.forms.pivoted:PIVOTED": FormWord("pivoted", frozenset({"linear"})),
    "fxcompress.forms.pivoted_conv:PIVOTED_CONVOLUTION": FormWord("pivoted", _BOTH_WAYS),
    "fxcompress.forms.joint:JOINT": FormWord("joint", frozenset({"linear"}), joint=True),
    "fxcompress.forms.separable:CHANNEL": FormWord("channel", _BOTH_WAYS),
    "fxcompress.forms.separable:CHANNEL_INPUT": FormWord("channel_input", _BOTH_WAYS),
    "fxcompress.forms.separable:SPATIAL": FormWord("spatial", _BOTH_WAYS),
    "fxcompress.forms.narrow:NARROW": FormWord("narrow", frozenset({"linear"}), hidden=True),
    "fxcompress.forms.tucker2:TUCKER2": FormWord("tucker2", _BOTH_WAYS),
    "fxcompress.forms.embedding:EMBEDDING": FormWord("embedding", frozenset({"embedding"})),
}
"""The forms of this package by their place: a module, and the form's name in it."""

_WORDS: dict[str, FormWord] = {}


def add_word(word: FormWord) -> None:
    """Make a name known, or known for further operators.

    Raises:
        ValueError: it is taken.
    """
    known = _WORDS.get(word.name)
    if known is not None:
        alone = not any(each.joint or each.hidden for each in (known, word))
        if not alone or known.operators & word.operators:
            raise ValueError(f"a form named {word.name!r} is already registered")
        word = replace(word, operators=known.operators | word.operators)
    _WORDS[word.name] = word


def form_words() -> Mapping[str, FormWord]:
    """All forms by name, those of installed plug-ins included."""
    load_plugins(GROUP)
    return _WORDS


def forms_for(op: str, forms: tuple[str, ...]) -> tuple[str, ...]:
    """The names among ``forms`` that rewrite one operator ``op`` by itself, in the order given.

    >>> import fxcompress
    >>> forms_for("linear", ("joint", "pivoted", "low_rank"))
    ('pivoted', 'low_rank')
    >>> forms_for("conv2d", ("pivoted",))
    ()
    """
    words = form_words()
    return tuple(f for f in forms if f in words and op in words[f].operators and not words[f].joint)


def joint_forms(forms: tuple[str, ...]) -> tuple[str, ...]:
    """The names among ``forms`` that rewrite several operators together, in the order given."""
    words = form_words()
    return tuple(form for form in forms if form in words and words[form].joint)


def hidden_forms(forms: tuple[str, ...]) -> tuple[str, ...]:
    """The names among ``forms`` that rewrite an operator and what produces its input, in order.

    >>> import fxcompress
    >>> hidden_forms(("pivoted", "narrow"))
    ('narrow',)
    """
    words = form_words()
    return tuple(form for form in forms if form in words and words[form].hidden)


for _word in BUILT_IN.values():
    add_word(_word)
