"""Colours of what happened to operators, for programs that take one."""

COLOURS = ("#ffffff", "#cfe0fb", "#e6d8f5", "#f6e6b8", "#f8d0d6", "#cdebdb")
"""A background for each of :data:`fxcompress.picture.boxes.STATUSES`, for black text."""
