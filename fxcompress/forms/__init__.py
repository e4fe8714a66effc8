"""Forms of a factorization, found through one registry."""

from fxcompress.forms.form import Form, FormError, LinearShape
from fxcompress.forms.low_rank import LOW_RANK
from fxcompress.forms.pivoted import PIVOTED


def register(form: Form) -> Form:
    """Add a form to the registry.

    Raises:
        ValueError: the name is taken.
    """
    if form.name in FORMS:
        raise ValueError(f"a form named {form.name!r} is already registered")
    FORMS[form.name] = form
    return form


FORMS: dict[str, Form] = {}
register(LOW_RANK)
register(PIVOTED)

__all__ = ["FORMS", "Form", "FormError", "LinearShape", "register"]
