"""The version of the package, by itself so that every room may ask for it."""

__version__ = "0.1.0"
