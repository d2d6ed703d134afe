"""Videos and cameras opened by PyAV (FFmpeg), with errors that say why a camera did not answer."""

from __future__ import annotations

import struct
import time

import av
import av.error
from av.container import InputContainer
from av.packet import Packet

from .connection import Reason
from .frames import SourceError

NO_ANSWER = "no answer in time"

# FFmpeg shows plain text as a film of a terminal; nobody means that.
TEXT_FORMATS = frozenset({"tty", "bin", "xbin", "adf", "idf"})

# How much video FFmpeg watches before it says what it is, in microseconds. It wants to know the frame rate, which
# nobody needs here; left to itself it watches five seconds, in which a camera is offline.
ANALYSED_US = 500_000

# AVProducerReferenceTime of FFmpeg: microseconds since 1970, then flags.
REFERENCE_TIME = struct.Struct("<q")


class CameraError(SourceError):
    """A camera does not answer, or no longer."""

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


def open_video(url: str, name: str) -> InputContainer:
    """Open a file. name: what errors call it. Raises SourceError."""
    try:
        container = av.open(url, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise SourceError(f"source must be a video, got {told(error)} from {name}") from None
    if container.format.name in TEXT_FORMATS:
        container.close()
        raise SourceError(f"source must be a video, got text in {name}")
    return container


def open_camera(
    url: str, name: str, open_timeout_s: float, read_timeout_s: float, transport: str = "tcp"
) -> InputContainer:
    """Connect to a camera. name: what errors call it; without credentials. Raises CameraError."""
    # FFmpeg's own socket timeout (microseconds) bounds each wait, PyAV's the opening as a whole.
    options = {
        "rtsp_transport": transport,
        "timeout": str(int(read_timeout_s * 1e6)),
        "analyzeduration": str(ANALYSED_US),
    }
    start = time.monotonic()
    try:
        return av.open(
            url, options=options, timeout=(open_timeout_s, read_timeout_s), metadata_errors="replace"
        )
    except av.error.FFmpegError as error:
        # FFmpeg's RTSP client reports a timeout as invalid data; the clock tells which it was.
        timed_out = time.monotonic() - start > 0.95 * min(open_timeout_s, read_timeout_s)
        # The text of an FFmpegError holds the URL, and with it the password; strerror does not.
        what = NO_ANSWER if timed_out else told(error)
        reason = Reason.TIMEOUT if timed_out else reason_of(error)
        raise CameraError(f"source must be a camera that answers, got {what} from {name}", reason) from None


def told(error: av.error.FFmpegError) -> str:
    """What FFmpeg says, without the URL."""
    if isinstance(error, (av.error.ExitError, av.error.TimeoutError)):
        return NO_ANSWER
    return f"'{(error.strerror or type(error).__name__).lower()}'"


def reason_of(error: av.error.FFmpegError) -> Reason:
    """Why it failed, as far as it matters for the next try."""
    if isinstance(error, (av.error.ExitError, av.error.TimeoutError)):
        return Reason.TIMEOUT
    if isinstance(error, av.error.ConnectionRefusedError):
        return Reason.REFUSED
    if isinstance(error, (av.error.HTTPUnauthorizedError, av.error.HTTPForbiddenError)):
        return Reason.AUTH_FAILED
    if isinstance(error, av.error.HTTPNotFoundError):
        return Reason.NOT_FOUND
    if isinstance(error, (av.error.DecoderNotFoundError, av.error.ProtocolNotFoundError)):
        return Reason.UNSUPPORTED
    return Reason.LOST


def reference_time(packet: Packet) -> float | None:
    """What the camera's clock was at the packet's PTS, in seconds since 1970; None where no report has told."""
    if not packet.has_sidedata("prft"):
        return None
    [microseconds] = REFERENCE_TIME.unpack_from(bytes(packet.get_sidedata("prft")))
    return microseconds / 1e6
