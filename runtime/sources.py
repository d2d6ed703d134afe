"""A file, a folder or the URL of a camera, given by the user -> an open source of frames with a camera name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .connection import Reason
from .containers import CameraError
from .frames import IMAGE_SUFFIXES, ImageSource, Source, SourceError, image_files
from .live_source import LiveSource
from .source_address import parse_address
from .video import VideoSource


def open_source(
    uri: str,
    *,
    camera: str | None = None,
    every: int = 1,
    open_timeout_s: float = 10.0,
    read_timeout_s: float = 5.0,
) -> Source:
    """Open a video file, an image, a folder of images or a camera's URL, and decode its first frame.

    camera: its name, by default camera_name(uri). every: give each every-th decoded frame.
    open_timeout_s, read_timeout_s: how long a camera may take to connect, and to send each packet.
    Raises SourceError; its text never holds credentials.
    """
    if every < 1:
        raise ValueError(f"every must be a whole number >= 1, got {every}")
    camera = camera or camera_name(uri)
    address = parse_address(uri)
    if address.kind == "path":
        images = images_at(Path(uri) if address.path is None else address.path)
        if images is not None:
            return ImageSource(images, camera, name=address.shown, every=every)
        return VideoSource(address, camera, every=every)
    video = VideoSource(
        address, camera, every=every, open_timeout_s=open_timeout_s, read_timeout_s=read_timeout_s
    )
    return LiveSource(video) if video.is_live else video


def images_at(path: Path) -> list[Path] | None:
    """Return the images of a folder, or the one at the path; None for a video. Raises SourceError."""
    if not path.exists():
        raise CameraError(
            f"source must be an existing file or folder, or the URL of a camera, got {path}", Reason.NOT_FOUND
        )
    if path.is_dir():
        paths = image_files(path)
        if not paths:
            raise SourceError(f"source must be a folder with images, got {path}, which has none")
        return paths
    if path.is_file() and path.stat().st_size == 0:
        raise SourceError(f"source must be a video or an image, got an empty file: {path}")
    return [path] if path.suffix.lower() in IMAGE_SUFFIXES else None


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
    address = parse_address(uri)
    if address.host is not None:
        text = f"{address.host}/{address.shown.partition('://')[2].partition('/')[2]}"
    else:
        path = (address.path or Path(uri)).resolve()
        text = path.name if address.kind == "v4l2" or path.is_dir() else path.stem
    return re.sub(r"[^\w.-]+", "_", text).strip("._-") or "camera"
