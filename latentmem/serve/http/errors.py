"""Which HTTP status an error has, and what a client is told of it: `STATUSES` is the one table."""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from latentmem.errors import DamagedError, InUseError, NameTakenError, NotFoundError, OtherModelError, TooLongError
from latentmem.serve.engine.service import BusyError


class Row(NamedTuple):
    """One kind of error, and its answer."""

    error: type[Exception]
    status: int  # of HTTP
    code: str  # for programs
    message: str | None = None  # for the client; None: the error's own, `public` where it has one
    errno: int | None = None  # of an OSError; None: any


OTHER_MODEL = "this memory was written by another model, or in another precision, than this server runs."
# The first row that fits counts; what fits none is 500, without a word about it. A write that stands in the journal has
# no error here: it is 202, whatever its computing meets (`memories.LATER`).
STATUSES = (
    Row(BusyError, 429, "rate_limit_exceeded"),
    Row(NotFoundError, 404, "not_found"),
    Row(NameTakenError, 409, "taken"),
    Row(TooLongError, 400, "context_length_exceeded"),
    Row(OtherModelError, 400, "other_model", OTHER_MODEL),
    Row(InUseError, 409, "in_use"),
    Row(DamagedError, 500, "damaged", "what this memory is kept in is damaged; restore the store from a copy."),
    Row(ValueError, 400, "invalid_value"),
    Row(OSError, 503, "disk_full", "the disk of the server is full; nothing was changed.", errno.ENOSPC),
    Row(TimeoutError, 504, "timeout", "the request took too long and was given up."),
)
INTERNAL = Row(Exception, 500, "internal_error", "the server made an error; its log has this request's id.")
MEANINGS = {  # of the statuses, for the OpenAPI document
    400: "The request is not valid.",
    401: "No valid key.",
    403: "The key has not these rights.",
    404: "No such memory, version, model or address.",
    408: "The body did not come in time.",
    409: "The name is taken, or the memory is in use.",
    413: "The body is too large.",
    415: "The body is of another type.",
    429: "Too many requests wait; see Retry-After.",
    500: "An error of the server.",
    503: "The server is loading or closing, or its disk is full.",
    504: "It took too long.",
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}  # OpenAI's, of some statuses


class Refused(HTTPException):
    """A request that is not done: the status, what the client is told, a code for programs and the wrong field."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = TYPES.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Json:
        return Json(self.body, self.status_code, headers=self.headers)


class Json(Response):
    """JSON in UTF-8, also where a client's text is not valid Unicode."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


def not_ready() -> Refused:
    return Refused(503, "the server is loading or closing.", "not_ready", headers={"retry-after": "2"})


def refusal(error: Exception) -> Refused:
    """What a client is told of an error."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, RequestValidationError):
        return _not_valid(error)
    if isinstance(error, HTTPException):
        known = {404: "there is nothing at this address.", 405: "this address does not take this method."}
        return Refused(error.status_code, known.get(error.status_code, error.detail), headers=error.headers)
    kinds = (row for row in STATUSES if isinstance(error, row.error))
    row = next((row for row in kinds if row.errno in (None, getattr(error, "errno", None))), INTERNAL)
    headers = {"retry-after": str(error.retry_after)} if isinstance(error, BusyError) else None
    message = getattr(error, "public", str(error)) if row.message is None else row.message
    return Refused(row.status, message, row.code, headers=headers)


def _not_valid(error: RequestValidationError) -> Refused:
    first = next(iter(error.errors()), {"loc": (), "msg": "it is not valid", "type": ""})
    if first["type"] == "json_invalid":
        return Refused(400, "the body is not valid JSON.", "invalid_json")
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path", "header"))
    return Refused(400, f"{where or 'the body'}: {first['msg']}.", "invalid_value", where or None)


def add_handlers(app: FastAPI) -> None:
    """Answer these errors without a line in the log; all others come to the gate."""

    async def handle(request: Request, error: Exception) -> Response:
        refused = refusal(error)
        if refused.status_code == 405:  # the router names the methods of one route alone
            methods = request.app.openapi()["paths"].get(request.scope["route"].path, {})
            refused.headers = {"allow": ", ".join(sorted(method.upper() for method in methods))}
        return refused.response

    for kind in (HTTPException, RequestValidationError, BusyError, ValueError, TimeoutError):
        app.add_exception_handler(kind, handle)
