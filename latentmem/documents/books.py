"""EPUB -> plain text: the chapters of a book in their order."""

from __future__ import annotations

import posixpath
from urllib.parse import unquote

from latentmem.documents import decoding, kinds, markup
from latentmem.documents.office import Archive
from latentmem.errors import UnreadableError


def text(data: bytes) -> str:
    """The text of a book."""
    archive = Archive(data)
    root = archive.xml("META-INF/container.xml").find(".//{*}rootfile")
    main = root.get("full-path", "") if root is not None else ""
    book, folder = archive.xml(main), posixpath.dirname(main)
    places = {item.get("id"): unquote(item.get("href", "")) for item in book.iterfind(".//{*}item")}
    order = [places.get(item.get("idref"), "") for item in book.iterfind(".//{*}itemref")]
    chapters = [
        name for name in (posixpath.normpath(posixpath.join(folder, one)) for one in order) if name in archive.names
    ]
    if _encrypted(archive) & set(chapters):
        raise UnreadableError("is encrypted (a book with copy protection).")
    return "\n\n".join(_chapter(archive.read(name)) for name in chapters)


def _chapter(data: bytes) -> str:
    return markup.text(decoding.decode(data, declared=kinds.declared(data))[0], title=False)


def _encrypted(archive: Archive) -> set[str]:
    if "META-INF/encryption.xml" not in archive.names:
        return set()
    references = archive.xml("META-INF/encryption.xml").iterfind(".//{*}CipherReference")
    return {unquote(one.get("URI", "")) for one in references}
