"""One camera of a site: a thread that connects, decodes, dates and offers frames, and connects again.

Whatever happens to one camera stays in its thread: the others, and the detector, see its frames stop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from .capture_time import CaptureClock, CaptureTime, Trust
from .connection import Connection, HostLimit, Reason
from .containers import CameraError
from .frames import Picture, SourceError
from .playback import CameraSource, Playback, frames_of, open_playback
from .source_address import parse_address
from .video import Decoded

# A camera must describe its stream and send a whole picture in this time.
OPEN_TIMEOUT_S = 10.0

# A connection on which nothing comes for so long is given up. Longer than a stall, so that this can be seen, and
# than the five seconds between two frames of the slowest cameras.
READ_TIMEOUT_S = 5.5

# How far behind the camera a playlist plays: three segments, as they are in use.
SEGMENTS_LATE_S = 30.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class CameraFrame:
    """One frame of a camera, dated."""

    camera: str
    seq: int
    """Frames that the camera has sent before, over all connections."""
    image: Picture
    """(height, width, 3) uint8 RGB."""
    time: CaptureTime
    pts_s: float | None
    """Seconds since the connection's first frame."""
    connection: int
    """Which connection brought it: sizes and clocks may differ between two."""
    decode_s: float | None = None
    """What the codec took; None where nobody measured. The conversion to RGB counts as waiting."""


Offer = Callable[[CameraFrame, float, float], str | None]
"""Takes a frame, now and its deadline (seconds, monotonic); returns why the frame is not wanted, None where it is."""


@dataclass(frozen=True)
class FeedSettings:
    """One camera, as its feed needs to know it."""

    camera: str
    url: str = field(repr=False)
    """As in a site, with its secrets."""
    latency_s: float
    """Promised from capture to people; it sets the deadlines. Where the camera does not tell when a frame was
    captured, the promise counts from its arrival."""
    sample_fps: float | None = None
    """Frames a second that are offered; None for all."""
    playback: Playback = field(default_factory=Playback)
    trust_clock: Trust = "auto"
    first_seq: int = 0
    """Of the first frame, so that numbers stay unique where a camera is followed anew."""


class Feed(Protocol):
    """What follows a camera, in this process or in another."""

    camera: str

    def start(self) -> None:
        """Begin to connect."""
        ...

    def stop(self) -> None:
        """Ask it to end."""
        ...

    def join(self, timeout_s: float) -> bool:
        """Wait for its end; False where it is still there."""
        ...

    def status(self) -> dict[str, Any]:
        """The state of the connection, for people and metrics; without secrets."""
        ...


@dataclass
class FeedCounters:
    """What a camera has sent, over all connections."""

    decoded: int = 0
    corrupt_packets: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    """Frames that were not offered, by reason: corrupt, stride, or what the one they are offered to says."""


class CameraFeed:
    """Follows a camera until it is stopped."""

    def __init__(self, settings: FeedSettings, offer: Offer, limit: HostLimit) -> None:
        """offer: called by the feed's thread, with each frame that is wanted. limit: shared by cameras.

        Raises SourceError for a URL that is none.
        """
        self.camera = settings.camera
        self._settings = settings
        self._address = parse_address(settings.url)
        self._name = self._address.shown
        self._decoder: str | None = None
        self._offer_frame = offer
        self._limit = limit
        self._clock = CaptureClock(settings.trust_clock)
        self._connection = Connection(time.monotonic())
        self._counters = FeedCounters()
        self._connections = 0
        self._time_source: str | None = None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._follow, name=f"camera {self.camera}", daemon=True)

    def start(self) -> None:
        """Begin to connect."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end; it does within the read timeout."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; False where it is still there."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def status(self) -> dict[str, Any]:
        """The state of the connection, for people and metrics; without secrets."""
        now_s = time.monotonic()
        with self._lock:
            connection = self._connection
            connection.check(now_s)
            offline_since_s = connection.offline_since_s
            return {
                "camera": self.camera,
                "source": self._name,
                "state": str(connection.state),
                "state_s": round(now_s - connection.since_s, 3),
                "reason": None if connection.reason is None else str(connection.reason),
                "offline_s": None if offline_since_s is None else round(now_s - offline_since_s, 3),
                "retry_in_s": None
                if connection.retry_s is None
                else round(max(0.0, connection.retry_s - now_s), 3),
                "reconnects": {str(reason): count for reason, count in connection.reconnects.items()},
                "stalled_s": round(connection.stalled_s, 3),
                "decoded": self._counters.decoded,
                "corrupt_packets": self._counters.corrupt_packets,
                "skipped": dict(self._counters.skipped),
                "time_source": self._time_source,
                "clock_offset_s": self._clock.camera_offset_s,
                "decoder": self._decoder,
            }

    def _follow(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                self._connection.connect(time.monotonic())
            crash: Exception | None = None
            try:
                if self._stream():
                    if self._settings.playback.loop:
                        continue
                    with self._lock:
                        self._connection.end(time.monotonic())
                    return
                reason, message = Reason.ENDED, "the camera ended its stream"
            except CameraError as error:
                reason, message = error.reason, str(error)
            except SourceError as error:
                reason, message = Reason.UNSUPPORTED, str(error)
            # A camera may send anything; what that breaks must not end the thread.
            except Exception as error:
                reason, message, crash = Reason.CRASHED, f"{type(error).__name__} in {self._name}", error
            if self._stopping.is_set():
                break
            with self._lock:
                retry_s = self._connection.fail(reason, time.monotonic())
            logger.warning(
                "%s: %s; next try in %.1f s",
                self.camera,
                message,
                retry_s - time.monotonic(),
                exc_info=crash,
                extra={"camera": self.camera, "err_code": str(reason)},
            )
            self._stopping.wait(max(0.0, retry_s - time.monotonic()))
        with self._lock:
            self._connection.disable(time.monotonic())

    def _stream(self) -> bool:
        """One connection, to its end. Whether that was the end of a recording."""
        playback = self._settings.playback
        with self._limit.connecting(self._address.host or ""):
            if self._stopping.is_set():
                return False
            source = open_playback(self._address, self.camera, playback, OPEN_TIMEOUT_S, READ_TIMEOUT_S)
        self._connections += 1
        with self._lock:
            self._clock.begin_connection()
        corrupt_before = self._counters.corrupt_packets
        planned_s = 0.0
        with source:
            for decoded in frames_of(source, playback, self._address.kind, self._stopping.wait):
                if self._stopping.is_set():
                    return False
                now_s = time.monotonic()
                with self._lock:
                    self._connection.frame(now_s)
                    self._counters.decoded += 1
                    self._counters.corrupt_packets = corrupt_before + source.corrupt_packets
                    self._decoder = source.decoder
                    seq = self._settings.first_seq + self._counters.decoded - 1
                    captured = self._captured(source, decoded)
                    self._time_source = captured.source
                    unwanted = self._unwanted(decoded, planned_s)
                    if unwanted is not None:
                        self._counters.skipped[unwanted] += 1
                        continue
                planned_s = self._next_wanted_s(decoded, planned_s)
                self._offer(source, decoded, captured, seq, now_s)
        return not source.is_live

    def _captured(self, source: CameraSource, decoded: Decoded) -> CaptureTime:
        """When a frame was captured."""
        if source.created is not None and decoded.pts_s is not None and not self._settings.playback.loop:
            return self._clock.recorded(source.created.timestamp() + decoded.pts_s)
        captured = self._clock.time_of(decoded.pts_s, decoded.arrival, decoded.reference_s)
        if not source.comes_in_segments:
            return captured
        return replace(captured, uncertainty_s=captured.uncertainty_s + SEGMENTS_LATE_S)

    def _unwanted(self, decoded: Decoded, planned_s: float) -> str | None:
        """Why a frame is not looked at; None where it is."""
        if decoded.is_damaged:
            return "corrupt"
        if self._settings.sample_fps is None:
            return None
        # A PTS that starts again lies before anything that is planned.
        return (
            "stride"
            if planned_s - 1 / self._settings.sample_fps <= _video_time(decoded) < planned_s
            else None
        )

    def _next_wanted_s(self, decoded: Decoded, planned_s: float) -> float:
        """When the next frame is wanted, after one that was planned for planned_s."""
        if self._settings.sample_fps is None:
            return 0.0
        interval_s, now_s = 1 / self._settings.sample_fps, _video_time(decoded)
        # By the plan, so that frames between two plans do not lower the rate; anew after a gap.
        return planned_s + interval_s if 0 <= now_s - planned_s < interval_s else now_s + interval_s

    def _offer(
        self, source: CameraSource, decoded: Decoded, captured: CaptureTime, seq: int, now_s: float
    ) -> None:
        image = source.picture(decoded).image
        # From the capture where it is known. A way that is only assumed must not use up the promise.
        known = captured.source == "rtcp_sr"
        age_s = max(0.0, decoded.arrival.utc_s - captured.utc_s) if known else 0.0
        frame = CameraFrame(
            self.camera, seq, image, captured, decoded.pts_s, self._connections, decoded.decode_s
        )
        unwanted = self._offer_frame(frame, now_s, now_s - age_s + self._settings.latency_s)
        if unwanted is not None:
            with self._lock:
                self._counters.skipped[unwanted] += 1


def _video_time(decoded: Decoded) -> float:
    """Seconds on the camera's timeline; on ours where it has none."""
    return decoded.arrival.monotonic_s if decoded.pts_s is None else decoded.pts_s
