"""ISVT: iterate a gradient step and a thresholding of ranks, under one budget."""
