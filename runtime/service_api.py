"""Health, metrics and cameras of a service over HTTP."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .connection import State
from .service import Service

# How long the server waits for requests under way when it is stopped.
SHUTDOWN_S = 2

# How long the port may take to open.
START_S = 10.0


class SiteCollector:
    """What a service counts, as Prometheus wants it; read at each scrape, so that nothing is kept twice."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Give every metric once."""
        cameras = self._service.cameras()
        state = GaugeMetricFamily(
            "psdiff_camera_state", "1 for the state a camera is in", labels=["camera", "state"]
        )
        offset = GaugeMetricFamily(
            "psdiff_camera_clock_offset_seconds", "The camera's clock minus ours", labels=["camera"]
        )
        dropped = CounterMetricFamily(
            "psdiff_camera_frames_dropped", "Frames that nobody looked at", labels=["camera", "reason"]
        )
        reconnects = CounterMetricFamily(
            "psdiff_camera_reconnects", "Connections that were lost or failed", labels=["camera", "reason"]
        )
        sums = {
            "decoded": CounterMetricFamily("psdiff_camera_frames", "Frames decoded", labels=["camera"]),
            "computed": CounterMetricFamily(
                "psdiff_camera_frames_computed", "Frames looked at", labels=["camera"]
            ),
            "stalled_s": CounterMetricFamily(
                "psdiff_camera_stall_seconds", "Time without frames though connected", labels=["camera"]
            ),
            "people": CounterMetricFamily("psdiff_detections", "People found", labels=["camera"]),
        }
        for each in cameras:
            name = each["camera"]
            for one in State:
                state.add_metric([name, str(one)], each["state"] == one)
            if each.get("clock_offset_s") is not None:
                offset.add_metric([name], each["clock_offset_s"])
            unseen = Counter(each.get("skipped", {})) + Counter(each.get("dropped", {}))
            for reason, count in unseen.items():
                dropped.add_metric([name, reason], count)
            for reason, count in each.get("reconnects", {}).items():
                reconnects.add_metric([name, reason], count)
            for key, family in sums.items():
                family.add_metric([name], each.get(key, 0))
        yield from (state, offset, dropped, reconnects, *sums.values())
        yield from self._totals()

    def _totals(self) -> Iterator[Metric]:
        totals = self._service.totals
        steps = CounterMetricFamily("psdiff_ddim_steps", "Frames by their number of steps", labels=["steps"])
        for k, count in sorted(totals.steps.items()):
            steps.add_metric([str(k)], count)
        late = CounterMetricFamily("psdiff_slo_miss", "Frames done after their deadline", labels=["camera"])
        for camera, count in sorted(totals.late.items()):
            late.add_metric([camera], count)
        failed = CounterMetricFamily("psdiff_event_write_errors", "Frames whose events could not be written")
        failed.add_metric([], totals.failed_writes)
        yield from (steps, late, failed)


def app_of(service: Service) -> FastAPI:
    """The HTTP interface of a service."""
    app = FastAPI(title="psdiff", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry()
    registry.register(SiteCollector(service))

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    @app.get("/startupz")
    def readyz(response: Response) -> dict[str, str]:
        response.status_code = 200 if service.is_ready else 503
        return {"status": "ready" if service.is_ready else "not ready"}

    @app.get("/api/v1/cameras")
    def cameras() -> list[dict[str, Any]]:
        return service.cameras()

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


class HttpServer:
    """uvicorn in a thread of its own."""

    def __init__(self, service: Service, listen: str) -> None:
        """listen: HOST:PORT."""
        host, _, port = listen.rpartition(":")
        config = uvicorn.Config(
            app_of(service),
            host=host,
            port=int(port),
            log_level="warning",
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
