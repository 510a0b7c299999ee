"""The studio's own addresses: thumbnails and files by their ids, and edited captions."""

from __future__ import annotations

import io
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from gralora_diffusion.io.image_files import ImageError, read_image
from gralora_diffusion.io.json_files import parse_object
from gralora_diffusion.training.data.own_captions import find_image, write_caption

from .engine.images import keep_image
from .engine.opened import OpenedFiles

#: Pixels of the longer side of a thumbnail.
THUMBNAIL = 320
#: Kinds of files that are sent as they are. A page is sent without rights: see ``_report``.
_SENT = {".png": "image/png", ".safetensors": "application/octet-stream"}
_PRIVATE = {"Cache-Control": "private, max-age=3600"}


def routes(opened: OpenedFiles, kept: Path) -> APIRouter:
    """Return the addresses below ``/studio``; the guard has checked who asks.

    Args:
        kept: the folder of the images that are kept.
    """
    router = APIRouter(prefix="/studio")

    @router.get("/thumbnail/{name}")
    def thumbnail(name: str) -> Response:
        path = opened.find(name)
        if path is None:
            return _absent()
        try:
            status = path.stat()
            data = _thumbnail(path, status.st_mtime_ns, status.st_size)
        except (OSError, ImageError) as error:
            return PlainTextResponse(str(error), 422)
        return Response(data, media_type="image/webp", headers=_PRIVATE)

    @router.get("/file/{name}")
    def file(name: str) -> Response:
        path = opened.find(name)
        if path is None or path.suffix not in (*_SENT, ".html"):
            return _absent()
        if path.suffix == ".html":
            return _report(path)
        return FileResponse(path, media_type=_SENT[path.suffix], filename=path.name)

    @router.get("/view/{name}")
    def view(name: str) -> Response:
        """An image in its own size, decoded and written anew."""
        path = opened.find(name)
        if path is None:
            return _absent()
        if path.suffix == ".png":
            return FileResponse(path, media_type="image/png")
        try:
            buffer = io.BytesIO()
            read_image(path).save(buffer, format="PNG")
        except (OSError, ImageError) as error:
            return PlainTextResponse(str(error), 422)
        return Response(buffer.getvalue(), media_type="image/png")

    @router.post("/caption/{name}")
    async def caption(name: str, request: Request) -> Response:
        try:
            text = parse_object(await request.body()).get("caption")
        except ValueError:
            text = None
        if not isinstance(text, str):
            return PlainTextResponse("the caption must be text", 422)
        return await run_in_threadpool(_save_caption, opened, name, text)

    @router.post("/keep/{name}")
    def keep(name: str) -> Response:
        path = opened.find(name)
        if path is None or path.suffix != ".png":
            return _absent()
        try:
            return PlainTextResponse(keep_image(path, kept))
        except OSError as error:
            return PlainTextResponse(f"not kept: {error.strerror or error}", 422)

    @router.get("/alive")
    def alive() -> Response:
        return Response(status_code=204)

    @router.get("/page.js")
    def script() -> Response:
        return Response(_own_file("page.js"), media_type="text/javascript")

    @router.get("/style.css")
    def style() -> Response:
        return Response(_own_file("style.css"), media_type="text/css")

    return router


def _save_caption(opened: OpenedFiles, name: str, text: str) -> Response:
    path = opened.find(name)
    if path is None:
        return _absent()
    try:
        return PlainTextResponse(write_caption(find_image(path), text))
    except (OSError, ValueError) as error:
        return PlainTextResponse(f"the caption was not saved: {error}", 422)


def _absent() -> Response:
    return PlainTextResponse("there is no such file in an opened folder", 404)


def _report(path: Path) -> Response:
    """Return a page of the benchmark: without scripts, and as if of another origin."""
    headers = {"Content-Security-Policy": "sandbox allow-popups; default-src 'none'; "}
    headers["Content-Security-Policy"] += "img-src data:; style-src 'unsafe-inline'"
    return FileResponse(path, media_type="text/html", headers=headers)


@lru_cache(maxsize=2048)
def _thumbnail(path: Path, changed: int, size: int) -> bytes:
    del changed, size  # another content
    image = read_image(path, at_least=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=80)
    return buffer.getvalue()


def _own_file(name: str) -> str:
    return (files("gralora_diffusion.studio") / "static" / name).read_text(encoding="utf-8")
