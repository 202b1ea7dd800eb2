"""E-mail -> plain text: subject, names, date and body; attachments are named."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Iterable
from email.message import EmailMessage, MIMEPart

from latentmem.documents import decoding, markup
from latentmem.errors import UnreadableError

BETWEEN = re.compile(rb"\r?\n(?=From \S+ [^\n]*\d\d:\d\d[^\n]*\n)")  # messages of a mailbox
FIELDS = ("Subject", "From", "To", "Cc", "Date")


def text(data: bytes, encoding: str | None = None) -> str:
    """The text of a message and of the messages in it, or of a mailbox; `encoding` is for parts that name none."""
    mails = BETWEEN.split(data) if data.startswith(b"From ") else [data]  # a mailbox has many
    messages = [email.message_from_bytes(mail, policy=email.policy.default) for mail in mails]
    return "\n\n".join("\n".join(_lines(one, encoding)) for one in messages if isinstance(one, EmailMessage))


def _lines(message: EmailMessage, encoding: str | None) -> Iterable[str]:
    for name in FIELDS:
        value = _field(message, name, encoding)
        if value:
            yield f"{name}: {value}"
    yield ""
    body = message.get_body(("plain", "html"))
    if body is not None:
        yield _body(body, encoding)
    for part in message.walk():
        if part is body or part is message:
            continue
        if part.get_content_type() == "message/rfc822":
            yield ""
            yield from _lines(part.get_payload(0), encoding)  # type: ignore[arg-type]
            return
        if part.get_filename():
            yield f"Attached: {part.get_filename()}"


def _field(message: EmailMessage, name: str, encoding: str | None) -> str:
    value = " ".join(str(message.get(name, "")).split())
    raw = value.encode("utf-8", "surrogateescape")
    return value if value.isprintable() else _decoded(raw, None, encoding)


def _body(part: MIMEPart, encoding: str | None) -> str:
    payload = part.get_payload(decode=True)
    body = _decoded(payload if isinstance(payload, bytes) else b"", part.get_content_charset(), encoding)
    return markup.text(body, title=False) if part.get_content_subtype() == "html" else body


def _decoded(data: bytes, charset: str | None, encoding: str | None) -> str:
    """Text of the encoding that a message names, even where some bytes are wrong; or of a guessed one."""
    try:
        return decoding.decoded(data, charset or "utf-8", "strict" if charset is None else "replace")
    except (LookupError, UnicodeError):
        pass
    try:
        return decoding.decode(data, encoding)[0] if data else ""
    except UnreadableError:
        return data.decode("utf-8", "replace")
