"""How much the server does at once and for one request; the command line makes its options from these settings."""

from __future__ import annotations

from dataclasses import dataclass

from latentmem.fields import setting


@dataclass(frozen=True)
class Sizes:
    """How much a service does and keeps at once."""

    batch: int = setting("answers that are made together", 32, least=1)
    waiting: int = setting("questions that may wait or run; more get status 429", 256, least=1)
    changes: int = setting("writes and other changes that may wait; more get status 429", 256, least=1)
    prefix_bytes: int | None = setting(  # of the memories that were used last
        "bytes of keys and values that the device keeps; by default a quarter", None, least=0
    )


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    body: int = setting("bytes of a request", 4 << 20, least=1024)
    file: int = setting("bytes of a request that uploads a file to be written", 64 << 20, least=1024)
    upload: int = setting("bytes of a memory that is imported", 1 << 30, least=1024)
    text: int = setting("characters of text in a request", 1_000_000, least=1)
    max_tokens: int = setting("longest answer that may be asked for, in tokens", 4096, least=1)
    n: int = setting("answers to one request", 8, least=1)
    seconds: float = setting("seconds after which a request is given up", 300, least=1)
    messages: int = setting("turns of a conversation", 256, least=1)
    requests: int = setting("requests that run or wait at once", 1024, least=1)
