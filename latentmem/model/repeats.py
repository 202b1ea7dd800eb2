"""Where an answer begins to say again what it has said: there it ends."""

from __future__ import annotations

import re

_ENDS = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？]+[」』”]*|\n")  # of a sentence, or of a line
LEAST = 8  # characters of what counts as said again: "Yes." may come twice
LONGEST = 160  # characters of a part that is said three times in a row


class Once:
    """Text without what it says a second time; a sentence is held back while it may be an earlier one.

    A sentence of `LEAST` characters or more ends the text where it comes again. So does a part of two words or more
    that comes three times in a row, in whatever punctuation; lines without a full stop, such as code, may come twice.

    Attributes:
        stopped: something was said again.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._said: set[str] = set()  # the sentences, folded
        self._now = ""  # the sentence that is being said
        self._shown = 0  # of its characters
        self._tail = ""  # of all that was said

    def add(self, text: str) -> str:
        """What can be given of the text so far."""
        if self.stopped:
            return ""
        fresh = ""
        self._tail = (self._tail + text)[-3 * LONGEST :]
        self._now += text
        while end := _ENDS.search(self._now):
            fresh += self._end_sentence(end.end())
            if self.stopped:
                return fresh
        if _circles(self._tail):
            self.stopped = True
            return fresh
        start = _folded(self._now)
        return fresh if any(one.startswith(start) for one in self._said) else fresh + self._give(len(self._now))

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.stopped or _folded(self._now) in self._said else self._give(len(self._now))

    def _end_sentence(self, end: int) -> str:
        sentence = _folded(self._now[:end])
        if sentence in self._said:
            self.stopped = True
            return ""
        if len(sentence) >= LEAST and not self._now[end - 1].isspace():
            self._said.add(sentence)
        fresh = self._give(end)
        self._now, self._shown = self._now[end:], 0
        return fresh

    def _give(self, end: int) -> str:
        fresh, self._shown = self._now[self._shown : end], max(self._shown, end)
        return fresh


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _circles(text: str) -> bool:
    """Whether a text ends with a part that comes three times."""
    for n in range(LEAST, len(text) // 3 + 1):
        part = text[-n:]
        if part == text[-2 * n : -n] == text[-3 * n : -2 * n] and len(re.findall(r"[^\W\d_]+", part)) > 1:
            return True
    return False
