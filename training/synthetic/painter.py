"""A brush for bodies: limbs, ellipsoids and garments in three dimensions, projected and shaded.

Body coordinates are (left, up, forward) in units of an average body height, with the origin on the
ground under the hips. What is painted, and in which order, is decided in figures.py.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise

import cv2
import numpy as np

from .people import Rgb

WIDTH = 1.06
ABOVE_GROUND = 1.2
BELOW_GROUND = 0.22
"""Extent of a sprite in units of height_px: wide enough for a stride and a bag, a hat and a high camera."""

MAX_ELEVATION_RAD = 0.95
FIXED_POINT_BITS = 4
TEXTURED = 254
"""Alpha value that marks the pixels of a garment until its pattern has been painted."""

CIRCLE = np.stack([np.cos(np.arange(14) * math.tau / 14), np.sin(np.arange(14) * math.tau / 14)], axis=1)

LIMB_WIDTHS = np.array([1.0, 0.79, 0.42])
LIMB_SHIFTS = np.array([0.0, 0.2, 0.42])
LIMB_GRADES = (0.74, 1.0, 1.12)
"""Width, shift to the light and brightness of the strips that make a limb look round."""

Point = tuple[float, float, float]


@dataclass
class Painter:
    """A super-sampled RGBA canvas and the projection from body coordinates onto it."""

    canvas: np.ndarray
    """uint8 (H, W, 4); all zero before the first stroke."""
    unit_px: float
    height: float
    view: float
    tilt: float
    light: float
    offset: tuple[float, float] = (0.0, 0.0)
    """Shift on the canvas in body heights, for movement by less than a pixel."""
    bounds: list[int] = field(default_factory=lambda: [1 << 30, 1 << 30, 0, 0])
    """Left, top, right and bottom of what was painted, in fixed point; shared with turned painters."""

    def __post_init__(self) -> None:
        self.sin, self.cos = math.sin(self.view), math.cos(self.view)
        elevation = self.tilt * MAX_ELEVATION_RAD
        self.sin_up, self.cos_up = math.sin(elevation), math.cos(elevation)

    def nearness(self, point: Point) -> float:
        """Say how far a point lies towards the camera, in body heights."""
        return point[2] * self.cos - point[0] * self.sin

    def turned(self, angle: float) -> "Painter":
        """Give a painter on the same canvas for a part that is turned to the body's left by an angle."""
        return replace(self, view=self.view + angle)

    def magnification(self, up: float) -> float:
        """Pixels per body height at a height; a camera above enlarges heads and shoulders."""
        return self.height * self.unit_px * (1 + 0.3 * self.tilt * (up - 0.5))

    def project(self, point: Point) -> tuple[float, float]:
        """Turn body coordinates into canvas pixels (x, y)."""
        left, up, forward = point
        zoom = self.magnification(up)
        across = (left * self.cos + forward * self.sin) * zoom
        down = (forward * self.cos - left * self.sin) * self.sin_up * zoom
        rise = up * self.cos_up * self.height * self.unit_px
        x = (WIDTH / 2 + self.offset[0]) * self.unit_px + across
        return x, (ABOVE_GROUND + self.offset[1]) * self.unit_px + down - rise

    def fill(self, outline: np.ndarray, colour: Rgb, grade: float, alpha: int = 255) -> None:
        """Fill the convex hull of (N, 2) int32 fixed-point canvas points."""
        red, green, blue = (min(channel * grade, 255.0) for channel in colour)
        hull = cv2.convexHull(outline)
        left, top, width, height = cv2.boundingRect(hull)
        low_x, low_y, high_x, high_y = self.bounds
        self.bounds[:] = (
            min(low_x, left),
            min(low_y, top),
            max(high_x, left + width),
            max(high_y, top + height),
        )
        cv2.fillConvexPoly(self.canvas, hull, (red, green, blue, alpha), cv2.LINE_8, FIXED_POINT_BITS)

    def limb(self, joints: Sequence[Point], radii: Sequence[float], colour: Rgb, tone: float = 1.0) -> None:
        """Paint a tapered chain of joints as three nested strips: shadow side, middle, lit side."""
        centres = np.array([self.project(joint) for joint in joints])
        sizes = np.array([r * self.magnification(p[1]) for r, p in zip(radii, joints, strict=True)])
        side = np.array([self.light, -0.25])
        middles = centres + LIMB_SHIFTS[:, None, None] * sizes[None, :, None] * side
        reach = LIMB_WIDTHS[:, None] * sizes
        rims = _fixed_point(middles[:, :, None] + CIRCLE * reach[:, :, None, None])
        for grade, strip in zip(LIMB_GRADES, rims, strict=True):
            for pair in range(len(joints) - 1):
                self.fill(strip[pair : pair + 2].reshape(-1, 2), colour, grade * tone)

    def ellipsoid(self, centre: Point, radii: Point, colour: Rgb, tone: float = 1.0) -> None:
        """Paint an upright ellipsoid with radii (left, up, forward), shaded in three tones."""
        across = math.hypot(radii[0] * self.cos, radii[2] * self.sin)
        along = math.hypot(radii[0] * self.sin, radii[2] * self.cos)
        high = math.hypot(radii[1] * self.cos_up, along * self.sin_up)
        size = np.array([across, high]) * self.magnification(centre[1])
        side = size * (self.light, -0.6)
        middles = np.array(self.project(centre)) + 0.8 * LIMB_SHIFTS[:, None] * side
        rims = _fixed_point(middles[:, None] + CIRCLE * size * LIMB_WIDTHS[:, None, None])
        for grade, rim in zip(LIMB_GRADES, rims, strict=True):
            self.fill(rim, colour, grade * tone)

    def rings(
        self, rings: list[tuple[float, float, float, float]], colours: "Texture", left: float = 0.0
    ) -> None:
        """Paint cloth around horizontal rings (up, forward, half width, half depth), top first."""
        outlines = np.stack([self._ring(left, ring) for ring in rings])
        fixed = _fixed_point(outlines)
        for upper, lower in pairwise(fixed):
            self.fill(np.concatenate([upper, lower]), (0, 0, 0), 1.0, TEXTURED)
        self._texture(outlines.reshape(-1, 2), colours)

    def _ring(self, left: float, ring: tuple[float, float, float, float]) -> np.ndarray:
        """Project a horizontal ellipse around the body; float64 (len(CIRCLE), 2) canvas pixels."""
        up, forward, wide, deep = ring
        zoom, (x, y) = self.magnification(up), self.project((left, up, forward))
        sideways, ahead = wide * zoom * CIRCLE[:, 0], deep * zoom * CIRCLE[:, 1]
        across = x + sideways * self.cos + ahead * self.sin
        return np.stack([across, y + (ahead * self.cos - sideways * self.sin) * self.sin_up], axis=1)

    def _texture(self, outline: np.ndarray, colours: "Texture") -> None:
        """Replace the marked pixels inside the outline's bounds by a garment's pattern and shading."""
        left, top = np.maximum(outline.min(axis=0), 0).astype(int).tolist()
        right, bottom = (outline.max(axis=0) + 2).astype(int).tolist()
        window = self.canvas[top:bottom, left:right]
        height, width = window.shape[:2]
        if not height or not width:
            return
        around = np.arcsin(np.linspace(-0.98, 0.98, width, dtype=np.float32))
        v = np.linspace(0.0, 1.0, height, dtype=np.float32)
        shade = 0.62 + 0.44 * np.cos(around - 0.75 * self.light)
        shade = shade * cv2.resize(_folds(), (width, height), interpolation=cv2.INTER_LINEAR)
        painted = np.full((height, width, 4), 255, np.uint8)
        painted[..., :3] = np.minimum(colours(around - self.view, v) * shade[..., None], 255)
        cv2.copyTo(painted, cv2.inRange(window[..., 3].copy(), TEXTURED, TEXTURED), window)

    def finish(self, scale: int) -> tuple[np.ndarray, np.ndarray]:
        """Average scale x scale canvas pixels into one; rgb uint8 and alpha float32 of the reduced canvas."""
        height, width = (side // scale for side in self.canvas.shape[:2])
        rgb, alpha = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), np.float32)
        left, top, right, bottom = (value // (scale << FIXED_POINT_BITS) for value in self.bounds)
        left, top = max(left - 1, 0), max(top - 1, 0)
        right, bottom = min(right + 2, width), min(bottom + 2, height)
        painted = self.canvas[top * scale : bottom * scale, left * scale : right * scale]
        small = cv2.resize(painted, (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        rgb[top:bottom, left:right], alpha[top:bottom, left:right] = split_cover(small)
        return rgb, alpha


Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Float32 colours, of a shape that broadcasts to (rows, columns, 3), from the angle around the body
(columns,), which is 0 in front, and from v (rows,) in [0, 1] from the top."""


@lru_cache(maxsize=1)
def _folds() -> np.ndarray:
    """Give a fixed (40, 10) float32 brightness factor that looks like folds in cloth."""
    noise = np.random.default_rng(3).normal(0, 1, (40, 10)).astype(np.float32)
    return 1 + 0.13 * cv2.GaussianBlur(noise, (0, 0), 1.0)


def _fixed_point(points: np.ndarray) -> np.ndarray:
    return np.rint(points * (1 << FIXED_POINT_BITS)).astype(np.int32)


def split_cover(small: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split RGBA uint8 painted on transparent black into rgb uint8 and alpha float32 in [0, 1]."""
    cover = np.ascontiguousarray(small[..., 3])
    rgb = np.ascontiguousarray(small[..., :3])
    # Half covered pixels were averaged with black: divide the darkening out again.
    edge = (cover > 0) & (cover < 255)
    rgb[edge] = np.minimum(rgb[edge] * _INVERSE_COVER[cover[edge].astype(np.intp)][:, None], 255)
    return rgb, cover * np.float32(1 / 255)


_INVERSE_COVER = (255 / np.maximum(np.arange(256), 1)).astype(np.float32)
