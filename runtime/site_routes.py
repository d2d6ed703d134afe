"""Cameras and site over HTTP: looked at, and changed.

Nobody is asked who they are, so that the port is open to this machine alone - and to the web pages that its browsers
show: requests that a page of elsewhere can make are refused (request_fault). Errors are JSON, path and reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import APIRouter, FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from .live_site import ConflictError, LiveSite, UnknownCameraError
from .service import Service
from .site_changes import SiteChange
from .site_errors import SiteError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

# A camera has a handful of keys.
LARGEST_BODY = 64 * 1024


def request_fault(request: Request, hosts: Collection[str]) -> tuple[int, str, str] | None:
    """Why a request is refused: status, header and reason; None where it is not. hosts: names of this service.

    Host guards against a foreign name that was made to point here (DNS rebinding), Origin and the content type
    against pages that send forms and simple requests here (cross-site request forgery).
    """
    host = _name(f"//{request.headers.get('host', '')}")
    if host not in hosts:
        return 403, "Host", f"must be one of {', '.join(sorted(hosts))}, got another; see api.hosts"
    if request.method in SAFE_METHODS:
        return None
    origin = request.headers.get("origin")
    if origin is not None and _name(origin) not in hosts:
        return 403, "Origin", "must be this service, got another"
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        return 403, "Sec-Fetch-Site", "must be same-origin, got another"
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.method != "DELETE" and content_type != "application/json":
        return 415, "Content-Type", f"must be application/json, got {content_type or 'none'}"
    return None


def error_reply(status: int, path: str, reason: str) -> JSONResponse:
    """An error as every route gives it. path: of the key or header; empty where it is no single one."""
    return JSONResponse({"path": path, "reason": reason}, status)


def add_error_replies(app: FastAPI) -> None:
    """Let an app tell errors as error_reply does."""

    @app.exception_handler(StarletteHTTPException)
    async def known(request: Request, error: StarletteHTTPException) -> Response:
        return error_reply(error.status_code, "", str(error.detail))

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> Response:
        # What a bug says may hold anything; the log has it, without logins.
        return error_reply(500, "", "the service failed to answer; its log tells why")


def site_routes(service: Service, live: LiveSite | None) -> APIRouter:
    """The routes below /api/v1. live: the file of the site; None where it cannot be changed."""
    routes = APIRouter(prefix="/api/v1")

    @routes.get("/cameras")
    def cameras() -> list[dict[str, Any]]:
        return service.cameras()

    @routes.get("/cameras/{camera}")
    def camera_of(camera: str, response: Response) -> dict[str, Any]:
        if live is not None:
            response.headers["etag"] = f'"{live.version}"'
        return _camera(service, camera)

    if live is None:
        return routes

    @routes.put("/cameras/{camera}")
    async def put_camera(camera: str, request: Request) -> Response:
        content = await _json_object(request)
        version = _version(request)
        return await run_in_threadpool(_changed, lambda: live.put_camera(camera, content, version), live)

    @routes.delete("/cameras/{camera}")
    async def delete_camera(camera: str, request: Request) -> Response:
        version = _version(request)
        return await run_in_threadpool(_changed, lambda: live.remove_camera(camera, version), live)

    @routes.get("/site")
    def site() -> dict[str, Any]:
        return live.status()

    return routes


def _camera(service: Service, name: str) -> dict[str, Any]:
    site = service.site
    for camera in site.cameras:
        if camera.id == name:
            status = next((each for each in service.cameras() if each["camera"] == name), {})
            # Without the url: sent back as it is shown, without its login, it would take the login from the file.
            return {
                **status,
                "settings": camera.model_dump(mode="json", exclude={"id", "url"}, exclude_none=True),
            }
    raise HTTPException(404, f"camera must be one of the site, got {name}")


def _changed(change: Callable[[], SiteChange], live: LiveSite) -> Response:
    try:
        changed = change()
    except SiteError as error:
        return error_reply(422, error.place, error.reason)
    except ConflictError as error:
        return error_reply(409, "", str(error))
    except UnknownCameraError as error:
        return error_reply(404, "", f"camera must be one of the site, got {error}")
    except OSError as error:
        return error_reply(500, "", f"the file of the site must be writable, got {error.strerror}")
    reply = JSONResponse({**changed.as_dict(), "version": live.version}, 201 if changed.added else 200)
    reply.headers["etag"] = f'"{live.version}"'
    return reply


def _version(request: Request) -> str | None:
    match = request.headers.get("if-match")
    return None if match in (None, "*") else match.strip('"')


async def _json_object(request: Request) -> dict[str, Any]:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise HTTPException(413, f"body must have at most {LARGEST_BODY} bytes, got more")
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise HTTPException(400, "body must be JSON, got something else") from None
    if not isinstance(content, dict):
        raise HTTPException(400, f"body must be a JSON object, got {type(content).__name__}")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"JSON has no {name}")


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
