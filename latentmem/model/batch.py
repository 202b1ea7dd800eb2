"""Rows of text that go on together, token by token, each behind its own memory; rows join and leave at any time.

    position   0 ......... P-1 | P ......................... P+n-1
    row 0      first, memory 0 | prompt 0, answer 0
    row 1        .... memory 1 |     prompt 1, answer 1             shorter ones are padded on the left

One pass reads a part of all prompts or, once they are read, the last token of each answer, and each row gets its next
token. `ask`, `stream`, `generate_ids`, conversations and the server all make their tokens here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from latentmem.decoder.adapters import READ
from latentmem.decoder.cache import KVPrefix, MemoryCache, joined, memory_cache
from latentmem.longterm.search import RetrievedPrefix
from latentmem.model.backbone import Ids
from latentmem.model.context import placed
from latentmem.model.reader import Reader
from latentmem.model.repeats import Once

COLDEST = 1e-4  # temperature, below which the most likely token is drawn anyway
SPARE = 64  # columns that may be padding in all rows before the texts are moved together
Choose = Callable[[Tensor], list[int]]  # logits behind each row [B, vocab] -> the next token of each


@dataclass(eq=False)
class Row:
    """One answer.

    Args:
        ids: the prompt, [n].
        front: what stands in front of it, if anything.
        temperature, top_p: how tokens are drawn; 0 takes the most likely one.
        generator: what tokens are drawn with.
        said: tokens of the answer; the last one is not read yet.
        ended: the answer takes no more tokens.
    """

    ids: Ids
    front: KVPrefix | None
    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    said: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def token(self) -> int:
        """The last token of the answer."""
        return self.said[-1]


class Batch:
    """Rows that go through the model together: all behind something, or all behind nothing.

    Args:
        rows: of equally long prompts, if the model sees a window of the last positions only.
        adapter: which reads what stands in front.
        cache: over what stands in front of the rows, and for one row of a text that was read before.
        chunk: positions of the prompts that are read in one pass; 0: all.
        pad: the id in front of shorter prompts.

    Attributes:
        ids, mask: the prompts, padded on the left, and 1 where they have a token, [B, n].
    """

    def __init__(
        self,
        llm: Reader,
        rows: Sequence[Row],
        *,
        adapter: str | None = READ,
        cache: Cache | None = None,
        chunk: int = 0,
        pad: int = 0,
    ) -> None:
        self.llm, self.rows, self._chunk = llm, list(rows), chunk
        fronts = self._fronts
        self._adapter = adapter if fronts else None
        if cache is None:
            cache = memory_cache(fronts, llm.decoder, store=True, stacked=0) if fronts else DynamicCache()
        self.cache: Cache = cache
        past = cache.get_seq_length() - max((front.P for front in fronts), default=0)
        longest = max(len(row.ids) for row in self.rows)
        ids = torch.full((len(self.rows), longest), pad, dtype=torch.long)
        text = torch.ones(len(self.rows), past + longest, dtype=torch.long)  # 1 where a row has a token
        for i, row in enumerate(self.rows):
            start = longest - len(row.ids)
            ids[i, start:] = torch.as_tensor(row.ids)
            text[i, past : past + start] = 0
        self.ids = self._unread = ids.to(llm.decoder.device)
        self._text = text.to(llm.decoder.device)
        self.mask = self._text[:, past:]
        self._padded = not bool(text.all()) or self._fronts_differ

    @property
    def reads(self) -> bool:
        """Whether prompts are still being read."""
        return bool(self._unread.shape[1])

    @torch.no_grad()
    def advance(self, choose: Choose | None = None) -> bool:
        """Read on; True if each row that goes on has a new token.

        Args:
            choose: the next tokens; by default as each row says.
        """
        if self.reads:
            size = self._chunk or self._unread.shape[1]
            tokens, self._unread = self._unread[:, :size], self._unread[:, size:]
        else:
            self._search_again()
            tokens = torch.tensor([[row.token] for row in self.rows], device=self._text.device)
            self._text = torch.cat([self._text, torch.ones_like(tokens)], dim=1)
        logits = self._read(tokens)
        if self.reads:
            return False
        for row, token in zip(self.rows, (choose or self._choose)(logits), strict=True):
            if not row.ended:
                row.said.append(token)
        return True

    def keep(self, rows: Sequence[Row], others: Batch | None = None) -> None:
        """Go on with these rows, of this batch and of another; the prompts of both are read."""
        batches = [batch for batch in (self, others) if batch is not None]
        staying = set(rows)
        indices = [[i for i, row in enumerate(batch.rows) if row in staying] for batch in batches]
        parts, texts = [], []
        for batch, kept in zip(batches, indices, strict=True):
            if kept:
                lengths = batch._text[kept].sum(1).tolist()
                parts.append((batch.cache, kept, lengths))
                texts += lengths
        self.rows = [batch.rows[i] for batch, kept in zip(batches, indices, strict=True) for i in kept]
        self.cache = joined(parts, self._fronts, self.llm.decoder.L)
        longest = max(texts)
        beyond = longest - torch.tensor(texts, device=self._text.device)[:, None]
        self._text = (torch.arange(longest, device=self._text.device)[None] >= beyond).long()
        self._unread = self._unread.new_zeros(len(self.rows), 0)
        self._padded = min(texts) < longest or self._fronts_differ

    def sparse(self, live: Sequence[Row]) -> bool:
        """Whether so much of the batch is padding or has ended that it should be moved together."""
        lengths, staying = self._text.sum(1).tolist(), set(live)
        longest = max(n for row, n in zip(self.rows, lengths, strict=True) if row in staying)
        return 2 * len(live) <= len(self.rows) or self._text.shape[1] > 2 * longest + SPARE

    @property
    def _fronts(self) -> list[KVPrefix]:
        return [row.front for row in self.rows if row.front is not None]

    @property
    def _fronts_differ(self) -> bool:
        return len({front.P for front in self._fronts}) > 1

    def _read(self, tokens: Tensor) -> Tensor:
        """Logits of the next token behind tokens [B, n], [B, vocab] float32."""
        n = tokens.shape[1]
        text = self._text[:, : self._text.shape[1] - self._unread.shape[1]]
        lengths = [row.front.P if row.front else 0 for row in self.rows]
        where: dict[str, Tensor | None] = {"attention_mask": None}
        if self._padded:
            where |= placed(lengths, text, n)
        else:
            end = max(lengths) + text.shape[1]
            where["position_ids"] = torch.arange(end - n, end, device=tokens.device).expand(len(tokens), -1)
        with self.llm.using(self._adapter):
            output = self.llm.base(
                input_ids=tokens, **where, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        return output.logits[:, -1].float()

    def _search_again(self) -> None:
        """Answers that have grown enough take other slots of their long-term memories.

        Of several answers behind one memory the first that goes on is what is searched for.
        """
        changed, searched = False, set[int]()
        for row in self.rows:
            prefix = row.front
            if row.ended or not isinstance(prefix, RetrievedPrefix) or id(prefix) in searched:
                continue
            searched.add(id(prefix))
            if prefix.every and len(row.said) % prefix.every == 0:
                changed |= self.llm.search_again(prefix, row.said[-prefix.every :])
        if changed and isinstance(self.cache, MemoryCache):
            self.cache.changed()

    def _choose(self, logits: Tensor) -> list[int]:
        best = logits.argmax(-1).tolist()
        return [
            token if row.temperature == 0 else draw(scores, row.temperature, row.top_p, row.generator)
            for row, scores, token in zip(self.rows, logits, best, strict=True)
        ]


def draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A token drawn by its probability, among the most likely ones that have `top_p` together.

    Args:
        logits: [vocab].
    """
    scores = logits.double().cpu()
    shares = ((scores - scores.max()) / max(temperature, COLDEST)).softmax(-1)
    if top_p == 1:
        return int(torch.multinomial(shares, 1, generator=generator))
    shares, tokens = shares.sort(descending=True)
    shares[1:] = shares[1:].where(shares.cumsum(0)[:-1] < top_p, 0)
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])


class Detokenizer:
    """Gives text as soon as it can not change any more, up to a stop string.

    Args:
        tokenizer: its special tokens are left out.
        stop: strings that end the text; they are not part of it.
        repeats: the text may say a sentence again; else it ends there.

    Attributes:
        stopped: a stop string or a repeated sentence came.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), repeats: bool = True) -> None:
        self._tokenizer, self._stop, self._once = tokenizer, tuple(stop), None if repeats else Once()
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
        return self._new(self._up_to_stop(text[len(before) :]))

    def rest(self) -> str:
        """The text that was held back, at the end."""
        text = self._decoded(self._start, len(self._ids))[len(self._decoded(self._start, self._end)) :]
        rest = self._new(self._up_to_stop(text) + self._held)
        self._held = ""
        return rest + (self._once.rest() if self._once else "")

    def _new(self, text: str) -> str:
        """As much of the text as says nothing again."""
        if self._once is None:
            return text
        text = self._once.add(text)
        self.stopped |= self._once.stopped
        return text

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
