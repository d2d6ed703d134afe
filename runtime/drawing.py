"""What a person looks at: boxes on frames, the annotated video, the contact sheet of a query's hits."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageDraw, ImageFont

from ..models.detections import Detections
from .frames import Picture
from .query import Hit, Query, crop_person

Colour = tuple[int, int, int]

# RGB. Sky blue and orange stay apart for colour-blind eyes, and from skin, floors and most clothes.
PERSON_COLOUR: Colour = (64, 170, 255)
MATCH_COLOUR: Colour = (255, 140, 0)
DARK: Colour = (22, 26, 32)

# MPEG's clock: every camera rate and millisecond time stamp lands on it well.
VIDEO_TIME_BASE = Fraction(1, 90_000)
DEFAULT_FPS = 25.0


def draw_detections(
    image: Picture,
    people: Detections,
    cosines: Sequence[float] | None = None,
    *,
    match_threshold: float = 1.0,
) -> Picture:
    """Return a copy of the frame with a box and a label a person: score, and cosine if there is a query.

    cosines: one a detection; from match_threshold on a person is drawn in the colour of a match, on top.
    """
    canvas = image.copy()
    matches = [cosines is not None and cosines[i] >= match_threshold for i in range(len(people))]
    for i in sorted(range(len(people)), key=lambda i: (matches[i], people.scores[i])):
        label = f"{people.scores[i]:.2f}"
        if cosines is not None:
            label += f"  cos {cosines[i]:.2f}"
        x1, y1, x2, y2 = (round(float(value)) for value in people.boxes_xyxy[i])
        _draw_box(canvas, (x1, y1, x2, y2), label, MATCH_COLOUR if matches[i] else PERSON_COLOUR, matches[i])
    return canvas


def _draw_box(
    canvas: Picture, box: tuple[int, int, int, int], label: str, colour: Colour, bold: bool
) -> None:
    height, width = canvas.shape[:2]
    # One unit is a pixel at 640x384 and three in 1080p: labels keep their size on a screen.
    unit = max(1.0, height / 384)
    thickness = max(1, round(unit * (2.0 if bold else 1.3)))
    x1, y1, x2, y2 = box
    cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, thickness, cv2.LINE_AA)
    scale, pad, weight = 0.42 * unit, round(3 * unit), max(1, round(unit))
    (text_width, text_height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, scale, weight)
    # Above the box; inside it where the frame ends.
    top = y1 - text_height - 2 * pad if y1 - text_height - 2 * pad >= 0 else y1
    left = min(max(0, x1), max(0, width - text_width - 2 * pad))
    bottom = top + text_height + 2 * pad
    cv2.rectangle(canvas, (left, top), (left + text_width + 2 * pad, bottom), colour, cv2.FILLED)
    origin = (left + pad, bottom - pad)
    cv2.putText(canvas, label, origin, cv2.FONT_HERSHEY_SIMPLEX, scale, DARK, weight, cv2.LINE_AA)


class VideoWriter:
    """An H.264 file, of the size of its first frame. Nothing stands under its name until it is whole."""

    def __init__(self, path: Path, fps: float | None) -> None:
        """fps: used for frames without a time, and as the rate the file states."""
        self._path = path
        # The suffix stays last: FFmpeg chooses the container by it.
        self._partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        self._fps = fps or DEFAULT_FPS
        self._container: OutputContainer | None = None
        self._stream: VideoStream | None = None
        self._last_pts = -1

    def write(self, image: Picture, pts_s: float | None) -> None:
        """Append a frame, shown pts_s seconds after the start; None: one frame after the last."""
        if self._container is None or self._stream is None:
            self._container, self._stream = self._open(image)
        frame = av.VideoFrame.from_ndarray(self._fitted(image, self._stream), format="rgb24")
        step = round(1 / self._fps / VIDEO_TIME_BASE)
        pts = self._last_pts + step if pts_s is None else round(pts_s / VIDEO_TIME_BASE)
        # A player, and the encoder, want times that grow.
        frame.pts = self._last_pts = max(pts, self._last_pts + 1)
        frame.time_base = VIDEO_TIME_BASE
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file and give it its name; without a frame there is no file."""
        if self._container is None or self._stream is None:
            return
        self._container.mux(self._stream.encode(None))
        self._container.close()
        self._container = None
        self._partial.replace(self._path)

    def discard(self) -> None:
        """Remove what was written, if it was not closed."""
        if self._container is not None:
            self._container.close()
            self._container = None
        self._partial.unlink(missing_ok=True)

    def _open(self, image: Picture) -> tuple[OutputContainer, VideoStream]:
        container = av.open(str(self._partial), "w")
        rate = Fraction(self._fps).limit_denominator(1001)
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "23"})
        # yuv420p halves the colour planes, so sizes must be even; a border row or column is repeated.
        stream.height, stream.width = (size + size % 2 for size in image.shape[:2])
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = VIDEO_TIME_BASE
        return container, stream

    def _fitted(self, image: Picture, stream: VideoStream) -> Picture:
        height, width = image.shape[:2]
        right, below = stream.width - width, stream.height - height
        if right in (0, 1) and below in (0, 1):
            return np.pad(image, ((0, below), (0, right), (0, 0)), mode="edge") if right or below else image
        # A camera that changes its size in the middle of a film.
        return np.asarray(cv2.resize(image, (stream.width, stream.height)), np.uint8)


# Contact sheet, in pixels.
CARD_WIDTH, PICTURE_HEIGHT, CAPTION_HEIGHT = 156, 236, 70
GAP, MARGIN, QUERY_WIDTH, HEADER = 14, 24, 210, 46
COLUMNS = 5
PAPER, CARD, INK, FAINT = (243, 244, 247), (255, 255, 255), (24, 28, 36), (112, 120, 134)
TRACK, PICTURE_GROUND = (226, 229, 235), (34, 38, 46)


def contact_sheet(query: Query, hits: Sequence[Hit]) -> Image.Image:
    """Put the query on the left and its hits, best first, on the right: rank, camera, time, cosine, score."""
    columns = min(COLUMNS, max(1, len(hits)))
    rows = max(1, -(-len(hits) // columns))
    card_height = PICTURE_HEIGHT + CAPTION_HEIGHT
    left = MARGIN + QUERY_WIDTH + 2 * GAP
    width = left + max(columns * (CARD_WIDTH + GAP) - GAP, 3 * CARD_WIDTH) + MARGIN
    height = MARGIN + HEADER + rows * (card_height + GAP) - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _heading(draw, (MARGIN, MARGIN), "query")
    _query_card(sheet, query, (MARGIN, MARGIN + HEADER))
    matches = sum(hit.is_match for hit in hits)
    summary = f"{len(hits)} best hits, {matches} above the match threshold" if hits else "no person was found"
    _heading(draw, (left, MARGIN), summary)
    for i, hit in enumerate(hits):
        x = left + i % columns * (CARD_WIDTH + GAP)
        y = MARGIN + HEADER + i // columns * (card_height + GAP)
        _hit_card(sheet, hit, i + 1, (x, y))
    return sheet


def _heading(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str) -> None:
    draw.text(corner, text, INK, ImageFont.load_default(20))


def _query_card(sheet: Image.Image, query: Query, corner: tuple[int, int]) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    size = (QUERY_WIDTH, PICTURE_HEIGHT + CAPTION_HEIGHT)
    draw.rounded_rectangle((x, y, x + size[0], y + size[1]), 8, CARD, MATCH_COLOUR, 3)
    _paste(sheet, crop_person(query.image, query.box), (x + 8, y + 8, size[0] - 15, PICTURE_HEIGHT))
    caption = ImageFont.load_default(16)
    draw.text((x + 10, y + PICTURE_HEIGHT + 18), _shortened(query.name, caption, size[0] - 20), INK, caption)
    x1, y1, x2, y2 = (round(value) for value in query.box)
    box = f"box {x1},{y1},{x2},{y2}"
    draw.text((x + 10, y + PICTURE_HEIGHT + 40), box, FAINT, ImageFont.load_default(13))


def _hit_card(sheet: Image.Image, hit: Hit, rank: int, corner: tuple[int, int]) -> None:
    x, y = corner
    draw = ImageDraw.Draw(sheet)
    right, bottom = x + CARD_WIDTH, y + PICTURE_HEIGHT + CAPTION_HEIGHT
    frame_colour = MATCH_COLOUR if hit.is_match else TRACK
    draw.rounded_rectangle((x, y, right, bottom), 8, CARD, frame_colour, 2 if hit.is_match else 1)
    _paste(sheet, hit.crop, (x + 5, y + 5, CARD_WIDTH - 9, PICTURE_HEIGHT - 5))
    draw.rounded_rectangle((x + 5, y + 5, x + 35, y + 29), 6, frame_colour)
    draw.text((x + 20, y + 17), str(rank), INK, ImageFont.load_default(15), anchor="mm")
    # The bar shows the cosine from 0 to 1; a negative one is an empty bar.
    bar = (x + 8, y + PICTURE_HEIGHT + 6, right - 8, y + PICTURE_HEIGHT + 10)
    draw.rectangle(bar, TRACK)
    filled = bar[0] + round(max(0.0, min(1.0, hit.cos)) * (bar[2] - bar[0]))
    if filled > bar[0]:
        draw.rectangle((bar[0], bar[1], filled, bar[3]), MATCH_COLOUR if hit.is_match else PERSON_COLOUR)
    name, detail = ImageFont.load_default(14), ImageFont.load_default(13)
    top = y + PICTURE_HEIGHT + 14
    draw.text((x + 8, top), _shortened(hit.camera, name, CARD_WIDTH - 16), INK, name)
    draw.text((x + 8, top + 18), f"{moment_text(hit)}   cos {hit.cos:.2f}", INK, detail)
    draw.text((x + 8, top + 33), f"box score {hit.score:.2f}", FAINT, detail)


def _paste(sheet: Image.Image, picture: Picture, place: tuple[int, int, int, int]) -> None:
    """Fit the picture into place (x, y, width, height), centred on a dark ground."""
    x, y, width, height = place
    source = Image.fromarray(picture)
    scale = min(width / source.width, height / source.height)
    size = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    sheet.paste(PICTURE_GROUND, (x, y, x + width, y + height))
    fitted = source.resize(size, Image.Resampling.LANCZOS)
    sheet.paste(fitted, (x + (width - size[0]) // 2, y + (height - size[1]) // 2))


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."


def moment_text(hit: Hit) -> str:
    """Return mm:ss.s since the start of the source, or the frame number where there is no time."""
    if hit.moment_s is None:
        return f"frame {hit.seq}"
    # Rounded first: 59.96 s is 01:00.0, not 00:60.0.
    tenths = round(hit.moment_s * 10)
    return f"{tenths // 600:02d}:{tenths // 10 % 60:02d}.{tenths % 10}"


def save_png(image: Image.Image, path: Path) -> None:
    """Write path at once: a reader sees the old file or the new one, never a part. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        image.save(partial, "PNG")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
