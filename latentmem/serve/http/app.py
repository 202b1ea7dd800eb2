"""The app of the server (read `service.py` first; then `gate.py`, `shared.py`, and the routes)."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from latentmem.serve.engine.service import Service
from latentmem.serve.http import memories, openai, schema
from latentmem.serve.http.gate import Gate
from latentmem.serve.http.keys import Keys
from latentmem.serve.http.logs import Log, Metrics
from latentmem.serve.http.shared import Limits, Shared, add_handlers, loading, shared
from latentmem.version import __version__

REFUSED = {
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
    503: "The server is loading or closing.",
    504: "It took too long.",
}


def create_app(
    service: Service, keys: Keys | None = None, limits: Limits | None = None, *, log: Log | None = None
) -> FastAPI:
    """The app that answers over HTTP.

    Args:
        service: what does the work; whoever makes it starts and closes it.
        keys: None: no key is asked for, and only this machine's own programs are let in.
        limits: of a request.
        log: where lines about requests go.
    """
    state, log = Shared(service, limits or Limits()), log or Log()
    metrics = Metrics(state)
    app = FastAPI(
        title="latentmem",
        description="A memory for language models. OpenAI's interface with memories behind it, and the memories.",
        version=__version__,
        docs_url=None,  # it would load scripts of others
        redoc_url=None,
    )
    app.state.shared, app.state.log = state, log
    add_handlers(app)
    bearer = Depends(HTTPBearer(auto_error=False, description="lm-..., as `latentmem keys add` has made it."))
    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": schema.Error, "description": what} for status, what in REFUSED.items()
    }
    for router in (openai.router, memories.router):
        app.include_router(router, dependencies=[bearer], responses=refused)

    @app.get("/health", tags=["server"])
    async def health() -> schema.State:
        """Whether the server is alive."""
        return schema.State()

    @app.get("/ready", tags=["server"], responses={503: refused[503]})
    async def ready(request: Request) -> schema.State:
        """Whether it answers."""
        if not shared(request).ready:
            raise loading()
        return schema.State()

    @app.get(
        "/metrics",
        tags=["server"],
        dependencies=[bearer],
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: refused[401]},
    )
    async def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]
    app.add_middleware(Gate, shared=state, keys=keys, log=log, metrics=metrics)
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: what is not valid is 400 here, and bodies that routes read themselves are in it."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in made["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = made["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    written = schema.Write.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(written.pop("$defs", {}))
    schemas["Write"] = written
    return made


__all__ = ["Limits", "create_app"]
