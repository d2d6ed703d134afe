"""Videos and cameras opened by PyAV (FFmpeg), with errors that say why a camera did not answer."""

from __future__ import annotations

import errno
import struct
import time

import av
import av.error
from av.container import InputContainer
from av.packet import Packet

from .connection import Reason
from .frames import SourceError
from .source_address import SourceAddress, refuse_host

NO_ANSWER = "no answer in time"

# By kind of source; what FFmpeg needs for it, and nothing that reads files for somebody else.
PROTOCOLS = {
    "rtsp": "rtsp,rtsps,rtp,srtp,udp,tcp,tls",
    "http": "http,https,httpproxy,tcp,tls,crypto",
    "path": "file",
}

# Over HTTP: what cameras, recorders and web servers send. Nothing that refers to other files but HLS.
HTTP_FORMATS = "hls,mpegts,mov,mp4,matroska,webm,flv,avi,ogg,mpjpeg,mjpeg,jpeg_pipe,h264,hevc,aac,mp3,webvtt"

# Redirects can be refused from here on (FFmpeg 8.1); older ones pass over the option without a word.
OLDEST_LIBAVFORMAT_FOR_HTTP = (62, 12)

# Files that name other files, or hosts. A recording is one file.
REFERRING_FORMATS = frozenset({"concat", "hls", "dash", "imf", "sdp", "image2", "webm_dash_manifest"})

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


def open_recording(address: SourceAddress) -> InputContainer:
    """Open a file. Raises SourceError."""
    try:
        container = av.open(address.url, options=_options(address), metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise SourceError(f"source must be a video, got {told(error)} from {address.shown}") from None
    if container.format.name in TEXT_FORMATS:
        container.close()
        raise SourceError(f"source must be a video, got text in {address.shown}")
    return container


def open_camera(
    address: SourceAddress, open_timeout_s: float, read_timeout_s: float, transport: str = "tcp"
) -> InputContainer:
    """Connect to a camera. transport: of RTSP. Raises CameraError."""
    if address.host is not None:
        refuse_host(address.host)
    if address.kind == "http" and av.library_versions["libavformat"] < OLDEST_LIBAVFORMAT_FOR_HTTP:
        raise CameraError(
            "PyAV must be built on FFmpeg 8.1 or newer for cameras over HTTP, got libavformat "
            f"{'.'.join(map(str, av.library_versions['libavformat']))}; run pip install 'av>=18'",
            Reason.UNSUPPORTED,
        )
    options = _options(address)
    if address.kind == "rtsp":
        options |= {"rtsp_transport": transport, "analyzeduration": str(ANALYSED_US)}
    if address.host is not None:
        # FFmpeg's own socket timeout (microseconds) bounds each wait, PyAV's the opening as a whole.
        options["timeout"] = str(int(read_timeout_s * 1e6))
    start = time.monotonic()
    try:
        return av.open(
            address.url,
            format="v4l2" if address.kind == "v4l2" else None,
            options=options,
            timeout=(open_timeout_s, read_timeout_s),
            metadata_errors="replace",
        )
    except av.error.FFmpegError as error:
        # FFmpeg's RTSP client reports a timeout as invalid data; the clock tells which it was.
        timed_out = time.monotonic() - start > 0.95 * min(open_timeout_s, read_timeout_s)
        # The text of an FFmpegError holds the URL, and with it the password; strerror does not.
        what = NO_ANSWER if timed_out else told(error)
        reason = Reason.TIMEOUT if timed_out else reason_of(error)
        raise CameraError(
            f"source must be a camera that answers, got {what} from {address.shown}", reason
        ) from None


def is_live(address: SourceAddress, container: InputContainer) -> bool:
    """Whether it goes on for ever: a camera; over HTTP what does not tell its length."""
    return address.kind in ("rtsp", "v4l2") or (address.kind == "http" and container.duration is None)


def comes_in_segments(container: InputContainer) -> bool:
    """Whether it is HLS: seconds of video at once, then nothing for as long."""
    return container.format.name == "hls"


def has_timestamps(container: InputContainer) -> bool:
    """Whether PTS mean anything: JPEGs over HTTP carry none, and FFmpeg numbers them as if they were 25 a second."""
    return container.format.name not in ("mpjpeg", "mjpeg")


def _options(address: SourceAddress) -> dict[str, str]:
    """What FFmpeg may open on the way, also when a file or a playlist tells it to."""
    if address.kind == "v4l2":
        return {}
    options = {"protocol_whitelist": PROTOCOLS[address.kind]}
    if address.kind == "path":
        options["format_whitelist"] = ",".join(sorted(av.formats_available - REFERRING_FORMATS))
    elif address.kind == "http":
        # A redirect goes where the other side wants, past the look at the host.
        options |= {"format_whitelist": HTTP_FORMATS, "max_redirects": "0"}
    return options


def told(error: av.error.FFmpegError) -> str:
    """What FFmpeg says, without the URL."""
    if error.errno == errno.EINVAL:
        return "a format that is not allowed, such as one that refers to other files,"
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
    unknown = isinstance(error, (av.error.DecoderNotFoundError, av.error.ProtocolNotFoundError))
    if unknown or error.errno == errno.EINVAL:
        return Reason.UNSUPPORTED
    return Reason.LOST


def reference_time(packet: Packet) -> float | None:
    """What the camera's clock was at the packet's PTS, in seconds since 1970; None where no report has told."""
    if not packet.has_sidedata("prft"):
        return None
    [microseconds] = REFERENCE_TIME.unpack_from(bytes(packet.get_sidedata("prft")))
    return microseconds / 1e6
