"""Films for cameras that do not exist: one bright person crosses a dark, textured room, and where is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from ..frames import Picture

SIZE = (640, 360)

# The person as shares of the frame: it walks to and fro, always as tall.
TOP, BOTTOM, WIDTH = 0.25, 0.75, 0.1

# Brighter than anything else in the room.
BRIGHT = 170

# How much tiles of the room flicker.
NOISE = 24


def write_clip(
    path: Path,
    *,
    seconds: float,
    fps: int = 10,
    sizes: Sequence[tuple[int, int]] = (SIZE,),
    group: int = 10,
    b_frames: int = 0,
    repeat: int = 1,
) -> Path:
    """Encode a clip as H.264 in MP4.

    seconds: of each size; sizes: (width, height), one after the other, within the same stream. group: frames from
    one IDR frame to the next. repeat: how often the whole is played, without encoding it again.
    """
    packets = [
        packet for size in sizes for packet in _encoded(size, round(seconds * fps), fps, group, b_frames)
    ]
    each = round(seconds * fps)
    with av.open(str(path), "w") as container:
        stream = cast(VideoStream, container.add_stream("libx264", rate=Fraction(fps)))
        (stream.width, stream.height), stream.pix_fmt = sizes[0], "yuv420p"
        stream.time_base = Fraction(1, fps)
        container.start_encoding()
        for start in range(0, repeat * each * len(sizes), each * len(sizes)):
            for i, (data, pts, dts, is_key) in enumerate(packets):
                packet = av.Packet(data)
                before = start + i // each * each
                packet.pts, packet.dts = before + pts, before + dts
                packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, fps), is_key, stream
                container.mux(packet)
    return path


def room(index: int, size: tuple[int, int] = SIZE) -> Picture:
    """Frame `index`: (height, width, 3) uint8 RGB."""
    width, height = size
    # A room of tiles that stay and of noise that does not: a picture without either hardly needs bytes, and flipped
    # ones would do nothing. The same at each call.
    tiles = np.random.default_rng(0).integers(20, 70, (height // 8 + 1, width // 8 + 1), np.uint8)
    noise = np.random.default_rng(index).integers(0, NOISE, (height // 2 + 1, width // 2 + 1), np.uint8)
    grey = _enlarged(tiles, 8)[:height, :width] + _enlarged(noise, 2)[:height, :width]
    image = np.repeat(grey[:, :, None], 3, axis=2)
    way = width - round(WIDTH * width)
    left = round(way * abs((index % 100) / 50 - 1))
    image[round(TOP * height) : round(BOTTOM * height), left : left + round(WIDTH * width)] = (40, 235, 40)
    return image


def _enlarged(image: Picture, times: int) -> Picture:
    return np.repeat(np.repeat(image, times, axis=0), times, axis=1)


def person_in(image: Picture) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 of the bright person in pixels; None where there is none."""
    bright = image[:, :, 1] > BRIGHT
    rows, columns = np.flatnonzero(bright.any(axis=1)), np.flatnonzero(bright.any(axis=0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def is_in_place(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    """Whether a box is where a person of these films can be, in a frame of this size."""
    x1, y1, x2, y2 = box
    near = [abs(y1 / height - TOP), abs(y2 / height - BOTTOM), abs((x2 - x1) / width - WIDTH)]
    return max(near) < 0.04 and 0 <= x1 < x2 <= width


def _encoded(
    size: tuple[int, int], count: int, fps: int, group: int, b_frames: int
) -> Iterator[tuple[bytes, int, int, bool]]:
    """Data, PTS, DTS and whether it is a key frame, of each packet; parameter sets stand before key frames."""
    codec = cast(VideoCodecContext, av.CodecContext.create("libx264", "w"))
    (codec.width, codec.height), codec.pix_fmt = size, "yuv420p"
    codec.framerate, codec.time_base = Fraction(fps), Fraction(1, fps)
    codec.options = {
        "g": str(group),
        "keyint_min": str(group),
        "bf": str(b_frames),
        "crf": "30",
        "sc_threshold": "0",
    }
    frames = [av.VideoFrame.from_ndarray(room(i, size), format="rgb24") for i in range(count)]
    for i, frame in enumerate(frames):
        frame.pts, frame.time_base = i, Fraction(1, fps)
    for frame in [*frames, None]:
        for packet in codec.encode(frame):
            assert packet.pts is not None
            assert packet.dts is not None
            yield bytes(packet), packet.pts, packet.dts, packet.is_keyframe
