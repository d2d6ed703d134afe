"""OpenTelemetry: one trace for every so-manyth frame of a camera, with a span a stage.

Needs psdiff[traces]; nothing here is imported from there before a site asks for traces. Where they go is said by
the standard OTEL_* variables.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from .stage_times import FrameRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Span

# A collector that does not answer must not hold up the end of a service.
FLUSH_S = 0.5

NS = 1_000_000_000


class TraceError(Exception):
    """Traces were asked for and cannot be had."""


class _Numbered(Protocol):
    @property
    def camera(self) -> str: ...
    @property
    def seq(self) -> int: ...


class FrameTrace:
    """The trace of one frame, begun."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self.trace_id = f"{span.get_span_context().trace_id:032x}"
        """As in the event."""


class FrameTracer:
    """Begins and ends the traces of frames; for the detector's thread."""

    def __init__(self, sample_every: int, processor: SpanProcessor | None = None) -> None:
        """sample_every: of each camera the first frame, then one in so many. processor: by default what OTEL_* say.

        Raises TraceError where OpenTelemetry, or the exporter that is asked for, is not installed.
        """
        try:
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
        except ImportError as error:
            raise TraceError(
                f"trace.sample_every must be null without OpenTelemetry, got {sample_every} and {error}; "
                "run pip install psdiff[traces]"
            ) from None
        name = {} if "OTEL_SERVICE_NAME" in os.environ else {SERVICE_NAME: "psdiff"}
        self._provider: TracerProvider = TracerProvider(
            resource=Resource.create(name), shutdown_on_exit=False
        )
        self._provider.add_span_processor(processor or _exporting())
        self._tracer = self._provider.get_tracer("psdiff")
        self._sample_every = sample_every
        self._seen: Counter[str] = Counter()

    def begin(self, frame: _Numbered, start_utc_s: float) -> FrameTrace | None:
        """Begin the trace of a frame, at its capture; None for most frames."""
        from opentelemetry.context import Context

        self._seen[frame.camera] += 1
        if (self._seen[frame.camera] - 1) % self._sample_every:
            return None
        span = self._tracer.start_span("frame", Context(), start_time=round(start_utc_s * NS))
        # OTEL_TRACES_SAMPLER may say no.
        return FrameTrace(span) if span.is_recording() else None

    def end(self, trace: FrameTrace, record: FrameRecord) -> None:
        """Write the spans of the stages, and end the trace."""
        from opentelemetry.trace import set_span_in_context

        # Stages were measured by the clock that nobody sets.
        to_utc_s = time.time() - time.monotonic()
        for stage in record.stages:
            span = self._tracer.start_span(
                stage.name, set_span_in_context(trace.span), start_time=round((stage.start_s + to_utc_s) * NS)
            )
            span.end(round((stage.end_s + to_utc_s) * NS))
        trace.span.set_attributes(
            {
                "psdiff.camera": record.camera,
                "psdiff.frame_seq": record.seq,
                "psdiff.steps": record.steps,
                "psdiff.batch": record.batch,
                "psdiff.people": record.people,
            }
        )
        trace.span.end(round((record.stages[-1].end_s + to_utc_s) * NS))

    def close(self) -> None:
        """Send what is left, for FLUSH_S at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        thread.start()
        thread.join(FLUSH_S)


def _exporting() -> SpanProcessor:
    """What hands spans to the exporter of OTEL_TRACES_EXPORTER, by default OTLP over HTTP."""
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "otlp")
    group = entry_points(group="opentelemetry_traces_exporter")
    # The general name belongs to a package with both protocols; ours is the one over HTTP.
    names = (wanted, "otlp_proto_http") if wanted == "otlp" else (wanted,)
    for name in names:
        for found in group.select(name=name):
            return BatchSpanProcessor(found.load()())
    known = ", ".join(sorted(each.name for each in group))
    raise TraceError(
        f"OTEL_TRACES_EXPORTER must be installed, got {wanted}; installed are {known or 'none'}; "
        "run pip install psdiff[traces]"
    )
