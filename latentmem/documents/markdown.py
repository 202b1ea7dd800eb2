"""Markdown -> plain text: the words without the signs; code stays as it is."""

from __future__ import annotations

import html
import re

from latentmem.documents import tables

FENCE = re.compile(r"\s*(```+(?=[^`]*$)|~~~+)(.*)")  # and what kind of code it is
RULE = re.compile(
    r"\s*([-*_=])([ \t]*\1){2,}[ \t]*$|=+[ \t]*$|-+[ \t]*$"
)  # a line of signs: a rule, or under a heading
BORDER = re.compile(r"\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?$")  # under the head of a table
START = re.compile(r"\s*#{1,6}\s+(.*)")
QUOTE = re.compile(r"(\s{0,3}>[ \t]?)+")
ITEM = re.compile(r"(\s*)[*+-]\s+(\[[ xX]\]\s+)?(?=\S)")
DEFINITION = re.compile(r"""\s{0,3}\[([^^\[\]\n][^\[\]\n]*)\]:\s*(\S+)(\s+("[^"\n]*"|'[^'\n]*'|\([^()\n]*\)))?\s*$""")
TARGET = re.compile(r"<|#(?!\d)|\.{0,2}/|[A-Za-z][\w+.-]*://|mailto:|[^\s@]*\w\.[A-Za-z]\w")  # no word of a sentence
TAGS = (
    "a abbr b blockquote br center code dd del details div dl dt em font h1 h2 h3 h4 h5 h6 hr i img ins kbd li ol p"
    " picture pre s small source span strong sub summary sup table tbody td th thead tr u ul"
).replace(" ", "|")
MARK = re.compile(r"^[ \t]*(```+(?=[^`\n]*$)|~~~+)|(`+)|<!--|<(script|style)\b", re.M | re.I)
REFERENCE = re.compile(r"!?\[([^\[\]]+)\]\[([^\[\]\n]*)\]")
LINKS = (
    (re.compile(r"!\[([^\[\]]*)\]\([^()\n]*\)"), r"\1"),
    (re.compile(r"\[([^\[\]]*)\]\((?:[^()\n]|\([^()\n]*\))*\)"), r"\1"),
)
INLINE = (  # in this order
    (re.compile(r"<(https?://[^<>\s]+|[\w.+-]+@[\w.-]+)>"), r"\1"),
    (re.compile(rf"</?({TAGS})(\s[^<>]*)?/?>", re.I), ""),
    (re.compile(r"(?<![\\*])\*\*(?=\S)([^*\n]+|[^\n]{1,400}?)(?<=\S)\*\*"), r"\1"),
    (re.compile(r"(?<![\\\w])__(?=\S)([^\n]{1,400}?)(?<=\S)__(?!\w)"), r"\1"),
    (re.compile(r"(?<![\\\w*])\*(?=[^\s*])([^*\n]+?)(?<=\S)\*(?![\w*])"), r"\1"),
    (re.compile(r"(?<![\\\w])_(?=[^\s_])([^_\n]+?)(?<=\S)_(?!\w)"), r"\1"),
    (re.compile(r"~~(?=\S)([^~\n]+)~~"), r"\1"),
    (re.compile(r"\\([!-/:-@\[-`{-~])"), r"\1"),
)


def text(markdown: str) -> str:
    """The words of a text in Markdown."""
    lines = _visible(_without_front(markdown.replace("\r\n", "\n"))).split("\n")
    labels = {_label(match[1]) for line in lines if (match := _definition(line))}
    plain: list[str] = []
    i, fence = 0, ""
    while i < len(lines):
        line = lines[i]
        mark = FENCE.match(line)
        if mark and (not fence or (mark[1].startswith(fence) and not mark[2].strip())):
            fence = "" if fence else mark[1]
        elif fence or (line.startswith("    ") and not (plain and plain[-1])):  # code
            plain.append(line)
        elif "|" in line and i + 1 < len(lines) and "|" in lines[i + 1] and BORDER.match(lines[i + 1].strip()):
            end = next((j for j in range(i + 2, len(lines)) if "|" not in lines[j]), len(lines))
            rows = [_cells(lines[j], labels) for j in range(i, end) if j != i + 1]
            plain += tables.lines(rows, head=True)
            i = end
            continue
        elif not RULE.match(line) and not _definition(line):
            plain.append(_line(line, labels))
        i += 1
    return "\n".join(plain)


def _visible(markdown: str) -> str:
    """The text without comments, scripts and styles, but with those that stand in code."""
    parts, missing, start, i = [], set[str](), 0, 0
    while match := MARK.search(markdown, i):
        fence, ticks, tag = match.groups()
        if fence:
            ending = rf"^[ \t]*{fence}{fence[0]}*[ \t]*$"
        elif ticks:
            ending = rf"(?<!`){ticks}(?!`)|\n"
        else:
            ending = rf"</{tag.lower()}\s*>" if tag else "-->"
        last = None if ending in missing else re.compile(ending, re.M | re.I).search(markdown, match.end())
        if last is None:
            missing.add(ending)
            i = len(markdown) if fence else match.end()
        elif fence or ticks:
            i = match.end() if last[0] == "\n" else last.end()
        else:
            parts.append(markdown[start : match.start()])
            start = i = last.end()
    return "".join([*parts, markdown[start:]])


def _definition(line: str) -> re.Match[str] | None:
    """The label and the target of a link that stand on a line of their own."""
    match = DEFINITION.match(line)
    return match if match and TARGET.match(match[2]) else None


def _label(label: str) -> str:
    return " ".join(label.casefold().split())


def _without_front(markdown: str) -> str:
    """The text without the fence of the settings in front of it."""
    match = re.match(r"---\n(.*?)\n(---|\.\.\.)\n", markdown[:20_000], re.S)
    return f"{match[1]}\n\n{markdown[match.end() :]}" if match else markdown


def _cells(row: str, labels: set[str]) -> list[str]:
    inner = re.sub(r"(?<!\\)\|$", "", row.strip().removeprefix("|"))
    return [_words(cell, labels).strip() for cell in re.split(r"(?<!\\)\|", inner)]


def _line(line: str, labels: set[str]) -> str:
    line = QUOTE.sub("", line, count=1) if QUOTE.match(line) else line
    heading = START.match(line)
    line = _title(heading[1].rstrip()) if heading else ITEM.sub(r"\1- ", line, count=1) if ITEM.match(line) else line
    return _words(line, labels)


def _title(words: str) -> str:
    """A heading without the signs at its end: `Title ##`, but not `C#`."""
    title = words.rstrip("#")
    return words if title and not title[-1].isspace() else title.rstrip()


def _words(line: str, labels: set[str]) -> str:
    """A line without the signs of emphasis, links and tags; what stands in ` ` is code.

    A link by its label counts where the text says to what the label leads.
    """

    def linked(match: re.Match[str]) -> str:
        return match[1] if _label(match[2] or match[1]) in labels else match[0]

    parts = re.split(r"(`+)(.+?)\1(?!`)", line) if "`" in line else [line]
    for i in range(0, len(parts), 3):
        for pattern, words in LINKS:
            parts[i] = pattern.sub(words, parts[i])
        parts[i] = REFERENCE.sub(linked, parts[i])
        for pattern, words in INLINE:
            parts[i] = pattern.sub(words, parts[i])
        parts[i] = html.unescape(parts[i])
    for i in range(1, len(parts), 3):
        parts[i] = ""
    return "".join(parts)
