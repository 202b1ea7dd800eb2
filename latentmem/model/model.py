"""A language model with a memory: write, ask, stream, generate, score (letters: `latentmem.core`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, overload

from torch import Tensor
from transformers import Cache

from latentmem import documents
from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.files import snapshot as _snapshot  # noqa: F401 - gives `Memory` its `save` and `load`
from latentmem.model import generating, writing
from latentmem.model.backbone import Ids
from latentmem.model.context import Context
from latentmem.model.generating import Options
from latentmem.model.prompts import Message
from latentmem.model.provenance import Tracer
from latentmem.model.writing import Progress, Updates

Texts = str | Sequence[str]
Writable = str | Path | Sequence[str | Path]
Memories = Memory | Sequence[Memory]
AnyMemory = TypeVar("AnyMemory", Memory, list[Memory], Sequence[Memory])  # one of them gives one, many give many
AnyText = TypeVar("AnyText", str, list[str], Sequence[str])


class MemoryModel(Tracer):
    """A transformers decoder that reads and writes memories; made by `latentmem.load`.

    The model is fixed and holds no memory: memories are values that go in and come out. What is derived from a memory
    (its keys and values) is kept as long as that memory is referenced somewhere.

    Args:
        base: the plain transformers model; its weights are frozen here.
        tokenizer: its tokenizer, or None: then only the methods that take token ids work.
        name: how it was loaded; written into its memories as a hint.
        style: how texts and questions are put.
        adapters: the write/read pair inside `base`, if any.
        trained: bos, mark and pool of a released checkpoint, if any.
        shape: settings of the memory that the adapters of the preset "exact" were trained with, if they are known.
        projectors: a trained retriever of a long-term memory, if any.
        coder: identity of the coder of the form "coded", if there is one; see `coding.codec.register`.
        first_token: id of the sink; by default bos, else the first id of the chat template.
        identity: hash of the weights; by default `fingerprint(base)`.

    Raises:
        ValueError: an architecture that is not understood.
    """

    def empty(
        self,
        N: int | None = None,
        K: int | None = None,
        preset: str | None = None,
        compression: int | None = None,
        seed: int | None = None,
        choice: str | None = None,
        longterm: int | Mapping[str, object] | LongTermSettings | None = None,
        order: str | None = None,
        form: str | None = None,
        settings: MemorySettings | None = None,
    ) -> Memory:
        """A memory to begin with: one that holds nothing, or, for a released checkpoint, the checkpoint's own pool.

        A model of `latentmem.load` makes memories that remember: 1,536 slots, 512 more for what was dropped, kept coded
        in 256 MiB. `longterm=0` forgets as the paper does, `form="exact"` keeps hidden states. What else is not given
        is as the adapters were trained; without adapters as follows.

        Args:
            N: slots that a layer can hold; by default as above, else 2048, or so much less that they fit the context.
            K: slots that one update may write per layer; by default 256, or an eighth of a smaller N.
            preset: "exact" (default) or "paper"; see `core.write`.
            compression: tokens per slot, by default 1, "exact" only; above 1 only a trained model reads them well.
            seed: determines every random drop, by default 0.
            choice: which token of c becomes a slot: "last" of each group (default), or "surprise", the least expected.
            longterm: R, slots that a question takes of what was dropped, or a mapping for `LongTermSettings`; 0: none.
            order: how a question reads the slots: "written", "best-last" (default with a long-term part), "best-only".
            form: what is kept of an update: "exact" (hidden states), "int8" (keys and values in 8 bits), or "coded".
            settings: all of these and more in one object; what is given beside it goes before.

        Raises:
            ValueError: sizes that do not fit each other, the model's context, or the checkpoint.
        """
        sizes = {"N": N, "K": K, "preset": preset, "compression": compression}
        ways = {"seed": seed, "choice": choice, "longterm": LongTermSettings.of(longterm), "order": order, "form": form}
        return writing.empty(self, (settings or MemorySettings()).override(**sizes, **ways))

    def blank(self) -> Memory:
        """A memory without a slot, so that the plain model answers, also for a checkpoint with a pool of its own."""
        pool = self.empty()
        slots, births, origins = pool.slots[:, :0], pool.births[:, :0], pool.origins[:, :0]
        return replace(pool, slots=slots, births=births, origins=origins, longterm=None)

    # --- text -------------------------------------------------------------------------------------------------------

    def tokens(self, content: str | Sequence[Message], role: str | None = None) -> list[int]:
        """Token ids of a text, or of turns of a conversation, as they are written.

        Args:
            role: of a text, as in `write`; turns have roles of their own.

        Raises:
            ValueError: an empty text, no turns, an unknown role, or a model without a tokenizer.
        """
        prompts = self.prompts_or_raise()
        if isinstance(content, str):
            return prompts.written(content, role)
        if not content:
            raise ValueError("there is nothing to be written; give at least one turn.")
        return [i for turn in content for i in prompts.turn(turn)]

    def write(
        self,
        memory: AnyMemory,
        text: Writable,
        source: str | None = None,
        role: str | None = None,
        progress: Progress | None = None,
    ) -> AnyMemory:
        """Write a text into a memory, or each of several texts into a memory of its own, at once (see `write_ids`).

        Args:
            text: not empty, or the path of a file that `documents` reads; special tokens in it stay plain text.
            source: the name under which it is accounted; by default that of the file, else "text".
            role: "raw", or "system", "user", "assistant" for a turn of the chat template; by default the model's style.
            progress: called after each piece with (tokens done, tokens in all).

        Returns:
            The next memory, or a list of them; the given ones stay valid.

        Raises:
            ValueError: what is no text and no file of text, an empty one, an unknown role, lists of different lengths,
                or a memory of another model.
        """
        name = source or (text.name if isinstance(text, Path) else "text")
        several = isinstance(text, Sequence) and not isinstance(text, str | bytes)
        read = [documents.text_of(one) for one in text] if several else documents.text_of(text)  # type: ignore[union-attr]
        ids = [self.tokens(one, role) for _, one in _pairs(memory, read)]
        return self.write_ids(memory, ids[0] if isinstance(memory, Memory) else ids, name, progress)

    def ask(self, memory: Memories, question: AnyText, **generate_kwargs: Any) -> AnyText:
        """Answer a question with a memory, or each of several with its own, at once.

        Greedy, at most 128 new tokens, unless `generate_kwargs` says otherwise.

        Raises:
            ValueError: an empty question, lists of different lengths, a question that does not fit into the model's
                context, or options that give more than one answer.
        """
        if generate_kwargs.get("num_return_sequences", 1) != 1 or generate_kwargs.get("return_dict_in_generate"):
            raise ValueError("`ask` gives one answer as text; use `generate_ids` for several, or for scores.")
        prompts = self._questions(memory, question)
        if isinstance(memory, Memory):
            outputs = [self.generate_ids(memory, prompts[0], **generate_kwargs)]
        else:
            outputs = self.generate_ids(memory, prompts, **generate_kwargs)
        answers = [
            self.tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip()
            for output, prompt in zip(outputs, prompts, strict=True)
        ]
        return answers[0] if isinstance(question, str) else answers

    @overload
    def stream(self, memory: Memory, question: str, **generate_kwargs: Any) -> Iterator[str]: ...

    @overload
    def stream(
        self, memory: Sequence[Memory], question: Sequence[str], **generate_kwargs: Any
    ) -> Iterator[tuple[int, str]]: ...

    def stream(
        self, memory: Memories, question: Texts, **generate_kwargs: Any
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Answer a question piece by piece, or several at once; leaving the loop stops the generation.

        Returns:
            Pieces of text; for several questions pairs (number of the question, piece), as they come.
        """
        prompts = self._questions(memory, question)
        if isinstance(memory, Memory):
            return self.stream_ids(memory, prompts[0], **generate_kwargs)
        return self.stream_ids(memory, prompts, **generate_kwargs)

    def _questions(self, memory: Memories, question: Texts) -> list[list[int]]:
        pairs, prompts = _pairs(memory, question), self.prompts_or_raise()
        return [prompts.question(text, bare=not one.is_empty) for one, text in pairs]

    # --- token ids --------------------------------------------------------------------------------------------------

    def new_slots(self, memory: Memory, ids: Ids) -> Tensor:
        """What one update would write: the new slots of one piece of text, differentiable where gradients are on.

        Args:
            ids: at most `memory.piece` tokens, [n].

        Returns:
            [L, k, d]; "exact": k = ceil(n / c), "paper": k = K once the memory is full.
        """
        return writing.new_slots(self, memory, ids)

    def write_ids(
        self,
        memory: AnyMemory,
        ids: Ids | Sequence[Ids],
        source: str = "text",
        progress: Progress | None = None,
        updates: Updates | None = None,
    ) -> AnyMemory:
        """Write tokens into a memory, in pieces of at most `memory.piece`, one update each.

        Several memories take their texts at once, piece by piece: each as if it were written alone, but for rounding
        (1e-4 in float32), because padding and another batch size round otherwise. The preset "paper" takes its turn
        one memory after another.

        Args:
            ids: tokens, [n], n >= 1, written as they are, without any wrapping; or as many of them as memories.
            source: the name under which they are accounted.
            progress: called after each piece with (tokens done, tokens in all).
            updates: called with each `Update` of one memory, before `progress`; `core.memory.update` repeats it.

        Returns:
            The next memory, or a list of them; the given ones stay valid.

        Raises:
            ValueError: no tokens, ids outside the vocabulary, or a memory of another model.
        """
        memories, texts = ([memory], [ids]) if isinstance(memory, Memory) else (memory, ids)
        after = writing.write_all(self, memories, [self.ids(i) for i in texts], source, progress, updates)  # type: ignore[arg-type]
        return after[0] if isinstance(memory, Memory) else after  # type: ignore[return-value]

    @overload
    def generate_ids(self, memory: Memory, ids: Ids, cache: Cache | None = ..., **generate_kwargs: Any) -> Any: ...

    @overload
    def generate_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], cache: None = ..., **generate_kwargs: Any
    ) -> list[Tensor]: ...

    def generate_ids(
        self, memory: Memories, ids: Ids | Sequence[Ids], cache: Cache | None = None, **generate_kwargs: Any
    ) -> Any:
        """Transformers' own `generate` behind a memory, or behind several at once: greedy, sampling, beams, streaming.

        Args:
            ids: the prompt, [n], or as many of them as memories.
            cache: of this memory and of a text already read (`text_cache`), to go on from; then `ids` is what follows.
            generate_kwargs: as in `generate`; greedy unless `do_sample=True`.

        Returns:
            What `generate` returns: prompt and continuation, [rows, n + new]; for several memories a list of such
            tensors, each up to where the last of its rows ended.

        Raises:
            ValueError: no room in the model's context, or options that several memories do not take.
        """
        options = Options(self, generate_kwargs)
        asked = generating.asked(self, memory, ids, options, cache)
        outputs = generating.generate(self, *asked, options, cache)
        return outputs[0] if isinstance(memory, Memory) else outputs

    def generate_rows(self, context: Context, ids: Sequence[Ids], max_new_tokens: int) -> list[Tensor]:
        """Greedy continuations of B prompts behind one context, or each behind its own, at once.

        Args:
            ids: B prompts, [n] each; they are padded on the left.

        Returns:
            B tensors of new ids, [at most max_new_tokens] each, up to an end token and with it.

        Raises:
            ValueError: empty rows, or prompt and answer do not fit into the model's context.
        """
        options = Options(self, {"do_sample": False, "max_new_tokens": max_new_tokens})
        outputs = generating.generate(self, context, ids, options)
        return [output[0, len(row) :] for output, row in zip(outputs, ids, strict=True)]

    @overload
    def stream_ids(
        self, memory: Memory, ids: Ids, cache: Cache | None = ..., **generate_kwargs: Any
    ) -> Iterator[str]: ...

    @overload
    def stream_ids(
        self, memory: Sequence[Memory], ids: Sequence[Ids], cache: None = ..., **generate_kwargs: Any
    ) -> Iterator[tuple[int, str]]: ...

    def stream_ids(
        self, memory: Memories, ids: Ids | Sequence[Ids], cache: Cache | None = None, **generate_kwargs: Any
    ) -> Iterator[str] | Iterator[tuple[int, str]]:
        """Continue token ids and give the text in pieces; arguments as in `generate_ids`, pieces as in `stream`."""
        options = Options(self, generate_kwargs)
        asked = generating.asked(self, memory, ids, options, cache)
        pieces = generating.stream(self, *asked, options, cache)
        return (piece for _, piece in pieces) if isinstance(memory, Memory) else pieces


def _pairs(memory: Memories, text: Texts) -> list[tuple[Memory, str]]:
    """Each memory with its text, of one of both or of as many of both.

    Raises:
        ValueError: no memory, no text, one of one and several of the other, or lists of different lengths.
    """
    memories, questions = _several(memory, Memory), _several(text, str)
    for one in memories:
        if not isinstance(one, Memory):
            raise ValueError(f"a memory comes from `empty`, `write` or `Memory.load`: got {type(one).__name__}.")
    for one in questions:
        if not isinstance(one, str):
            raise ValueError(f"a question must be a str, got {type(one).__name__}.")
    if isinstance(memory, Memory) != isinstance(text, str) or len(memories) != len(questions):
        sizes = [
            "one" if isinstance(argument, Memory | str) else f"a list of {len(argument)}" for argument in (memory, text)
        ]
        raise ValueError(f"give one memory and one text, or lists of the same length: got {' and '.join(sizes)}.")
    return list(zip(memories, questions, strict=True))


def _several(argument: Any, kind: type) -> Sequence[Any]:
    return argument if isinstance(argument, Sequence) and not isinstance(argument, kind | bytes) else [argument]
