"""Text piece by piece, while another thread generates it: of one row, or of several at once."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer
from transformers.generation.streamers import BaseStreamer

Piece = TypeVar("Piece")


class Gone(Exception):  # noqa: N818 - no error
    """Ends a generation whose reader has left, between two of its passes."""


class Left(StoppingCriteria):
    """Stops the generation of all rows once nobody reads what it gives."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def check(self) -> None:
        """Raise `Gone` if nobody reads any more."""
        if self.event.is_set():
            raise Gone

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device, dtype=torch.bool)


class Pieces(TextStreamer):
    """Gives the text of one row in pieces that end where words end, without special tokens."""

    def __init__(self, tokenizer: Any, give: Callable[[str], None], *, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._give = give

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._give(text)


class Rows(BaseStreamer):
    """Gives the text of several rows as (number, piece), each up to its end token; transformers' own take one row.

    Args:
        numbers: what each row is called.
        ends: tokens that end a row.
    """

    def __init__(
        self, tokenizer: Any, numbers: Sequence[int], ends: Collection[int], give: Callable[[tuple[int, str]], None]
    ) -> None:
        def named(i: int) -> Callable[[str], None]:
            return lambda text: give((i, text))

        self._rows: list[Pieces | None] = [Pieces(tokenizer, named(i), skip_prompt=False) for i in numbers]
        self._ends, self._prompt = ends, True

    def put(self, value: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        for row, token in enumerate(value.tolist()):
            streamer = self._rows[row]
            if streamer is None:
                continue
            streamer.put(torch.tensor([token]))
            if token in self._ends:
                streamer.end()
                self._rows[row] = None

    def end(self) -> None:
        for streamer in self._rows:
            if streamer is not None:
                streamer.end()


@cache
def _openmp() -> list[Any]:
    """The GNU OpenMP that torch computes with on a CPU under Linux, if it is loaded."""
    torch_folder, found = Path(torch.__file__).parent, []
    for path in (*torch_folder.glob("lib/libgomp*.so*"), *torch_folder.parent.glob("torch.libs/libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):  # not Linux, not loaded, or older than OpenMP 5
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            found.append(library.omp_pause_resource_all)
    return found


def release_threads() -> None:
    """End the helpers with which this thread computes; they come back when it computes again.

    Each thread that computes has helpers of its own. If there are more of them than cores, GNU OpenMP puts them to
    sleep after every loop, and a thread that generates beside one that only waits is much slower.
    """
    for pause in _openmp():
        pause(2)  # omp_pause_hard; it changes nothing if this thread has no helpers


def stream(generate: Callable[[Callable[[Piece], None], Left], Any]) -> Iterator[Piece]:
    """What `generate` gives while it runs in a thread of its own; leaving the loop stops it.

    Args:
        generate: called with the function that takes a piece, and the criterion by which it has to stop.

    Raises:
        Exception: whatever `generate` raised, after the pieces that came before.
    """
    queue: Queue[tuple[Piece] | None] = Queue()
    left, failed = Left(), []

    def run() -> None:
        try:
            generate(lambda piece: queue.put((piece,)), left)
        except Gone:
            pass
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failed.append(error)
        finally:
            queue.put(None)

    release_threads()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (piece := queue.get()) is not None:
            yield piece[0]
    finally:
        left.event.set()
        thread.join()
    if failed:
        raise failed[0]
