"""psdiff serve."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from ..cli import FAILED, UsageError, app, fail, reported_errors, usage

# A service manager kills what has not ended after this.
DRAIN_S = 10.0


@app.command()
@reported_errors()
def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="SITE.yaml", help="The site.", show_default=False)
    ],
) -> None:
    """Watch the cameras of a site until it is stopped: detections as events, health and metrics over HTTP.

    Cameras that are missing are waited for. SIGTERM and Ctrl-C end the service in order, within ten seconds.

    psdiff config show SITE.yaml prints what holds; psdiff config schema what may be written.
    """
    import logging
    import threading

    from ..bundle import load_manifest
    from ..runtime.detector import shipped_bundle
    from ..runtime.service import Service
    from ..runtime.site_file import load_site, resolved_url
    from ..runtime.step_costs import cost_table
    from ..runtime.verified import open_proven

    try:
        from ..runtime.service_api import HttpServer
    except ImportError as error:
        raise UsageError(
            f"psdiff serve must have fastapi and more, got {error}; run pip install psdiff[serve]"
        ) from None

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    site = load_site(config)
    for camera in site.cameras:
        resolved_url(camera)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    folder = site.model.bundle or shipped_bundle()
    manifest = load_manifest(folder)
    with usage():
        detector = open_proven(
            manifest, folder, site.model.backend, threads=site.model.threads, server=site.model.server
        )
        service = Service(site, manifest, detector, cost_table(site, manifest, detector))
    http = HttpServer(service, site.api.listen)
    http.start()
    service.start()
    typer.echo(f"watching {len(site.cameras)} cameras; http://{site.api.listen}/api/v1/cameras", err=True)
    stopped.wait()
    typer.echo("stopping", err=True)
    ended = service.stop(DRAIN_S)
    http.stop()
    if not ended:
        fail(f"service must end within {DRAIN_S:g} s, got threads that did not", FAILED)
