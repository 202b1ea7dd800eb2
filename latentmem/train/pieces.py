"""Files of texts -> memories of the calibration: pieces that fill one memory, and the piece that comes after them.

Each file is a stream of pieces. The files take turns: memory m takes pieces of file m mod (number of files). A file
that has ended is passed over, and begins anew only once all files have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from latentmem import data

if TYPE_CHECKING:
    from torch import Tensor

    from latentmem.model.model import MemoryModel

PIECE = 256  # tokens of a piece
SHORT = 8  # tokens; what is shorter is left out
BLOCK = 1 << 14  # characters of a text file that are one text
KINDS = (".jsonl", ".jsonl.gz", ".txt")


def check(files: Sequence[Path]) -> None:
    """Refuse what is no file of texts; a ValueError."""
    if not files:
        raise ValueError(f"calibration needs texts: give files ({', '.join(KINDS)}).")
    for file in files:
        if not file.name.endswith(KINDS):
            raise ValueError(f"{file}: a file of texts ({', '.join(KINDS)}) was expected.")
        if not file.is_file():
            raise ValueError(f"{file}: no such file.")


def texts(file: Path) -> Iterator[str]:
    """The texts of a file: "text" of each row, or blocks of a text file that end where a line ends.

    Raises:
        ValueError: a file that can not be read, or a row without a text.
    """
    if file.suffix == ".txt":
        yield from _blocks(file)
        return
    for number, row in enumerate(data.rows_of_lines(file), 1):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"row {number} of {file} has no key 'text' with a text; its keys are {', '.join(row)}.")
        yield text


def _blocks(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8") as stream:
            while block := stream.read(BLOCK):
                yield block + stream.readline(BLOCK)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} can not be read as UTF-8 text ({error}). Mend the file, or leave it out.") from None


def pieces(llm: MemoryModel, file: Path) -> Iterator[Tensor]:
    """The tokens of a file's texts in pieces, [8 to 256] each."""
    for text in texts(file):
        if text.strip():
            yield from (piece for piece in llm.ids(llm.tokens(text)).split(PIECE) if len(piece) >= SHORT)


Filling = tuple[list["Tensor"], "Tensor"]  # pieces that fill one memory, and the one after them


def fillings(llm: MemoryModel, files: Sequence[Path], slots: int, note: Callable[[str], object]) -> Iterator[Filling]:
    """What one memory after another is filled with, without end.

    Args:
        slots: tokens that a memory takes.
        note: is told which files have ended.

    Raises:
        ValueError: no file has as many tokens as one memory takes.
    """
    streams = [pieces(llm, file) for file in files]
    ended: set[int] = set()
    used_of: set[int] = set()  # files of which a memory has been filled
    for number in count():
        filling = None
        while filling is None:
            if len(ended) == len(files):
                if not used_of:
                    raise ValueError(
                        f"the texts are too short: a memory takes {slots} tokens of one file, and a piece that comes "
                        f"after them. Give longer files, or join them."
                    )
                note("All texts are read. They are read again from the beginning; more texts would be better.")
                streams = [pieces(llm, file) for file in files]
                ended = set(range(len(files))) - used_of
            i = next(i % len(files) for i in count(number) if i % len(files) not in ended)
            filling = _filling(streams[i], slots)
            if filling is None:
                ended.add(i)
                if i not in used_of:
                    note(f"{files[i]} is too short: a memory takes {slots} tokens and a piece more. It is left out.")
                elif len(ended) < len(files):
                    note(f"{files[i]} has ended; the calibration goes on with the other files.")
        used_of.add(i)
        yield filling


def _filling(stream: Iterator[Tensor], slots: int) -> Filling | None:
    """The next pieces of a file; None: there are too few."""
    taken: list[Tensor] = []
    missing = slots
    while missing:
        piece = next(stream, None)
        if piece is None:
            return None
        taken.append(piece[:missing])
        missing -= len(taken[-1])
    after = next(stream, None)
    return None if after is None else (taken, after)
