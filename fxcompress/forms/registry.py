"""Forms by name and operator, those that were registered from outside among them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from fxcompress.forms.form import Form, JointForm
from fxcompress.forms.graph import template_form
from fxcompress.forms.narrow import Narrow
from fxcompress.forms.template import Template
from fxcompress.forms.words import BUILT_IN, FormWord, add_word, form_words

_FORMS: dict[tuple[str, str], Form | JointForm] = {}


def register_form(form: Form | JointForm) -> None:
    """Make a form known by its name, to rule files too.

    Args:
        form: an instance of a subclass of :class:`Form` or :class:`JointForm`.  Two forms may
            have one name if they are for different operators.

    Raises:
        ValueError: the name is taken.
        TypeError: it is no form, or one for hidden values that does not derive from
            :class:`fxcompress.forms.Narrow`.
    """
    if not isinstance(form, Form | JointForm):
        raise TypeError(f"an instance of Form or JointForm is registered, not {form!r}")
    if isinstance(form, JointForm) and form.hidden and not isinstance(form, Narrow):
        raise TypeError(
            f"{form.name}: a form for hidden values derives from fxcompress.forms.Narrow"
        )
    add_word(_word_of(form))
    _FORMS.update({(form.name, op): form for op in form.operators})


def find_form(
    name: str,
    op: str = "linear",
    templates: Mapping[str, Template] = MappingProxyType({}),
) -> Form | JointForm:
    """The form of a name.

    Args:
        name: registered, or that of a template.
        op: the operator.
        templates: by the names of the forms that they stand for.

    Raises:
        KeyError: there is none.
    """
    if name in templates:
        return template_form(templates[name])
    form_words()  # imports what plug-ins register
    return _FORMS[name, op]


def _word_of(form: Form | JointForm) -> FormWord:
    joint = isinstance(form, JointForm)
    hidden = isinstance(form, JointForm) and form.hidden
    return FormWord(form.name, frozenset(form.operators), joint and not hidden, hidden)


for _place, _word in BUILT_IN.items():
    _module, _, _name = _place.partition(":")
    _form: Form | JointForm = getattr(importlib.import_module(_module), _name)
    assert _word_of(_form) == _word, f"{_place} is {_word_of(_form)}, not {_word}"
    _FORMS.update({(_form.name, op): _form for op in _form.operators})
