"""Markdown -> plain text: the words without the signs; code stays as it is."""

from __future__ import annotations

import html
import re

from latentmem.documents import tables

FENCE = re.compile(r"\s*(```+|~~~+)")
RULE = re.compile(
    r"\s*([-*_=])([ \t]*\1){2,}[ \t]*$|=+[ \t]*$|-+[ \t]*$"
)  # a line of signs: a rule, or under a heading
BORDER = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$")  # under the head of a table
START = re.compile(r"\s*#{1,6}\s+(.*?)[ \t#]*$")
QUOTE = re.compile(r"(\s{0,3}>[ \t]?)+")
ITEM = re.compile(r"(\s*)[*+-]\s+(\[[ xX]\]\s+)?(?=\S)")
DEFINITION = re.compile(r"\s{0,3}\[[^\]\n]+\]:\s*\S+.*$")
TAGS = (
    "a abbr b blockquote br center code dd del details div dl dt em font h1 h2 h3 h4 h5 h6 hr i img ins kbd li ol p"
    " picture pre s small source span strong sub summary sup table tbody td th thead tr u ul"
).replace(" ", "|")
UNSEEN = re.compile(r"<!--.*?-->|<(script|style)\b.*?</\1\s*>", re.S | re.I)
INLINE = (  # in this order
    (re.compile(r"!\[([^\[\]]*)\]\([^()\n]*\)"), r"\1"),
    (re.compile(r"\[([^\[\]]*)\]\((?:[^()\n]|\([^()\n]*\))*\)"), r"\1"),
    (re.compile(r"\[([^\[\]]+)\]\[[^\[\]\n]*\]"), r"\1"),
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
    lines = UNSEEN.sub("", _without_front(markdown.replace("\r\n", "\n"))).split("\n")
    plain: list[str] = []
    i, fence = 0, ""
    while i < len(lines):
        line = lines[i]
        mark = FENCE.match(line)
        if mark and (not fence or mark[1].startswith(fence)):
            fence = "" if fence else mark[1]
        elif fence or (line.startswith("    ") and not (plain and plain[-1])):  # code
            plain.append(line)
        elif "|" in line and i + 1 < len(lines) and "|" in lines[i + 1] and BORDER.match(lines[i + 1]):
            end = next((j for j in range(i + 2, len(lines)) if "|" not in lines[j]), len(lines))
            rows = [_cells(lines[j]) for j in range(i, end) if j != i + 1]
            plain += tables.lines(rows, head=True)
            i = end
            continue
        elif not RULE.match(line) and not DEFINITION.match(line):
            plain.append(_line(line))
        i += 1
    return "\n".join(plain)


def _without_front(markdown: str) -> str:
    """The text without the fence of the settings in front of it."""
    match = re.match(r"---\n(.*?)\n(---|\.\.\.)\n", markdown[:20_000], re.S)
    return f"{match[1]}\n\n{markdown[match.end() :]}" if match else markdown


def _cells(row: str) -> list[str]:
    return [_words(cell).strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]


def _line(line: str) -> str:
    line = QUOTE.sub("", line, count=1) if QUOTE.match(line) else line
    heading = START.match(line)
    return _words(heading[1] if heading else ITEM.sub(r"\1- ", line, count=1) if ITEM.match(line) else line)


def _words(line: str) -> str:
    """A line without the signs of emphasis, links and tags; what stands in ` ` is code."""
    parts = re.split(r"(`+)(.+?)\1(?!`)", line) if "`" in line else [line]
    for i in range(0, len(parts), 3):
        for pattern, words in INLINE:
            parts[i] = pattern.sub(words, parts[i])
        parts[i] = html.unescape(parts[i])
    for i in range(1, len(parts), 3):
        parts[i] = ""
    return "".join(parts)
