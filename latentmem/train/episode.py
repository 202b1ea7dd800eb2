"""What one pass of training does, as a value."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from latentmem.model.prompts import Message, Prompts

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """What is read behind a memory.

    Args:
        prompt: ids that are given, without bos.
        answer: ids whose likelihood is the loss.
        about: number of the text in the episode; -1, -2, ...: of the last one that was written before it, and so on;
            None: it is about no text.
    """

    prompt: Ids
    answer: Ids
    about: int | None


@dataclass(frozen=True)
class Episode:
    """What one pass of training does.

    Args:
        objective: its name.
        names: of the texts' documents.
        texts: ids of each, oldest first.
        ages: for each text, how many updates are between it and the rows, falling.
        in_sequence: each text is written behind the ones before it, else beside them.
        fill: share of the pool that stands before the texts, from 0 to 1.
        rows: what is read.
        taught: the teacher's distribution is learned instead of the answer.
        seed: of every drop.
        from_pool: texts are written into the pool itself, without gradient, and the rows read all of it; where `fill`
            is less than 1, into a copy of its newest part, of which nothing stays.
        compression: tokens per slot of its texts; None: as the learner has it.
        replies: the rows' answers are empty, and the plain model itself gives each, so many tokens at most; 0: they
            are there.
        last: text that the rows read last, nearest to them, as a search puts it; None: in the order of writing.
    """

    objective: str
    names: tuple[str, ...]
    texts: tuple[Ids, ...]
    ages: tuple[int, ...]
    in_sequence: bool
    fill: float
    rows: tuple[Row, ...]
    taught: bool
    seed: int
    from_pool: bool = False
    compression: int | None = None
    replies: int = 0
    last: int | None = None

    @property
    def written(self) -> int:
        """Tokens that are written."""
        return sum(map(len, self.texts))

    @property
    def read(self) -> int:
        """Tokens that are read; of replies as many as there may be."""
        return sum(len(row.prompt) + len(row.answer) + self.replies for row in self.rows)


def message(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def conversation(prompts: Prompts, *turns: Message) -> Ids:
    """Turns of a conversation, and the beginning of the next one."""
    return tuple(prompts.chat(list(turns), bare=True))


def question_row(prompts: Prompts, question: str, answer: str, about: int | None, chats: bool) -> Row:
    """A question and its answer up to the end token.

    Args:
        chats: every third question is put as a turn of a conversation.
    """
    if chats and crc32(question.encode()) % 3 == 0:
        prompt = conversation(prompts, message("user", question))
    else:
        prompt = tuple(prompts.question(question, bare=True))
    return Row(prompt, answer_ids(prompts, question, answer), about)


def answer_ids(prompts: Prompts, question: str, answer: str) -> Ids:
    """An answer up to the end token."""
    end = prompts.tokenizer.eos_token_id
    return (*prompts.answer(question, answer), *([] if end is None else [end]))
