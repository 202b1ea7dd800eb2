"""What can be written into a memory, and what the journal keeps of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentmem import documents
from latentmem.model.prompts import Message
from latentmem.store.journal import Row

Content = str | Path | Sequence[Message] | Sequence[int]
CONTENTS = ("text", "turns", "ids")  # what a write can hold
Payload = dict[str, Any]


def payload(content: Content, source: str, role: str | None) -> Payload:
    """What the journal keeps of a write, before it is applied.

    Raises:
        ValueError: nothing to write, or what can not be written.
    """
    body: dict[str, Any]
    if not hasattr(content, "__len__") or isinstance(content, bytes | bytearray):  # neither turns nor token ids
        content = documents.text_of(content)
    if isinstance(content, str):
        body, empty = {"text": content}, not content.strip()
    elif isinstance(content, Sequence) and content and isinstance(content[0], dict):
        if role:
            raise ValueError(f"turns of a conversation have roles of their own: got {role!r} besides.")
        turns: Any = content
        body, empty = {"turns": [{"role": turn["role"], "content": turn["content"]} for turn in turns]}, False
    else:
        import torch

        ids = torch.as_tensor(content)
        empty = not ids.numel()
        if not empty and (ids.ndim != 1 or ids.is_floating_point() or ids.dtype == torch.bool or role):
            raise ValueError(
                f"token ids must be one list of integers, without a role: got {list(ids.shape)}, {role!r}."
            )
        body = {"ids": ids.tolist()}
    if empty:
        raise ValueError("the text to be written is empty; give at least one character.")
    body |= {"source": source, "role": role}
    try:
        json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("the text is not valid Unicode; write UTF-8.") from None
    return body | {"sha256": hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()}


def source_of(content: Content, source: str | None) -> str:
    """The name under which something is written: the one that is given, a file's own, else "text"."""
    return source or (content.name if isinstance(content, Path) else "text")


def content_of(row: Row) -> Content | None:
    """What was written; None: the event is no write."""
    return next((row.payload[kind] for kind in CONTENTS if kind in row.payload), None)
