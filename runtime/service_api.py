"""The HTTP server of a service: probes, metrics, cameras."""

from __future__ import annotations

import threading
import time
from collections.abc import Awaitable, Callable, Collection

import uvicorn
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from .latency_histograms import LatencyHistograms
from .live_site import LiveSite
from .service import Service
from .site_file import LOCAL
from .site_metrics import SiteCollector
from .site_routes import add_error_replies, error_reply, request_fault, site_routes

# How long the server waits for requests under way when it is stopped.
SHUTDOWN_S = 2

# How long the port may take to open.
START_S = 10.0


def app_of(service: Service, live: LiveSite | None = None) -> FastAPI:
    """The HTTP interface of a service. live: the file of its site; without it the site can only be looked at."""
    app = FastAPI(title="psdiff", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry()
    registry.register(SiteCollector(service, live))
    service.observers.append(LatencyHistograms(registry))
    _add_guard(app, {*LOCAL, *service.site.api.hosts})
    add_error_replies(app)
    _add_probes(app, service)
    app.include_router(site_routes(service, live))

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_guard(app: FastAPI, hosts: Collection[str]) -> None:
    names = {host.lower() for host in hosts}

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        fault = request_fault(request, names)
        return error_reply(*fault) if fault is not None else await answer(request)


def _add_probes(app: FastAPI, service: Service) -> None:
    """healthz: restart it. readyz: it works, with or without cameras. startupz: it has started."""

    @app.get("/healthz")
    def healthz(response: Response) -> dict[str, object]:
        faults = service.faults()
        response.status_code = 503 if faults else 200
        return {"status": "failed", "faults": faults} if faults else {"status": "ok"}

    @app.get("/readyz")
    def readyz(response: Response) -> dict[str, str]:
        is_ready = service.is_ready
        response.status_code = 200 if is_ready else 503
        return {"status": "ready" if is_ready else "not ready"}

    @app.get("/startupz")
    def startupz(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.is_started else 503
        return {"status": "started" if service.is_started else "starting"}


class HttpServer:
    """uvicorn in a thread of its own."""

    def __init__(self, service: Service, listen: str, live: LiveSite | None = None) -> None:
        """listen: HOST:PORT. live: as in app_of."""
        host, _, port = listen.rpartition(":")
        config = uvicorn.Config(
            app_of(service, live),
            host=host,
            port=int(port),
            log_level="warning",
            # Its own format would bypass that of the service.
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_S,
        )
        self._listen = listen
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Open the port. Raises OSError where it cannot be had."""
        self._thread.start()
        end_s = time.monotonic() + START_S
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > end_s:
                raise OSError(f"api.listen must be an address that is free, got {self._listen}")
            time.sleep(0.01)

    def stop(self) -> None:
        """Finish requests under way, and close the port."""
        self._server.should_exit = True
        self._thread.join(SHUTDOWN_S + 1)

    def _run(self) -> None:
        try:
            self._server.run()
        # uvicorn ends its thread this way where the port is taken; start tells.
        except SystemExit:
            return
