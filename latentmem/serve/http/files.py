"""The addresses of files: a memory is taken out, and in again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from latentmem.errors import NameTakenError
from latentmem.serve.http import schema
from latentmem.serve.http.content import FILE, body_of, file_of
from latentmem.serve.http.errors import Refused
from latentmem.serve.http.memories import info
from latentmem.serve.http.state import app_state, authorize
from latentmem.serve.http.waiting import carried_out, read_store
from latentmem.store import Store
from latentmem.store.writing import WritingModel

router = APIRouter(prefix="/v1/memories", tags=["memories"])
BINARY = {"type": "string", "format": "binary"}


@router.get(
    "/{id}/export",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {"schema": BINARY}}}},
)
async def export(request: Request, id: str) -> StreamingResponse:
    """A memory with its history as one file; it holds the texts."""
    authorize(request, id)

    def write(store: Store) -> IO[bytes]:
        folder = tempfile.mkdtemp(prefix="latentmem-")
        try:
            store.export(id, Path(folder) / "memory.zip")
            return (Path(folder) / "memory.zip").open("rb")
        finally:
            shutil.rmtree(folder)  # an open file stays until it is closed

    file = await read_store(request, write)
    headers = {"content-disposition": f'attachment; filename="{id}.zip"'}
    return StreamingResponse(_parts(file), media_type="application/zip", headers=headers)


def _parts(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while part := file.read(1 << 18):
            yield part


@router.post(
    "/{id}/import",
    status_code=201,
    openapi_extra=body_of({"application/zip": BINARY, "multipart/form-data": FILE}),
)
async def import_(request: Request, id: str) -> schema.MemoryInfo:
    """Make a memory from an exported file; all of it is verified, and it must be of the model that is served."""
    authorize(request, id, write=True, new=True)
    service = app_state(request).service
    with tempfile.NamedTemporaryFile(prefix="latentmem-", suffix=".zip") as file:
        await _receive(request, file)
        path = Path(file.name)

        def act(store: Store, llm: WritingModel) -> None:
            if id in store:
                raise NameTakenError(f"there is a memory {id!r} already.")
            try:
                store.import_(path, id)
            except ValueError as error:
                raise ValueError(str(error).replace(str(path), "the file")) from None
            try:
                llm.check(store.open(id, store.applied_version(id)))
            except BaseException:
                store.delete(id)
                raise

        await carried_out(service.change(act))  # the file is needed until the end
    return await info(request, id)


async def _receive(request: Request, to: IO[bytes]) -> None:
    """Keep an uploaded file."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=8) as form:
            file = file_of(form)
            while part := await file.read(1 << 20):
                await run_in_threadpool(to.write, part)
    elif kind in ("application/zip", "application/octet-stream"):
        async for part in request.stream():
            await run_in_threadpool(to.write, part)
    else:
        raise Refused(415, "send the file as application/zip, or as multipart/form-data.", "unsupported_media_type")
    to.flush()
