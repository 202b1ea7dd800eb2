"""The app of the server; read `engine/service.py` first.

gate.py       what every request passes        memories.py   make, list, show, delete, write, ask
state.py      what a route works with          versions.py   look, change, export, import
errors.py     which status an error has        openai.py     OpenAI's interface, and answers
keys.py       who may touch which memories     schema.py     bodies of requests and responses
run.py        the process                      static.py     the page
"""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from latentmem.serve.engine.service import Service
from latentmem.serve.http import memories, openai, schema, versions
from latentmem.serve.http.errors import MEANINGS, add_handlers, not_ready
from latentmem.serve.http.gate import Gate, Log, Metrics
from latentmem.serve.http.keys import Keys
from latentmem.serve.http.state import AppState, app_state
from latentmem.serve.settings import Limits
from latentmem.version import __version__

DESCRIPTION = "A memory for language models. OpenAI's interface with memories behind it, and the memories."
BEARER = Depends(HTTPBearer(auto_error=False, description="lm-..., as `latentmem keys add` has made it."))
Responses = dict[int | str, dict[str, Any]]
REFUSALS: Responses = {status: {"model": schema.Error, "description": what} for status, what in MEANINGS.items()}
METRICS: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: REFUSALS[401]}


def create_app(
    service: Service, keys: Keys | None = None, limits: Limits | None = None, *, log: Log | None = None
) -> FastAPI:
    """The app that answers over HTTP.

    Args:
        service: does the work; whoever makes it starts and closes it.
        keys: None: no key is asked for, and only this machine's own programs are let in.
        limits: of a request.
        log: where lines about requests go.
    """
    state, log = AppState(service, limits or Limits()), log or Log()
    metrics = Metrics(state.numbers)
    # no pages of documentation: they would load scripts of others
    app = FastAPI(title="latentmem", description=DESCRIPTION, version=__version__, docs_url=None, redoc_url=None)
    app.state.latentmem, app.state.log = state, log
    add_handlers(app)
    for routes in (openai, memories, versions):
        app.include_router(routes.router, dependencies=[BEARER], responses=REFUSALS)
    _add_own_routes(app, metrics)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    app.add_middleware(Gate, state=state, keys=keys, log=log, metrics=metrics)
    return app


def _add_own_routes(app: FastAPI, metrics: Metrics) -> None:
    """The addresses that tell of the server itself."""

    @app.get("/health", tags=["server"])
    async def health() -> schema.State:
        """Whether the server is alive."""
        return schema.State()

    @app.get("/ready", tags=["server"], responses={503: REFUSALS[503]})
    async def ready(request: Request) -> schema.State:
        """Whether it answers."""
        if not app_state(request).ready:
            raise not_ready()
        return schema.State()

    @app.get("/metrics", tags=["server"], dependencies=[BEARER], response_class=Response, responses=METRICS)
    def numbers() -> Response:
        """Numbers for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: what is not valid is 400 here, and bodies that routes read themselves are in it."""
    if app.openapi_schema is not None:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    write = schema.Write.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(write.pop("$defs", {}))
    schemas["Write"] = write
    app.openapi_schema = document
    return document
