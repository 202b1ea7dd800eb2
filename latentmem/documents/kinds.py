"""What kind of file bytes are: the content decides, and the name only where the content can not."""

from __future__ import annotations

import re
from pathlib import PurePath

MAIL = {".eml", ".mht", ".mhtml"}
OF_TEXTS = {  # kinds of texts that only the name tells
    "html": {".html", ".htm", ".xhtml", ".xht", ".shtml"},
    "xml": {".xml", ".svg", ".rss", ".atom", ".opml", ".fb2"},
    "csv": {".csv", ".tsv", ".tab"},
    "markdown": {".md", ".markdown", ".mdown", ".mkd"},
}
MAGIC = (  # the first bytes of files that are no text
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "ole"),  # Office before 2007, and encrypted Office
    (b"{\\rtf", "rtf"),
)
FIELD = re.compile(rb"[A-Za-z][A-Za-z0-9-]*:")
HEAD_LINE = re.compile(rb"[A-Za-z][A-Za-z0-9-]*:|[ \t]")  # a field, or more of the field before
POSTMARK = re.compile(rb"From \S+ [^\n]*\d\d:\d\d[^\n]*\n")  # begins each message of a mailbox
OF_PEOPLE = re.compile(rb"^(From|To|Subject|Date):", re.I | re.M)
OF_PROGRAMS = re.compile(  # fields as only a mail program writes them
    rb"^(Message-ID:\s*<[^>\s]+>|MIME-Version:\s*1\.0|Return-Path:\s*<|Delivered-To:\s*\S+@"
    rb"|Received:\s*(from|by)\s+\[?[\w-]+\.[\w.-]+)",
    re.I | re.M,
)
HTML = re.compile(r"\s*(<\?xml[^>]*>\s*)?(<!--(?:(?!-->).)*-->\s*)*<(!doctype\s+html|html|head|body)\b", re.I | re.S)
DECLARED = re.compile(
    rb"""<meta[^>]{0,200}\bcharset\s*=\s*["']?\s*([\w.:-]{2,40})|<\?xml[^>]{0,200}\bencoding\s*=\s*["']([\w.:-]{2,40})""",
    re.I,
)


def of_bytes(data: bytes, name: str) -> str | None:
    """The kind of a file that is no text: "pdf", "zip", "ole", "rtf" or "mail"; None for a text."""
    head, suffix = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n"), PurePath(name).suffix.lower()
    if head.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head):
        return "pdf"
    for magic, kind in MAGIC:
        if head.startswith(magic):
            return kind
    return "mail" if _is_mail(re.split(rb"\r?\n\r?\n", data[:65536], maxsplit=1)[0], suffix) else None


def _is_mail(head: bytes, suffix: str) -> bool:
    """Whether the lines before the first empty one are a mail's; many texts and lists begin with a word and a colon."""
    if suffix in MAIL and (FIELD.match(head) or head.startswith(b"From ")):
        return True
    fields = POSTMARK.sub(b"", head, count=1)
    if not all(map(HEAD_LINE.match, fields.splitlines())):
        return False
    names = {match[1].lower() for match in OF_PEOPLE.finditer(fields)}
    return len(names) > 1 and (len(fields) < len(head) or OF_PROGRAMS.search(fields) is not None)


def of_text(text: str, name: str) -> str:
    """The kind of a text: "html", "xml", "csv", "markdown" or "text"."""
    suffix = PurePath(name).suffix.lower()
    if HTML.match(text[:8192]):
        return "html"
    if text[:100].lstrip().startswith("<?xml"):
        return "xml"
    return next((kind for kind, suffixes in OF_TEXTS.items() if suffix in suffixes), "text")


def declared(data: bytes) -> str | None:
    """The encoding that HTML or XML declares; None for another text."""
    head = data[:2048]
    match = DECLARED.search(head) if head.lstrip().startswith(b"<") else None
    return (match[1] or match[2]).decode("ascii") if match else None
