"""Operators with a weight that can be rewritten: their shapes and modules."""
