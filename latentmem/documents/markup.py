"""HTML and XML -> plain text: what a person sees in a browser, without tags, scripts, menus and hidden parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from xml.etree import ElementTree

UNSEEN = frozenset(
    "script style template noscript head svg math iframe object canvas audio video nav select button textarea".split()  # noqa: SIM905
)
WITHIN_A_LINE = frozenset(
    "a abbr b bdi bdo big cite code data del dfn em font i ins kbd label mark q s samp small span strike strong sub sup"  # noqa: SIM905
    " time tt u var wbr img input".split()
)
BLOCKS = frozenset("p para div section title head li item list table tr row br lb".split())  # noqa: SIM905 - of XML
EMPTY = frozenset("area base br col embed hr img input link meta param source track wbr".split())  # noqa: SIM905
IN_HEAD = frozenset("title meta link style script base noscript template".split())  # noqa: SIM905
CELLS = ("td", "th")
CLOSES = {  # a start tag -> the open tags that it ends, where their end tags are left out
    **{tag: (tag,) for tag in ("li", "tr", "p", "option")},
    **dict.fromkeys(("dt", "dd"), ("dt", "dd")),
    **dict.fromkeys(CELLS, CELLS),
}
TAG = re.compile(r"</[a-zA-Z][a-zA-Z0-9]*>|<br ?/?>")
HIDDEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.I)


def text(markup: str, title: bool = True) -> str:
    """The text of a page, a line for each block; first its `title`."""
    page = _Page()
    page.feed(markup)
    page.close()
    body = "".join(page.parts).strip()
    heading = " ".join("".join(page.title).split())
    return f"{heading}\n\n{body}" if title and heading not in body.split("\n") else body


def xml_text(markup: str) -> str:
    """The texts of XML, a line for each element with text of its own; HTML in them is read, too.

    Broken XML is read as HTML.
    """
    try:
        root = ElementTree.fromstring(markup)
    except ElementTree.ParseError:
        return text(markup)
    return "\n".join(text(piece) if TAG.search(piece) else piece for piece in _xml_lines(root) if piece)


def _xml_lines(root: ElementTree.Element) -> Iterator[str]:
    is_drawing, waiting = _local(root) in ("svg", "html"), [root]
    while waiting:
        element = waiting.pop()
        if is_drawing and _local(element) in ("script", "style"):
            continue
        if _local(element) == "outline":
            yield element.get("text", "").strip()
        if len(element) and any(piece and piece.strip() for piece in (element.text, *(one.tail for one in element))):
            yield from (" ".join(line.split()) for line in _mixed(element).split("\n"))
        else:
            yield (element.text or "").strip()
            waiting.extend(reversed(element))


def _mixed(element: ElementTree.Element) -> str:
    """The text of an element and of those in it; blocks in it stand on lines of their own."""
    line = re.sub(r"\s+", " ", element.text or "")
    for child in element:
        inner, tail, name = _mixed(child), re.sub(r"\s+", " ", child.tail or ""), _local(child)
        if name in BLOCKS or "\n" in inner:
            line += f"\n{inner}\n{tail}"
        elif name in WITHIN_A_LINE:
            line += inner + tail
        else:  # words of elements that nobody knows are not joined
            for piece in (inner or " ", tail):
                line += (" " if line[-1:].isalnum() and piece[:1].isalnum() else "") + piece
    return line


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2].lower()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title: list[str] = []
        self._open: list[tuple[str, bool]] = []  # (tag, whether what is in it is unseen)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._open and self._open[-1][0] in CLOSES.get(tag, ()):
            self._open.pop()
        if tag not in IN_HEAD:
            self._close_head()
        names = dict(attrs)
        hidden = tag in UNSEEN or "hidden" in names or bool(HIDDEN.search(names.get("style") or ""))
        if tag not in EMPTY:
            self._open.append((tag, hidden or self._unseen))
        if self._unseen:
            return
        if tag in CELLS:
            if self.parts and not self.parts[-1].endswith("\n"):
                self.parts.append(", ")
        else:
            self._part_lines(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        for i in range(len(self._open) - 1, max(-1, len(self._open) - 200), -1):
            if self._open[i][0] == tag:
                del self._open[i:]
                break
        if not self._unseen and tag not in CELLS:
            self._part_lines(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "title" and not any(tag == "svg" for tag, _ in self._open):
            self.title.append(data)
            return
        if data.strip():
            self._close_head()
        if not self._unseen:
            if not any(tag == "pre" for tag, _ in self._open[-8:]):
                data = re.sub(r"\s+", " ", data)
                if not self.parts or self.parts[-1][-1:].isspace():
                    data = data.lstrip(" ")
            if data:
                self.parts.append(data)

    def unknown_decl(self, data: str) -> None:
        if data.startswith("CDATA["):
            self.handle_data(data[6:])

    @property
    def _unseen(self) -> bool:
        return bool(self._open) and self._open[-1][1]

    def _close_head(self) -> None:
        if self._open and self._open[-1][0] == "head":
            self._open.pop()

    def _part_lines(self, tag: str) -> None:
        if tag in WITHIN_A_LINE or not self.parts:
            return
        if self.parts[-1] == " ":
            self.parts.pop()
        if tag == "p" or re.fullmatch(r"h[1-6]", tag):
            self.parts.append("\n\n")
        elif not self.parts[-1].endswith("\n"):
            self.parts.append("\n")
