"""Tokens -> text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Detokenizer:
    """Gives text as soon as it can not change any more, up to a stop string.

    Args:
        tokenizer: its special tokens are left out.
        stop: strings that end the text; they are not part of it.

    Attributes:
        stopped: a stop string came.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._start = self._end = 0  # ids[start:end] were given, and are decoded again with what follows
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is new with this token."""
        self._ids.append(token)
        before = self._decoded(self._start, self._end)
        text = self._decoded(self._start, len(self._ids))
        if len(text) <= len(before) or text.endswith("\ufffd"):  # the rest of a character comes with the next token
            return ""
        self._start, self._end = self._end, len(self._ids)
        return self._up_to_stop(text[len(before) :])

    def rest(self) -> str:
        """The text that was held back, at the end."""
        text = self._decoded(self._start, len(self._ids))[len(self._decoded(self._start, self._end)) :]
        rest = self._up_to_stop(text) + self._held
        self._held = ""
        return rest

    def _decoded(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _up_to_stop(self, text: str) -> str:
        """As much of the text as is no stop string and can not become one."""
        text, self._held = self._held + text, ""
        stops = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if stops:
            self.stopped = True
            return text[: min(stops)]
        held = max((n for stop in self._stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]
