"""Word, PowerPoint and OpenDocument -> plain text: paragraphs, rows of tables and notes, in a person's order.

They are read here because kreuzberg 4.10 loses every tab and every `&` of a Word document, joins the paragraphs of a
slide, and joins words of an OpenDocument text that are set apart by more than one space.
"""

from __future__ import annotations

import io
import posixpath
import re
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from latentmem.documents import tables
from latentmem.errors import UnreadableError

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MOST = 200_000_000  # bytes that an archive may unpack to
UNPACKED = f"unpacks to more than {MOST // 10**6} MB; it is no document, or has to be split."
ALONE = {"br": "\n", "cr": "\n", "tab": "\t", "noBreakHyphen": "-"}
OPEN = {"tab": "\t", "line-break": "\n"}  # of OpenDocument
OPEN_UNSEEN = {"annotation", "tracked-changes", "note-citation", "forms", "desc", "title"}
MOST_ALIKE = 100  # cells that are kept of those that a sheet says are alike
MOST_COLUMNS = 16384  # of a sheet
CELLS = ("tc", "table-cell", "covered-table-cell")
UNSEEN = {"Fallback", "del", "moveFrom", "delText", "instrText", "rt", "fld"}  # doubles, deleted text, codes, ruby


class Archive:
    """A zip whose parts are read within limits.

    Raises:
        UnreadableError: the zip is broken, encrypted, or unpacks to too much.
    """

    def __init__(self, data: bytes) -> None:
        try:
            self._zip = zipfile.ZipFile(io.BytesIO(data))
        except zipfile.BadZipFile:
            raise UnreadableError("is broken or cut off; copy it or download it again.") from None
        self.names = set(self._zip.namelist())
        self._rest = MOST
        if any(part.flag_bits & 1 for part in self._zip.infolist()):
            raise UnreadableError("is encrypted; open it with its password, and save it without one.")
        if sum(part.file_size for part in self._zip.infolist()) > MOST:
            raise UnreadableError(UNPACKED)

    def read(self, name: str) -> bytes:
        """The bytes of a part; what the archive says of its size is not believed."""
        with self._zip.open(name) as file:
            part = file.read(self._rest + 1)
        self._rest -= len(part)
        if self._rest < 0:
            raise UnreadableError(UNPACKED)
        return part

    def xml(self, name: str) -> Element:
        return ElementTree.fromstring(self.read(name))

    def relations(self, name: str) -> dict[str, str]:
        """The parts that a part refers to: id -> name, and kind of part, such as "notesSlide", -> name."""
        folder, file = posixpath.split(name)
        path = posixpath.join(folder, "_rels", f"{file}.rels")
        if path not in self.names:
            return {}
        targets = {}
        for one in self.xml(path):
            target = posixpath.normpath(posixpath.join("/", folder, one.get("Target", "")))[1:]
            targets[one.get("Id", "")] = target
            targets[one.get("Type", "").rpartition("/")[2]] = target
        return targets


def kind_of(data: bytes) -> str:
    """The kind of a zip: "docx", "pptx", "xlsx", "xlsb", "epub", "odt", "ods" or "odp".

    Raises:
        UnreadableError: it is another archive, is broken, or unpacks to too much.
    """
    archive = Archive(data)
    if "xl/workbook.bin" in archive.names:
        return "xlsb"
    if "[Content_Types].xml" in archive.names:
        for folder, kind in (("word/", "docx"), ("ppt/", "pptx"), ("xl/", "xlsx")):
            if any(name.startswith(folder) for name in archive.names):
                return kind
    if "META-INF/container.xml" in archive.names:
        return "epub"
    media_type = archive.read("mimetype").decode("ascii", "replace").strip() if "mimetype" in archive.names else ""
    kinds = {"text": "odt", "spreadsheet": "ods", "presentation": "odp"}
    family = media_type.rpartition(".")[2].removesuffix("-template")
    if any(name.endswith(".iwa") for name in archive.names):
        raise UnreadableError("is a file of Pages, Numbers or Keynote; export it as PDF.")
    if family not in kinds:
        raise UnreadableError("is an archive and no document; unpack it, and write its files or their folder.")
    return kinds[family]


def word(data: bytes) -> str:
    """A Word document, then its footnotes and endnotes."""
    archive = Archive(data)
    main = archive.relations("").get("officeDocument", "word/document.xml")
    notes = archive.relations(main)
    parts = [main, *(notes[kind] for kind in ("footnotes", "endnotes") if notes.get(kind) in archive.names)]
    return "\n".join(_content(archive.xml(part)) for part in parts)


def slides(data: bytes) -> str:
    """Slides in their order, each followed by its notes."""
    archive = Archive(data)
    main = archive.relations("").get("officeDocument", "ppt/presentation.xml")
    targets, parts = archive.relations(main), []
    for one in archive.xml(main).iterfind(".//{*}sldId"):
        slide = next(targets[value] for key, value in one.items() if key.endswith("}id"))
        notes = archive.relations(slide).get("notesSlide")
        parts += [slide, *([notes] if notes in archive.names else [])]
    return "\n\n".join(_content(archive.xml(part)) for part in parts)


def opendocument(data: bytes) -> str:
    """An OpenDocument text, its sheets, or its slides."""
    return "".join(_open_pieces(Archive(data).xml("content.xml").find("{*}body")))


def _open_pieces(element: Element | None) -> Iterable[str]:
    """The pieces of text in an element of OpenDocument; what follows it in its parent is the parent's."""
    name = _name(element) if element is not None else ""
    if element is None or name in OPEN_UNSEEN:
        return
    if name in OPEN:
        yield OPEN[name]
    elif name == "s":
        yield " "
    elif name == "table":
        rows = ([text for cell in _below(row, *CELLS) for text in _cells(cell)] for row in _below(element, "table-row"))
        yield "\n".join(["", *tables.lines(rows), ""])
    else:
        holds_text = name in ("p", "h", "span", "a", "ruby-base", "meta")
        yield from _flowing(element.text) if holds_text else ()
        for child in element:
            is_note = _name(child) == "note"
            yield from [f" ({''.join(_open_pieces(child)).strip()})"] if is_note else _open_pieces(child)
            yield from _flowing(child.tail) if holds_text else ()
        yield "\n" if name in ("p", "h") else ""


def _flowing(text: str | None) -> Iterable[str]:
    yield re.sub(r"\s+", " ", text or "")


def _cells(cell: Element) -> list[str]:
    """The texts of the columns that a cell of OpenDocument stands for; a covered cell is empty."""
    repeated = next((value for key, value in cell.items() if key.endswith("}number-columns-repeated")), "1")
    count = min(int(repeated), MOST_COLUMNS)
    text = "" if _name(cell) == "covered-table-cell" else "".join(_open_pieces(cell)).strip()
    alike = min(count, MOST_ALIKE)
    return [text] * alike + [""] * (count - alike)


def _row(row: Element) -> list[str]:
    """The texts of the columns of a row of Word or PowerPoint, also of those that a wider cell covers."""
    texts = [""] * _number(row, "{*}trPr/{*}gridBefore")
    for cell in _below(row, *CELLS):
        texts += [_content(cell), *[""] * (_number(cell, "{*}tcPr/{*}gridSpan") - 1)]
    return texts


def _number(element: Element, path: str) -> int:
    setting = element.find(path)
    value = "0" if setting is None else next((value for key, value in setting.items() if key.endswith("val")), "0")
    return min(int(value), MOST_COLUMNS)


def _name(element: Element) -> str:
    return element.tag.rpartition("}")[2]


def _content(element: Element) -> str:
    return "".join(_pieces(element))


def _pieces(element: Element) -> Iterable[str]:
    """The pieces of text in an element of WordprocessingML or DrawingML, which name them alike."""
    name = _name(element)
    if name in UNSEEN or name.endswith("Pr"):  # properties
        return
    if name == "t":
        yield element.text or ""
    elif name in ALONE:
        yield ALONE[name]
    elif name == "tbl":
        rows = (_row(row) for row in _below(element, "tr"))
        yield "\n".join([*tables.lines(rows), ""])
    else:
        for child in element:
            yield from _pieces(child)
        if name == "p":
            yield "\n"


def _below(element: Element, *names: str) -> Iterable[Element]:
    """The rows of a table, or the cells of a row, also those in a control; not those of a table in a cell."""
    for child in element:
        if _name(child) in names:
            yield child
        elif _name(child) not in (*CELLS, *UNSEEN):
            yield from _below(child, *names)
