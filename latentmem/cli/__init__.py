"""The command line. It parses, calls and prints; nothing else: one module for each panel of `latentmem --help`."""

from __future__ import annotations

import sys

# The panels of --help are listed in this order:
# isort: off
from latentmem.cli import memories, versions, sources, copies, serving, training, evaluation  # noqa: F401

# isort: on
from latentmem.cli.base import app, error

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; what is wrong with the input is one sentence and exit code 2."""
    try:
        app()
    except ValueError as wrong:
        error(str(wrong))
        sys.exit(2)
    except OSError as wrong:
        error(f"{wrong.strerror or wrong}{f': {wrong.filename}' if wrong.filename else ''}")
        sys.exit(1)
