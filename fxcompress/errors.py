"""The errors that a user of fxcompress can meet.

Every message names the place and the remedy.  All of them derive from
:class:`FxcompressError`, so one ``except`` catches what this package says of its
own accord; anything else that escapes is a bug here or in the user's model.
"""

from __future__ import annotations


class FxcompressError(Exception):
    """Base class of every error raised on purpose by fxcompress."""


class RuleError(FxcompressError):
    """A rule file that cannot be used; the text holds every problem found in it."""


class RecordError(FxcompressError):
    """A model that could not be run on the example inputs it was given."""


class CalibrationError(FxcompressError):
    """Missing, empty, rejected or non-finite calibration data, weights or activations."""


class BudgetError(FxcompressError):
    """A budget that is malformed or that no choice of ranks can meet."""


class RewriteError(FxcompressError):
    """A rewritten model that failed its verification and could not be rolled back."""


class SaveError(FxcompressError):
    """A model that, as it is, could not be loaded again, or files that cannot be written."""


class LoadError(FxcompressError):
    """Saved files that do not fit together, or do not fit the model given."""


class TrainingError(FxcompressError):
    """Training under a budget that went wrong: values not finite, a state that does not fit."""


class FxcompressWarning(UserWarning):
    """Something that a user should know, and that is no error."""
