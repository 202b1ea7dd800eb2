"""Text -> token ids: how a text is wrapped when it is written, and how a question is put.

Whatever a user writes is tokenised with special tokens split, so that `<|im_end|>` in a note stays text and never
becomes a control token; control tokens come from the chat template alone.
"""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BASE_QUESTION = "Question: {question} Answer:"  # the paper's prompt, for models without a chat template
Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": ...}
Write = Literal["user", "both", "none"]  # whose turns of a conversation are written


def content_of(turn: Message) -> tuple[str | list[Message], str | None]:
    """What is written of a turn, and under which role: a user's words as plain text, an answer as a turn."""
    return (turn["content"], "raw") if turn["role"] == "user" else ([turn], None)


class TurnSource:
    """Names the source of a turn that is said now, "chat 2026-12-01 12:30 #3", when the number is known; once.

    Args:
        begins: how the name begins.
        name: of the turn that is answered, which the answer gets too.
    """

    def __init__(self, begins: str = "chat", name: str | None = None) -> None:
        self.begins, self.name = begins, name or ""

    def __call__(self, number: int) -> str:
        self.name = self.name or f"{self.begins} {datetime.now():%Y-%m-%d %H:%M} #{number}"
        return self.name


@dataclass(frozen=True)
class Style:
    """How texts and questions are put to one model; `loading.hub.STYLES` has those that are not these defaults.

    Args:
        wrap: a text is written raw (None) or as a turn of this role ("system", "user").
        system: the system message of a question; None: what the chat template puts there itself; "": none.
        question: the user turn of a question, with `{question}`.
        window: tokens of earlier turns that stand in the context of a conversation; 0: the memory alone has them.
    """

    wrap: str | None = None
    system: str | None = None
    question: str = "{question}"
    window: int = 1024


class Prompts:
    """The token ids of texts, turns and questions for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer, with a chat template for instruct models.
        style: how texts and questions are put.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, style: Style | None = None) -> None:
        self.tokenizer, self.style = tokenizer, style or Style()
        self._lock = threading.Lock()  # whether special tokens are split is a state of the tokenizer

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template; without one questions are put as "Question: ... Answer:"."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def text(self, text: str) -> list[int]:
        """Ids of plain text: no bos, and special tokens split.

        Raises:
            ValueError: the text is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the text is not valid Unicode; write UTF-8.") from None
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def written(self, text: str, role: str | None = None) -> list[int]:
        """Ids of a text as it is written: raw, or as a chat turn of `role` (by default the style's).

        Raises:
            ValueError: an empty text, or a role for a model without a chat template.
        """
        if not text.strip():
            raise ValueError("the text to be written is empty; give at least one character.")
        role = role or (self.style.wrap if self.chats else None)
        return self.text(text) if role in (None, "raw") else self._wrapped(text, role)

    def turn(self, message: Message) -> list[int]:
        """Ids of one turn of a conversation as it is written, with its role."""
        if self.chats:
            return self._wrapped(message["content"], message["role"])
        return self.text(_line(message))

    def question(self, question: str, *, bare: bool) -> list[int]:
        """Ids of a question, ready for the answer.

        Args:
            bare: leave out bos, because a memory's sink stands in front.

        Raises:
            ValueError: an empty question.
        """
        check_question(question)
        if not self.chats:
            return self._bos(bare) + self.text(BASE_QUESTION.format(question=question))
        return self.chat([{"role": "user", "content": self.style.question.format(question=question)}], bare=bare)

    def answer(self, question: str, answer: str) -> list[int]:
        """Ids of an answer as it stands behind its question; without a chat template a space is in between."""
        if self.chats:
            return self.text(answer)
        asked = BASE_QUESTION.format(question=question)
        before, both = self.text(asked), self.text(f"{asked} {answer}")
        return both[len(before) :] if both[: len(before)] == before else self.text(f" {answer}")

    def chat(self, messages: list[Message], *, bare: bool) -> list[int]:
        """Ids of a conversation, ready for the assistant's turn; contents stay plain text."""
        if not self.chats:
            return self._bos(bare) + self.text("".join(map(_line, messages)) + "Assistant:")
        system = self.style.system if messages[0]["role"] != "system" else None
        if system == "":
            turns = [i for message in messages for i in self.turn(message)]
            return self._control(self._leading_bos(bare)) + turns + self._control(self._answer_opening())
        if system is not None:
            messages = [{"role": "system", "content": system}, *messages]
        text = self._render([{**message, "content": _mark(i)} for i, message in enumerate(messages)], answer=True)
        if bare:
            text = text.removeprefix(self._leading_bos(False))
        ids: list[int] = []
        for i, part in enumerate(re.split(_MARK, text)):  # control, number of a message, control, ...
            ids += self.text(messages[int(part)]["content"]) if i % 2 else self._control(part)
        return ids

    @cached_property
    def frame(self) -> tuple[list[int], list[int]]:
        """Ids that stand before and after every question (without bos): the template's, and the style's.

        <user> Who was it    <end> <assistant>
        <user> ten days ago  <end> <assistant>
        before               after               = what two questions share at both ends
        """
        one, other = (self.question(text, bare=True) for text in ("Who was it", "ten days ago"))
        before = shared_length(one, other)
        after = shared_length(one[before:][::-1], other[before:][::-1])
        return one[:before], one[len(one) - after :]

    @property
    def opening(self) -> list[int]:
        """Ids that stand in front of everything where there is no memory: bos, if the model wants one."""
        return self._control(self._leading_bos(False)) if self.chats else self._bos(False)

    @property
    def first_token(self) -> int:
        """The token whose hidden states are the sink: bos, else the first of the chat template.

        Raises:
            ValueError: the tokenizer has neither.
        """
        if self.tokenizer.bos_token_id is not None:
            return int(self.tokenizer.bos_token_id)
        if self.chats:
            return self.chat([{"role": "user", "content": "."}], bare=False)[0]
        raise ValueError("the tokenizer has no bos token and no chat template; give `first_token`, the id of the sink.")

    @property
    def identity(self) -> str:
        """Hash of the tokenizer."""
        return hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()

    def _wrapped(self, text: str, role: str) -> list[int]:
        before, after = self._turn(role)
        return self._control(before) + self.text(text) + self._control(after)

    def _leading_bos(self, bare: bool) -> str:
        """The bos token, if the template puts it in front of all; where it opens every turn it belongs to the turns."""
        bos = self.tokenizer.bos_token
        text = self._render([{"role": "user", "content": "."}], answer=True)
        return bos if not bare and bos and text.startswith(bos) and text.count(bos) == 1 else ""

    def _bos(self, bare: bool) -> list[int]:
        with self._lock:
            return [] if bare else list(self.tokenizer.encode("", add_special_tokens=True))

    def _control(self, text: str) -> list[int]:
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _render(self, messages: list[Message], *, answer: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"this model's chat template refuses turns of {roles}: {error}.") from error

    def _answer_opening(self) -> str:
        user = [{"role": "user", "content": "."}]
        return self._render(user, answer=True).removeprefix(self._render(user))

    def _turn(self, role: str) -> tuple[str, str]:
        """What the template puts before and after the content of one turn, without its default system message."""
        if not self.chats:
            raise ValueError(
                f"the role {role!r} needs a model with a chat template; this one has none, write raw text."
            )
        check_role(role)
        user, assistant = {"role": "user", "content": _mark(0)}, {"role": "assistant", "content": _mark(1)}
        two = self._render([user, assistant])
        second = self._render([user, assistant, {"role": "user", "content": _mark(2)}]).removeprefix(two)
        if role == "user":
            turn = second
        elif role == "assistant":
            turn = two.removeprefix(self._render([user]))
        else:
            first = second.replace(_mark(2), _mark(0))
            turn = self._render([{"role": "system", "content": _mark(3)}, user]).removesuffix(first)
        before, _, after = re.split(_MARK, turn)
        return before, after


def check_question(question: str) -> None:
    """A ValueError if there is nothing asked."""
    if not question.strip():
        raise ValueError("the question is empty.")


def check_role(role: str | None) -> None:
    """A ValueError if a text can not be written under this role."""
    if role not in (None, "raw", "system", "user", "assistant"):
        raise ValueError(f"role must be system, user, assistant or raw, got {role!r}.")


_MARK = r"\x02content(\d+)\x03"  # stands for the content of a message while the template is rendered


def _mark(i: int) -> str:
    return f"\x02content{i}\x03"


def shared_length(one: list[int], other: list[int]) -> int:
    """How many ids two lists have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _line(message: Message) -> str:
    return f"{message['role'].capitalize()}: {message['content']}\n"
