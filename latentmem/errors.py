"""Errors that a caller may want to tell apart; each is a `ValueError` whose message says what to do."""

from __future__ import annotations

from collections.abc import Iterable


class LatentmemError(ValueError):
    """What the package refuses: its message says what was expected, what came, and what to do.

    Args:
        message: for the owner of the store; may name other memories, processes and paths.
        public: the same for everybody else, who may know none of those; by default the message.
    """

    def __init__(self, message: str, public: str = "") -> None:
        super().__init__(message)
        self.public = public or message


class NotFoundError(LatentmemError):
    """There is no memory, version or key of this name."""

    @classmethod
    def memory(cls, name: str, known: Iterable[str] = ()) -> NotFoundError:
        """There is no memory `name`; `known` are the memories that there are."""
        there = f" (there are: {', '.join(known) or 'none yet'})"
        remedy = "`latentmem write` makes one."
        return cls(f"there is no memory {name!r}{there}. {remedy}", f"there is no memory {name!r}.")


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


class UnreadableError(LatentmemError):
    """A file holds no text that can be read: broken, encrypted, scanned, too large, or no text at all."""
