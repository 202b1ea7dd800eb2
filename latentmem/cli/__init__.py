"""The command line parses, calls and prints, and nothing else."""

from __future__ import annotations

import sys

# The panels of --help are listed in this order:
# isort: off
from latentmem.cli import memories, demo, versions, serving, training, evaluation  # noqa: F401

# isort: on
from latentmem.cli.base import app
from latentmem.cli.printing import error

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line; a mistake in the input is one sentence and exit code 2."""
    try:
        app()
    except ValueError as mistake:
        error(str(mistake))
        sys.exit(2)
    except OSError as fault:
        error(f"{fault.strerror or fault}{f': {fault.filename}' if fault.filename else ''}")
        sys.exit(1)
