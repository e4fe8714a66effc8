"""The errors that a user of fxcompress can meet.

Every message names the place and the remedy.  All of them derive from
:class:`FxcompressError`, so one ``except`` catches what this package says of its
own accord; anything else that escapes is a bug here or in the user's model.
"""

from __future__ import annotations

LONGEST = 4000
"""Characters of a message about saved files."""


def printable(text: str, most: int | None = None) -> str:
    """A text without characters that a terminal would act upon: they are written as escapes.

    Those are control characters, line breaks among them, and invisible ones such as marks that
    turn the direction of writing.

    Args:
        text: from anywhere.
        most: characters that are kept, if it is longer.

    >>> printable("up\\x1b[2J →\\n")
    'up\\\\x1b[2J →\\\\n'
    """
    if most is not None and len(text) > most:
        text = f"{text[:most]}..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class FxcompressError(Exception):
    """Base class of every error raised on purpose by fxcompress."""


class RuleError(FxcompressError):
    """A rule file that cannot be used; the text holds every problem found in it."""


class RecordError(FxcompressError):
    """A model that could not be run on the example inputs it was given."""


class CalibrationError(FxcompressError):
    """Missing, empty, rejected or non-finite calibration data, weights or activations."""


class MemoryLimitError(FxcompressError):
    """A limit on memory, or a disk, that is too small for what was asked; says what would do."""


class ProcessError(FxcompressError):
    """Processes of ``torch.distributed`` that cannot go on together: one stopped, or differs."""


class BudgetError(FxcompressError):
    """A budget that is malformed or that no choice of ranks can meet."""


class RewriteError(FxcompressError):
    """A rewritten model that failed its verification and could not be rolled back."""


class SaveError(FxcompressError):
    """A model that, as it is, could not be loaded again, or files that cannot be written."""


class LoadError(FxcompressError):
    """Saved files that do not fit together, or do not fit the model given.

    Saved files may come from a stranger, and parts of them stand in the message: it is one line
    that a terminal only shows (:func:`printable`).
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split()), LONGEST))


class CheckpointError(FxcompressError):
    """A checkpoint of another run, or one that cannot be read."""


class TrainingError(FxcompressError):
    """Training under a budget that went wrong: values not finite, a state that does not fit."""


class FxcompressWarning(UserWarning):
    """Something that a user should know, and that is no error."""
