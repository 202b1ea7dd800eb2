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
ONE_OF = ("multipart/alternative", "multipart/related")
SHOWN = ("text/plain", "text/html")
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
    yield from _parts(message, encoding)


def _parts(part: MIMEPart, encoding: str | None) -> Iterable[str]:
    """The texts of a part and of the parts in it, one of alternatives; and the names of what is attached."""
    kind, name = part.get_content_type(), part.get_filename()
    if kind in ("message/rfc822", "message/global") and part.is_multipart():
        yield ""
        yield from _lines(part.get_payload(0), encoding)  # type: ignore[arg-type]
    elif kind in ONE_OF and (body := _best(part, encoding)):
        yield body[1]
        for each in part.walk():
            if each is not body[0] and each.get_filename():
                yield from _parts(each, encoding)
    elif part.is_multipart():
        for each in part.iter_parts():
            yield from _parts(each, encoding)
    else:
        if kind in SHOWN and not part.is_attachment():
            yield _body(part, encoding)
        if name:
            yield f"Attached: {' '.join(name.split())}"


def _best(part: MIMEPart, encoding: str | None) -> tuple[MIMEPart, str] | None:
    """Of alternatives, or of a page and what belongs to it, the part to read and its text."""
    bodies = [body for kind in ("plain", "html") if (body := part.get_body((kind,))) is not None]
    texts = ((body, _body(body, encoding)) for body in bodies)
    return next(((body, text) for body, text in texts if text.strip()), None)


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
