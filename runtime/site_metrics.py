"""What a service counts, as Prometheus wants it; read at each scrape, so that nothing is kept twice."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .backends import TRITON
from .capture_time import CaptureSource
from .connection import State
from .detector import backend_version
from .live_site import LiveSite
from .service import Service

# Where events go. Brokers will be more.
FILE_SINK = "file"


class SiteCollector:
    """The metrics of a service."""

    def __init__(self, service: Service, live: LiveSite | None = None) -> None:
        """live: the file of the site, where it is followed."""
        self._service = service
        self._live = live
        backend = service.site.model.backend
        self._engine_name = backend if backend == TRITON else backend_version(backend)

    def collect(self) -> Iterator[Metric]:
        """Give every metric once."""
        yield from self._cameras()
        yield from self._events()
        yield from self._engine()
        if self._live is not None:
            yield _counter(
                "psdiff_config_errors", "Edits of the site's file that were refused", self._live.errors
            )
            yield _gauge(
                "psdiff_config_valid", "1 where what stands in the file is in effect", self._live.is_valid
            )

    def _cameras(self) -> Iterator[Metric]:
        state = GaugeMetricFamily(
            "psdiff_camera_state", "1 for the state a camera is in", labels=["camera", "state"]
        )
        source = GaugeMetricFamily(
            "psdiff_camera_time_source_info",
            "1 for what dates the frames of a camera now",
            labels=["camera", "source"],
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
            "late": CounterMetricFamily(
                "psdiff_slo_miss", "Frames done after their deadline", labels=["camera"]
            ),
            "stalled_s": CounterMetricFamily(
                "psdiff_camera_stall_seconds", "Time without frames though connected", labels=["camera"]
            ),
            "people": CounterMetricFamily("psdiff_detections", "People found", labels=["camera"]),
        }
        for each in self._service.cameras():
            name = each["camera"]
            for one in State:
                state.add_metric([name, str(one)], each["state"] == one)
            # A source that is no more is 0 and not absent: info metrics are joined by what is 1.
            for one in get_args(CaptureSource):
                source.add_metric([name, one], each.get("time_source") == one)
            if each.get("clock_offset_s") is not None:
                offset.add_metric([name], each["clock_offset_s"])
            unseen = Counter(each.get("skipped", {})) + Counter(each.get("dropped", {}))
            for reason, count in unseen.items():
                dropped.add_metric([name, reason], count)
            for reason, count in each.get("reconnects", {}).items():
                reconnects.add_metric([name, reason], count)
            for key, family in sums.items():
                family.add_metric([name], each.get(key, 0))
        yield from (state, source, offset, dropped, reconnects, *sums.values())

    def _events(self) -> Iterator[Metric]:
        totals = self._service.totals
        published = CounterMetricFamily(
            "psdiff_events_published", "Events that were handed over", labels=["sink"]
        )
        published.add_metric([FILE_SINK], totals.events)
        failed = CounterMetricFamily(
            "psdiff_event_publish_errors", "Frames whose events could not be handed over", labels=["sink"]
        )
        failed.add_metric([FILE_SINK], totals.failed_writes)
        yield from (published, failed)
        try:
            free = shutil.disk_usage(self._service.site.site.data_dir).free
        # What cannot be read is left out, and alerts on absence say so.
        except OSError:
            return
        yield _gauge("psdiff_storage_free_bytes", "Room for events on the volume of data_dir", free)

    def _engine(self) -> Iterator[Metric]:
        service = self._service
        engine = GaugeMetricFamily(
            "psdiff_engine_info", "1; what finds people", labels=["engine", "model", "sha256", "space"]
        )
        model = service.model
        engine.add_metric([self._engine_name, model.id, model.sha256, model.space], 1)
        yield engine
        # A service is not built over an engine without proof: the metric is there for alerts, and for the day when
        # proofs are repeated at work.
        yield _gauge("psdiff_engine_verify_ok", "1 where the engine computed what PyTorch computed", 1)
        build = GaugeMetricFamily("psdiff_build_info", "1; which psdiff", labels=["version"])
        build.add_metric([_version()], 1)
        yield build


def _gauge(name: str, told: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, told, value=float(value))


def _counter(name: str, told: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, told, value=float(value))


def _version() -> str:
    try:
        return version("psdiff")
    # A checkout that was never installed.
    except PackageNotFoundError:
        return "unknown"
