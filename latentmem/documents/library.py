"""What kreuzberg reads: PDF, Excel, RTF, and Office before 2007. Only the worker's process calls it."""

from __future__ import annotations

import re
from typing import Any

from latentmem.documents import tables
from latentmem.errors import UnreadableError

OFFICE = "application/vnd.openxmlformats-officedocument."
TYPES = {  # kind -> (what a person calls it, its media type)
    "pdf": ("a PDF", "application/pdf"),
    "xlsx": ("an Excel sheet", OFFICE + "spreadsheetml.sheet"),
    "xlsb": ("an Excel sheet", "application/vnd.ms-excel.sheet.binary.macroEnabled.12"),
    "rtf": ("an RTF text", "application/rtf"),
    "doc": ("an old Word document", "application/msword"),
    "xls": ("an old Excel sheet", "application/vnd.ms-excel"),
    "ppt": ("an old PowerPoint file", "application/vnd.ms-powerpoint"),
    "msg": ("an Outlook message", "application/vnd.ms-outlook"),
}
OLD = (  # what the directory of an OLE file names, in UTF-16 -> kind
    ("EncryptedPackage", "encrypted"),
    ("WordDocument", "doc"),
    ("PowerPoint Document", "ppt"),
    ("Workbook", "xls"),
    ("Book", "xls"),
    ("__properties_version1.0", "msg"),
)
IMAGE = re.compile(r"\[Image: [^\]\n]*\]")  # stands for a picture
NO_TEXT = re.compile(r"(?<=\d\d\d\d-\d\d-\d\d) 00:00:00$|^#ERR: \w+$")  # a day is no time, an error no value
ENCRYPTED = "is encrypted; open it with its password, and save it without one."
SCANNED = "has no text, only pictures (it is probably scanned); recognise its text first, for example with `ocrmypdf`."


def text(data: bytes, kind: str) -> str:
    """The text of a document; a PDF's page by page, a sheet's row by row."""
    if kind == "ole":
        kind = next((one for name, one in OLD if name.encode("utf-16-le") in data), "ole")
    if kind == "encrypted":
        raise UnreadableError(ENCRYPTED)
    if kind not in TYPES:
        raise UnreadableError("is a file of a kind that is not known; save it as PDF or text.")
    result = _extracted(data, *TYPES[kind])
    if kind == "pdf":
        pages = [page["content"] for page in result.pages or ()]
        if not any(page.strip() for page in pages):
            raise UnreadableError(SCANNED)
        return "\n\n".join(map(flowing, pages))
    return _sheets(result) if kind in ("xlsx", "xlsb", "xls") and result.tables else IMAGE.sub("", result.content)


def _extracted(data: bytes, title: str, media_type: str) -> Any:
    try:
        import kreuzberg
    except ImportError:
        raise UnreadableError(f"is {title}: run `pip install 'latentmem[files]'`, which reads it.") from None
    config = kreuzberg.ExtractionConfig(
        use_cache=False,  # by default the text of every file is kept under the user's cache folder
        disable_ocr=True,
        pages=kreuzberg.PageConfig(extract_pages=True),
        concurrency=kreuzberg.ConcurrencyConfig(max_threads=1),
    )
    try:
        return kreuzberg.extract_bytes_sync(data, media_type, config=config)
    except Exception as error:
        if re.search(r"password|encrypt", str(error), re.I):
            raise UnreadableError(ENCRYPTED) from None
        raise


def _sheets(result: Any) -> str:
    names = result.metadata.get("sheet_names") or []
    parts = []
    for sheet in result.tables:
        title = names[sheet.page_number - 1] if 0 < sheet.page_number <= len(names) > 1 else ""
        cells = [[NO_TEXT.sub("", cell) for cell in row] for row in sheet.cells]
        parts.append("\n".join([title, *tables.lines(cells)]))
    return "\n\n".join(parts)


def flowing(page: str) -> str:
    """The text of a page, in which a sentence goes on over the end of a line."""
    page = re.sub(r"[\x02\ufffe](\r?\n)?|\u00ad\r?\n", "", page).replace(
        "\r\n", "\n"
    )  # a word is parted at a line's end
    return re.sub(r"(?<=[^\s.!?:;])[ \t]*\n(?=[^\W\d_])(\w)", _joined, page)


def _joined(match: re.Match[str]) -> str:
    return f" {match[1]}" if match[1].islower() else match[0]
