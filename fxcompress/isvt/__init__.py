"""ISVT: gradient steps and thresholdings of the ranks by turns, under one budget."""

from fxcompress.isvt.training import ISVT, Record

__all__ = ["ISVT", "Record"]
