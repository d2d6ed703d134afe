"""psdiff serve."""

from __future__ import annotations

import signal
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..cli import FAILED, UsageError, app, fail, reported_errors, usage

# A service manager kills what has not ended after ten seconds. The port is closed after the cameras, so that readyz
# tells of the end as long as it lasts.
DRAIN_S, SERVICE_S, LIVE_S = 10.0, 6.0, 0.5


class LogFormat(StrEnum):
    """--log-format."""

    AUTO = "auto"
    JSON = "json"
    TEXT = "text"


class LogLevel(StrEnum):
    """--log-level."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@app.command()
@reported_errors()
def serve(
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="SITE.yaml", help="The site.", show_default=False)
    ],
    log_format: Annotated[
        LogFormat, typer.Option(help="auto is text on a terminal, and JSON lines elsewhere.")
    ] = LogFormat.AUTO,
    log_level: Annotated[LogLevel, typer.Option(help="The least that is logged.")] = LogLevel.INFO,
) -> None:
    """Watch the cameras of a site until it is stopped: detections as events, health and metrics over HTTP.

    Cameras that are missing are waited for. Edits of cameras in the file take effect at once; one that is mistaken
    is refused in the log, and what was before goes on. SIGTERM and Ctrl-C end the service in order, within ten
    seconds.

    psdiff config show SITE.yaml prints what holds; psdiff config schema what may be written.
    """
    import logging
    import threading

    try:
        from ..runtime.live_site import LiveSite
        from ..runtime.logs import configure_logs
        from ..runtime.service_api import HttpServer
    except ImportError as error:
        raise UsageError(
            f"psdiff serve must have fastapi and more, got {error}; run pip install psdiff[serve]"
        ) from None
    from ..runtime.heaps import share_heaps
    from ..runtime.inherited_logs import tell_children
    from ..runtime.redaction import Redactor
    from ..runtime.service_start import open_service
    from ..runtime.site_changes import wanted_cameras
    from ..runtime.site_file import parse_site, read_site
    from ..runtime.systemd import ServiceNotifier
    from ..runtime.traces import FrameTracer

    share_heaps()
    redactor, logger = Redactor(), logging.getLogger(__name__)
    configure_logs(redactor, log_format.value, log_level.value)
    tell_children(log_format.value, log_level.value)
    text = read_site(config)
    site = parse_site(text, config)
    redactor.learn(site)
    wanted_cameras(site)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    tracer = None if site.trace.sample_every is None else FrameTracer(site.trace.sample_every)
    with usage():
        service = open_service(site, tracer)
    live = LiveSite(config, text, service, redactor.learn)
    http = HttpServer(service, site.api.listen, live)
    notifier = ServiceNotifier(lambda: not service.faults())
    http.start()
    service.start()
    live.start()
    notifier.ready()
    logger.info("watching %d cameras; http://%s/api/v1/cameras", len(site.cameras), site.api.listen)
    stopped.wait()
    logger.info("stopping")
    notifier.stopping()
    live.stop(0.0)
    ended = service.stop(SERVICE_S)
    live.stop(LIVE_S)
    http.stop()
    notifier.close()
    if tracer is not None:
        tracer.close()
    if not ended:
        fail(f"service must end within {DRAIN_S:g} s, got threads that did not", FAILED)
