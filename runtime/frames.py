"""One decoded frame, and frames from image files: a single picture or a folder of them.

Also here: what every source of frames offers (Source) and the error it raises (SourceError).
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Picture = NDArray[np.uint8]
TimeSource = Literal["file", "arrival", "rtcp_sr"]

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})

# 100 megapixels are 300 MB of RGB: more than any camera gives, less than a decompression bomb wants.
MAX_IMAGE_PIXELS = 100_000_000

logger = logging.getLogger(__name__)


class SourceError(Exception):
    """A source of frames cannot be opened, holds no frame, or failed while it was read."""


class ImageError(Exception):
    """A file is not an image that can be read."""


@dataclass(frozen=True, eq=False)
class VideoFrame:
    """One decoded frame of one camera."""

    camera: str
    seq: int
    """Decoded frames of this camera before this one; frames that are skipped count too."""
    pts_s: float | None
    """Seconds since the first frame; None where the source has no timestamps."""
    image: Picture
    """(height, width, 3) uint8 RGB."""
    time: datetime
    """UTC."""
    time_source: TimeSource
    """file: creation time of the file + pts_s. arrival: the clock of this machine when it was decoded. rtcp_sr: the
    camera's own clock."""
    uncertainty_s: float | None = None
    """How far time may be off, to either side; None where nobody has looked into it."""


class Source(Protocol):
    """Frames of one camera, in order. Opening proves that there is a first frame."""

    camera: str
    num_frames_hint: int | None
    """How many frames will be decoded, if that is known."""
    fps_hint: float | None
    every: int
    """Of the decoded frames, each every-th is given out."""
    frames_dropped: int
    """Frames of a live camera that were too old when the reader came for them."""

    @property
    def frames_corrupt(self) -> int:
        """Frames so far that were decoded but are damaged, and so were not given out; runtime.damage."""
        ...

    @property
    def frames_decoded(self) -> int:
        """Frames so far, skipped and dropped ones included."""
        ...

    @property
    def corrupt_packets(self) -> int:
        """Packets (or image files) so far that could not be decoded, or only in part."""
        ...

    def ready(self) -> bool:
        """Tell whether the next frame (or the end) can be had without waiting for a camera."""
        ...

    def __iter__(self) -> Iterator[VideoFrame]:
        """Give the frames. Raises SourceError when the source fails before its end."""
        ...

    def close(self) -> None:
        """Let go of the file or connection; a second call does nothing."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class ImageSource:
    """Image files as frames, in the given order; a file that cannot be read is skipped and counted."""

    fps_hint: float | None = None

    def __init__(self, paths: Sequence[Path], camera: str, *, name: str, every: int = 1) -> None:
        """Read the first image. name: how errors call the source. Raises SourceError if none can be read."""
        self.camera = camera
        self.num_frames_hint: int | None = len(paths)
        self.every = every
        self.frames_decoded = 0
        self.frames_dropped = 0
        self.frames_corrupt = 0
        self.corrupt_packets = 0
        self._frames = self._read(paths)
        self._first = next(self._frames, None)
        if self._first is None:
            raise SourceError(
                f"source must hold an image that can be read, got {len(paths)} damaged in {name}"
            )

    def ready(self) -> bool:
        """Return True: a disk does not make the reader wait."""
        return True

    def __iter__(self) -> Iterator[VideoFrame]:
        """Give the frames; what was given once is not given again."""
        if self._first is not None:
            first, self._first = self._first, None
            yield first
        yield from self._frames

    def close(self) -> None:
        """Stop giving frames."""
        self._first = None
        self._frames.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, paths: Sequence[Path]):  # noqa: ANN202 - a Generator, for its close()
        for path in paths:
            try:
                image = read_image(path, "frame")
            except ImageError as error:
                self.corrupt_packets += 1
                logger.warning("%s: %s; skipped", self.camera, error)
                continue
            seq = self.frames_decoded
            self.frames_decoded += 1
            if seq % self.every == 0:
                yield VideoFrame(self.camera, seq, None, image, datetime.now(UTC), "arrival")


def read_image(path: Path, name: str) -> Picture:
    """Return the image as (height, width, 3) uint8 RGB, turned as its EXIF orientation says.

    name: what the error calls it. Raises ImageError.
    """
    try:
        # Pillow warns at its own, lower limit; the one that counts here is checked below.
        with warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning):
            image = Image.open(path)
        with image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)
    except Image.DecompressionBombError:
        limit = f"{MAX_IMAGE_PIXELS // 1_000_000} megapixels"
        raise ImageError(f"{name} must be an image of at most {limit}, got a larger one in {path}") from None
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name} must be an image, got {path}, which is none") from None
    except FileNotFoundError:
        raise ImageError(f"{name} must be an existing image file, got {path}") from None
    # Pillow's decoders raise what they like on damaged data (OSError, SyntaxError, ValueError, struct.error).
    except Exception as error:
        raise ImageError(f"{name} must be a whole image, got a damaged one in {path} ({error})") from None


def image_files(folder: Path) -> list[Path]:
    """Return the folder's image files in natural order: img2 before img10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()]
    return sorted((path for path in files if not path.name.startswith(".")), key=_natural_order)


def _natural_order(path: Path) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", path.name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]
