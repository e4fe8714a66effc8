"""Forms of a factorization, found through one registry."""

from collections.abc import Mapping
from types import MappingProxyType

from fxcompress.forms.embedding import EMBEDDING
from fxcompress.forms.form import Form, FormError, JointBody, JointForm
from fxcompress.forms.graph import template_form
from fxcompress.forms.joint import JOINT
from fxcompress.forms.low_rank import LOW_RANK
from fxcompress.forms.pivoted import PIVOTED
from fxcompress.forms.pivoted_conv import PIVOTED_CONVOLUTION
from fxcompress.forms.separable import CHANNEL, CHANNEL_INPUT, POINTWISE, SPATIAL
from fxcompress.forms.shape import ConvShape, EmbeddingShape, LinearShape, Shape
from fxcompress.forms.target import Rank, Spectrum, Target
from fxcompress.forms.template import Template
from fxcompress.forms.tucker2 import TUCKER2
from fxcompress.forms.words import FormWord, add_word, form_words

_FORMS: dict[tuple[str, str], Form | JointForm] = {}


def register_form(form: Form | JointForm) -> None:
    """Make a form known by its name, to rule files too.

    Args:
        form: an instance of a subclass of :class:`Form` or :class:`JointForm`.  Two forms may
            have one name if they are for different operators.

    Raises:
        ValueError: the name is taken.
        TypeError: it is no form.
    """
    if not isinstance(form, Form | JointForm):
        raise TypeError(f"an instance of Form or JointForm is registered, not {form!r}")
    add_word(FormWord(form.name, frozenset(form.operators), isinstance(form, JointForm)))
    _FORMS.update({(form.name, op): form for op in form.operators})


def find_form(
    name: str, op: str = "linear", templates: Mapping[str, Template] = MappingProxyType({})
) -> Form:
    """The form of one operator that has a name.

    Args:
        name: registered, or that of a template.
        op: the operator.
        templates: by the names of the forms that they stand for.

    Raises:
        KeyError: there is none.
    """
    form = _find(name, op, templates)
    if not isinstance(form, Form):
        raise KeyError(name)
    return form


def find_joint_form(
    name: str, templates: Mapping[str, Template] = MappingProxyType({})
) -> JointForm:
    """The form of several linear operators that has a name; arguments as :func:`find_form`."""
    form = _find(name, "linear", templates)
    if not isinstance(form, JointForm):
        raise KeyError(name)
    return form


def _find(name: str, op: str, templates: Mapping[str, Template]) -> Form | JointForm:
    if name in templates:
        return template_form(templates[name])
    form_words()  # imports what plug-ins register
    return _FORMS[name, op]


for _form in (
    *(LOW_RANK, POINTWISE, PIVOTED, PIVOTED_CONVOLUTION, JOINT),
    *(CHANNEL, CHANNEL_INPUT, SPATIAL, TUCKER2, EMBEDDING),
):
    register_form(_form)

__all__ = [
    "ConvShape",
    "EmbeddingShape",
    "Form",
    "FormError",
    "JointBody",
    "JointForm",
    "LinearShape",
    "Rank",
    "Shape",
    "Spectrum",
    "Target",
    "Template",
    "find_form",
    "find_joint_form",
    "form_words",
    "register_form",
]
