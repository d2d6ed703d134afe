"""A file, a folder or an RTSP URL given by the user -> an open source of frames with a camera name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from .frames import IMAGE_SUFFIXES, ImageSource, Source, SourceError, image_files
from .video import LiveSource, VideoSource

RTSP_SCHEMES = frozenset({"rtsp", "rtsps"})

# Some cameras carry the login in the path or the query: /user=admin&password=secret&channel=1.sdp
_LOGIN_FIELD = re.compile(r"(?i)(user(name)?|pass(word|wd)?|pwd|token|auth|key|secret)[=_:][^&/?;]*[&;]?")


def open_source(
    uri: str,
    *,
    camera: str | None = None,
    every: int = 1,
    open_timeout_s: float = 10.0,
    read_timeout_s: float = 5.0,
) -> Source:
    """Open a video file, an image, a folder of images or an rtsp:// URL, and decode its first frame.

    camera: its name, by default camera_name(uri). every: give each every-th decoded frame.
    open_timeout_s, read_timeout_s: how long a camera may take to connect, and to send each packet.
    Raises SourceError; its text never holds credentials.
    """
    if every < 1:
        raise ValueError(f"every must be a whole number >= 1, got {every}")
    camera = camera or camera_name(uri)
    url = _rtsp_url(uri)
    if url is not None:
        video = VideoSource(
            uri,
            camera,
            name=without_credentials(uri),
            live=True,
            every=every,
            open_timeout_s=open_timeout_s,
            read_timeout_s=read_timeout_s,
        )
        return LiveSource(video)
    return _open_path(Path(uri), camera, every)


def _open_path(path: Path, camera: str, every: int) -> ImageSource | VideoSource:
    if not path.exists():
        raise SourceError(f"source must be an existing file or folder, or an rtsp:// URL, got {path}")
    if path.is_dir():
        paths = image_files(path)
        if not paths:
            raise SourceError(f"source must be a folder with images, got {path}, which has none")
        return ImageSource(paths, camera, name=str(path), every=every)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource([path], camera, name=str(path), every=every)
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"source must be a video, got an empty file: {path}")
    # With "file:" FFmpeg takes a name such as cam:1.mp4 for a file, and never for a protocol.
    return VideoSource(f"file:{path}", camera, name=str(path), every=every)


def camera_names(uris: Sequence[str]) -> list[str]:
    """Return one name a source, made unique by a number: lobby, lobby-2."""
    names: list[str] = []
    for name in map(camera_name, uris):
        unique, count = name, 1
        while unique in names:
            count += 1
            unique = f"{name}-{count}"
        names.append(unique)
    return names


def camera_name(uri: str) -> str:
    """Name a camera by its file, folder, or host and path; letters, digits, '.', '_' and '-' only."""
    url = _rtsp_url(uri)
    if url is not None:
        text = f"{url.hostname}/{_without_login(_location(url))}"
    else:
        path = Path(uri).resolve()
        text = path.name if path.is_dir() else path.stem
    return re.sub(r"[^\w.-]+", "_", text).strip("._-") or "camera"


def without_credentials(uri: str) -> str:
    """Return the URI as it may be shown: an rtsp:// URL without user, password, or login fields."""
    url = _rtsp_url(uri)
    if url is None:
        return uri
    port = f":{url.port}" if url.port else ""
    return f"{url.scheme}://{url.hostname}{port}{_without_login(_location(url))}"


def _location(url: SplitResult) -> str:
    return url.path + (f"?{url.query}" if url.query else "")


def _without_login(text: str) -> str:
    return _LOGIN_FIELD.sub("", text).rstrip("?&")


def _rtsp_url(uri: str) -> SplitResult | None:
    """Return the parts of an RTSP URL, None for a path. Raises SourceError for any other or a broken URL."""
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return None
    try:
        url = urlsplit(uri)
        usable = url.scheme in RTSP_SCHEMES and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        usable, url = False, None
    if not usable or url is None:
        # Nothing after the scheme is shown: a URL that cannot be parsed may hold a password anywhere.
        raise SourceError(
            f"source must be a file, a folder of images or rtsp://host[:port]/path, got a URL {scheme}://..."
        )
    return url
