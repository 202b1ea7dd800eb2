"""Errors that a caller may want to tell apart; each is a `ValueError` whose message says what to do."""

from __future__ import annotations


class LatentmemError(ValueError):
    """What the package refuses: its message says what was expected, what came, and what to do."""


class NotFoundError(LatentmemError):
    """There is no memory, version, source or key of this name."""


class NameTakenError(LatentmemError):
    """A new memory was given a name that another memory has."""


class InUseError(LatentmemError):
    """Somebody else holds the memory now, or another memory needs it."""


class DamagedError(LatentmemError):
    """A file or an object is missing, cut off, or altered."""


class OtherModelError(LatentmemError):
    """Another model, other adapters or another tokenizer wrote this memory."""


class TooLongError(LatentmemError):
    """A text and its answer do not fit into the model's context, behind the memory."""
