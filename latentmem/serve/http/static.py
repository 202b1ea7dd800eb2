"""The page: files that were built from `web/`, and hold nothing of any memory."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

FOLDER = Path(__file__).parent.parent / "page"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
POLICY = (  # the page talks to its own server only, loads nothing of others and is shown in no frame
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def files() -> dict[str, tuple[bytes, str]]:
    """Content and type of the page's files, by their addresses; none where it was not built."""
    paths = sorted(FOLDER.iterdir()) if FOLDER.is_dir() else []
    page = {f"/{f.name}": (f.read_bytes(), KINDS[f.suffix]) for f in paths if f.suffix in KINDS and f.is_file()}
    return {"/": page.pop("/index.html"), **page} if "/index.html" in page else {}


async def respond(scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer a request for the page, without a key and at any time; False: it is for something else."""
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD") or scope["path"] not in files():
        return False
    content, kind = files()[scope["path"]]
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {
        "cache-control": "no-cache",
        "content-security-policy": POLICY,
        "etag": tag,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    if Headers(scope=scope).get("if-none-match") == tag:
        response = Response(status_code=304, headers=headers)
    else:
        response = Response(content, media_type=kind, headers=headers)
    await response(scope, receive, send)
    return True
