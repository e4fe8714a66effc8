"""The command line: the verbs of the Python API.

A model is a Hugging Face directory, or ``module:function`` / ``file.py:function`` for a
function without arguments that returns one.  Data are a file or a folder
(:mod:`fxcompress.cli.data`), or again ``file.py:function``, returning an iterable of batches.
What takes seconds to import (torch) is imported by the commands that need it: help, ``check`` and
``presets`` do not.
"""

from fxcompress.cli import compressing, drawing, looking, rule_files, sweeping
from fxcompress.cli.app import app
from fxcompress.cli.main import main

__all__ = ["app", "compressing", "drawing", "looking", "main", "rule_files", "sweeping"]
