"""Forms of a factorization, one a file, found through one registry."""

from typing import TYPE_CHECKING

from fxcompress.late import exported

if TYPE_CHECKING:
    from fxcompress.forms.body import Body as Body
    from fxcompress.forms.fitted import Fitted as Fitted
    from fxcompress.forms.fitted import fit as fit
    from fxcompress.forms.form import Form as Form
    from fxcompress.forms.form import FormError as FormError
    from fxcompress.forms.form import JointForm as JointForm
    from fxcompress.forms.graph import template_form as template_form
    from fxcompress.forms.narrow import Narrow as Narrow
    from fxcompress.forms.registry import find_form as find_form
    from fxcompress.forms.registry import register_form as register_form
    from fxcompress.forms.target import Channels as Channels
    from fxcompress.forms.target import Rank as Rank
    from fxcompress.forms.target import Spectrum as Spectrum
    from fxcompress.forms.target import Target as Target
    from fxcompress.forms.target import Truncations as Truncations
    from fxcompress.forms.target import View as View
    from fxcompress.forms.template import Template as Template
    from fxcompress.forms.words import form_words as form_words
    from fxcompress.operators.convolution import ConvShape as ConvShape
    from fxcompress.operators.embedding import EmbeddingShape as EmbeddingShape
    from fxcompress.operators.linear import LinearShape as LinearShape
    from fxcompress.operators.shape import Shape as Shape

__all__, __getattr__, __dir__ = exported(
    __name__,
    {
        "fxcompress.forms.body": ("Body",),
        "fxcompress.forms.fitted": ("Fitted", "fit"),
        "fxcompress.forms.form": ("Form", "FormError", "JointForm"),
        "fxcompress.forms.narrow": ("Narrow",),
        "fxcompress.forms.registry": ("find_form", "register_form"),
        "fxcompress.forms.graph": ("template_form",),
        "fxcompress.forms.target": (
            *("Channels", "Rank", "Spectrum"),
            *("Target", "Truncations", "View"),
        ),
        "fxcompress.forms.template": ("Template",),
        "fxcompress.forms.words": ("form_words",),
        "fxcompress.operators.convolution": ("ConvShape",),
        "fxcompress.operators.embedding": ("EmbeddingShape",),
        "fxcompress.operators.linear": ("LinearShape",),
        "fxcompress.operators.shape": ("Shape",),
    },
)
