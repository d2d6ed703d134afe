"""What a camera may be: the text of a user -> which kind of source, what FFmpeg opens, and what may be shown.

An allow-list, because FFmpeg knows protocols that read any file (concat:, subfile:) or talk to anything (gopher:).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from .frames import SourceError

SourceKind = Literal["rtsp", "http", "v4l2", "path"]

NETWORK: dict[str, SourceKind] = {"rtsp": "rtsp", "rtsps": "rtsp", "http": "http", "https": "http"}
WANTED = (
    "rtsp://, rtsps://, http:// or https:// with a host, v4l2:///dev/video0, "
    "file:///path, or the path of a video or of a folder of images"
)

# Where clouds answer whoever asks from inside the machine, with its credentials.
METADATA = frozenset(map(ipaddress.ip_address, ("100.100.100.200", "fd00:ec2::254")))

_DEVICE = re.compile(r"/dev/(video\d+|v4l/by-(id|path)/[\w.:+-]+)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

# Some cameras carry the login in the path or the query: /user=admin&password=secret&channel=1.sdp
LOGIN_FIELD = re.compile(r"(?i)(user(name)?|pass(word|wd)?|pwd|token|auth|key|secret)[=_:][^&/?;]*[&;]?")


@dataclass(frozen=True)
class SourceAddress:
    """Where frames come from."""

    kind: SourceKind
    url: str
    """What FFmpeg opens; it may hold credentials."""
    shown: str
    """The same without credentials, for people and logs."""
    host: str | None = None
    """Of rtsp and http."""
    path: Path | None = None
    """Of path: a video, an image, or a folder of images; of v4l2 the device."""

    @property
    def is_playlist(self) -> bool:
        """Whether it is HLS, by its name."""
        return self.kind == "http" and urlsplit(self.url).path.lower().endswith((".m3u8", ".m3u"))


def parse_address(text: str, folder: Path = Path()) -> SourceAddress:
    """Read what a user wrote. folder: where relative paths begin.

    Whether it is there is not asked. Raises SourceError; its text never holds credentials.
    """
    scheme = _SCHEME.match(text)
    if scheme is None or (not text.startswith(f"{scheme[0]}//") and (folder / text).exists()):
        return _path(folder / text)
    kind = NETWORK.get(scheme[1].lower())
    if kind is not None:
        url = _split(text, scheme[1])
        # Recorders tell cameras apart by the query of rtsp://; over HTTP it holds signatures of every name.
        place = _without_login(_location(url)) if kind == "rtsp" else _without_login(url.path)
        shown = f"{url.scheme}://{_host_and_port(url)}{place}"
        refuse_address(url.hostname or "")
        return SourceAddress(kind, text, shown, host=url.hostname)
    rest = text[scheme.end() :]
    if scheme[1].lower() == "file" and rest.startswith("///"):
        return _path(Path(unquote(rest[2:])))
    if scheme[1].lower() == "v4l2" and _DEVICE.fullmatch(rest[2:]):
        return SourceAddress("v4l2", rest[2:], text, path=Path(rest[2:]))
    # Nothing after the scheme is shown: what cannot be read may hold a password anywhere.
    raise SourceError(f"source must be {WANTED}; got a URL {scheme[0]}..." + _hint(scheme[1]))


def refuse_address(host: str) -> None:
    """Refuse a literal link-local or metadata address. Raises SourceError."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return
    address = getattr(address, "ipv4_mapped", None) or address
    if address.is_link_local or address in METADATA:
        raise SourceError(
            f"source must not be a link-local or metadata address, got {address}; "
            "clouds give their machines' credentials there to whoever asks, so give the camera another address"
        )


def refuse_host(host: str) -> None:
    """Refuse a name that stands for such an address. A name that nobody knows passes: opening it tells why.

    Raises SourceError.
    """
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return
    for *_, address in found:
        refuse_address(str(address[0]))


def _location(url: SplitResult) -> str:
    """Path and query."""
    return url.path + (f"?{url.query}" if url.query else "")


def _without_login(text: str) -> str:
    """Path and query without the fields in which cameras take logins."""
    return LOGIN_FIELD.sub("", text).rstrip("?&")


def _path(path: Path) -> SourceAddress:
    # With "file:" FFmpeg takes a name such as cam:1.mp4 for a file, and never for a protocol.
    return SourceAddress("path", f"file:{path}", str(path), path=path)


def _split(text: str, scheme: str) -> SplitResult:
    try:
        url = urlsplit(text)
        usable = bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable, url = False, None
    if not usable or url is None:
        raise SourceError(f"source must be {WANTED}; got a URL {scheme}://...")
    return url


def _host_and_port(url: SplitResult) -> str:
    host = f"[{url.hostname}]" if ":" in (url.hostname or "") else f"{url.hostname}"
    return f"{host}:{url.port}" if url.port else host


def _hint(scheme: str) -> str:
    return f"; a file of that name is ./{scheme}:..." if len(scheme) > 1 else ""
