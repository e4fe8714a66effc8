"""The version of the package, which plans keep."""

__version__ = "0.1.0"
