"""Things that stand about in a street or a shop: the clutter behind people and the occluders before them.

Every prop is a sprite like a person's: rgb uint8 (H, W, 3) and alpha float32 (H, W), standing on its
lower edge. Several are shaped much like people on purpose: a detector has to tell them apart.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

MAX_SIDE_PX = 1000

Colour = tuple[int, ...]


def draw_prop(
    rng: np.random.Generator, unit_px: float, *, occluder: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a random prop for a place where an average person is unit_px pixels tall.

    occluder: take only things that people walk behind. Returns rgb (H, W, 3) and alpha (H, W) in [0, 1].
    """
    prop = PROPS[int(rng.integers(4 if occluder else 0, len(PROPS)))]
    width, height = (side * unit_px * rng.uniform(0.8, 1.25) for side in (prop.width, prop.height))
    size = (int(np.clip(width, 3, MAX_SIDE_PX)), int(np.clip(height, 3, MAX_SIDE_PX)))
    stencil = _Stencil(np.zeros((size[1], size[0], 4), np.uint8))
    prop.draw(rng, stencil)
    cover = stencil.canvas[..., 3] * np.float32(1 / 255)
    # Soft edges, as people have them: sharp ones would give away what is not a person.
    alpha = cover * cv2.blur(cover, (3, 3))
    sides = np.linspace(rng.uniform(0.75, 1.1), rng.uniform(0.75, 1.1), size[0], dtype=np.float32)
    return np.minimum(stencil.canvas[..., :3] * sides[None, :, None], 255).astype(np.uint8), alpha


def any_colour(rng: np.random.Generator, low: int = 15, high: int = 240) -> Colour:
    """Draw a colour; half of the time a dull one."""
    return built_colour(rng, low, high, dull=0.5)


def built_colour(rng: np.random.Generator, low: int = 15, high: int = 240, *, dull: float = 0.85) -> Colour:
    """Draw the colour of a surface: grey, beige or brown with probability dull, else any colour."""
    if rng.random() >= dull:
        return tuple(rng.integers(low, high, 3).tolist())
    grey, warmth = rng.uniform(low, high), rng.normal(0.06, 0.1)
    channels = grey * np.array([1 + warmth, 1 + 0.3 * warmth, 1 - warmth]) + rng.uniform(-5, 5, 3)
    return tuple(np.clip(channels, 0, 255).astype(int).tolist())


def scaled(colour: Colour, factor: float) -> Colour:
    """Give a lighter or darker tone of a colour."""
    return tuple(int(min(255, value * factor)) for value in colour)


@dataclass(frozen=True)
class _Stencil:
    """An RGBA canvas addressed by fractions: (0, 0) is the upper left, (1, 1) the lower right corner."""

    canvas: np.ndarray

    def _at(self, x: float, y: float) -> tuple[int, int]:
        return round(x * self.canvas.shape[1]), round(y * self.canvas.shape[0])

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        low, high = self._at(left, top), self._at(right, bottom)
        cv2.rectangle(
            self.canvas, low, (max(high[0] - 1, low[0]), max(high[1] - 1, low[1])), (*colour, 255), -1
        )

    def oval(self, x: float, y: float, wide: float, high: float, colour: Colour) -> None:
        axes = self._at(wide, high)
        cv2.ellipse(
            self.canvas, self._at(x, y), (max(axes[0], 1), max(axes[1], 1)), 0, 0, 360, (*colour, 255), -1
        )

    def polygon(self, points: list[tuple[float, float]], colour: Colour) -> None:
        cv2.fillPoly(self.canvas, [np.array([self._at(*point) for point in points])], (*colour, 255))

    def line(self, x0: float, y0: float, x1: float, y1: float, width: float, colour: Colour) -> None:
        thick = max(1, round(width * self.canvas.shape[1]))
        cv2.line(self.canvas, self._at(x0, y0), self._at(x1, y1), (*colour, 255), thick)


def _two_tone_column(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Stack two colours in the proportions of a jacket over trousers."""
    split = rng.uniform(0.4, 0.6)
    stencil.box(0.1, 0.0, 0.9, split, any_colour(rng))
    stencil.box(rng.uniform(0.05, 0.25), split, rng.uniform(0.75, 0.95), 1.0, any_colour(rng))


def _dress_form(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Draw a garment on a stand: a torso without head, arms and legs."""
    colour = any_colour(rng)
    stencil.line(0.5, 0.5, 0.5, 1.0, 0.08, (60, 58, 56))
    stencil.line(0.25, 0.99, 0.75, 0.99, 0.1, (60, 58, 56))
    stencil.polygon([(0.1, 0.12), (0.9, 0.12), (0.78, 0.4), (0.9, 0.62), (0.1, 0.62), (0.22, 0.4)], colour)


def _hydrant(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Draw a round head on a body: a bollard, a hydrant or an urn."""
    body, cap = any_colour(rng), any_colour(rng)
    stencil.box(0.25, 0.2, 0.75, 1.0, body)
    stencil.oval(0.5, 0.16, 0.22, 0.14, cap)
    if rng.random() < 0.5:
        stencil.box(0.0, 0.4, 1.0, 0.52, scaled(body, 0.8))


def _column(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Draw a round column with a base and, sometimes, a head."""
    colour = any_colour(rng)
    for step in range(12):
        tone = 0.65 + 0.4 * math.sin(math.pi * (step + 1) / 13)
        stencil.box(step / 12, 0.0, (step + 1) / 12, 1.0, scaled(colour, tone))
    if rng.random() < 0.6:
        stencil.box(0.0, 0.93, 1.0, 1.0, scaled(colour, 0.7))
        stencil.box(0.0, 0.0, 1.0, rng.uniform(0.03, 0.2), scaled(colour, 0.8))


def _pole(rng: np.random.Generator, stencil: _Stencil) -> None:
    colour = any_colour(rng, 30, 190)
    stencil.box(0.3, 0.0, 0.7, 1.0, colour)
    stencil.box(0.3, 0.0, 0.42, 1.0, scaled(colour, 1.35))


def _sign(rng: np.random.Generator, stencil: _Stencil) -> None:
    colour = any_colour(rng)
    stencil.box(0.46, 0.2, 0.54, 1.0, (95, 95, 98))
    if rng.random() < 0.5:
        stencil.oval(0.5, 0.16, 0.4, 0.15, colour)
        stencil.oval(0.5, 0.16, 0.28, 0.1, any_colour(rng))
    else:
        stencil.box(0.08, 0.02, 0.92, 0.34, colour)
        for row in range(3):
            stencil.box(0.18, 0.08 + 0.08 * row, rng.uniform(0.4, 0.84), 0.12 + 0.08 * row, any_colour(rng))


def _tree(rng: np.random.Generator, stencil: _Stencil) -> None:
    stencil.polygon([(0.46, 0.4), (0.54, 0.4), (0.57, 1.0), (0.43, 1.0)], (74, 58, 44))
    leaf = tuple(int(value) for value in (rng.integers(30, 120), rng.integers(70, 140), rng.integers(25, 70)))
    for tone in np.linspace(0.55, 1.2, 26):
        angle, reach = rng.uniform(0, math.tau), rng.uniform(0, 0.3)
        x, y = 0.5 + reach * math.cos(angle), 0.32 - 0.1 * (tone - 0.8) + 0.75 * reach * math.sin(angle)
        stencil.oval(x, y, rng.uniform(0.06, 0.17), rng.uniform(0.04, 0.1), scaled(leaf, tone))


def _plant(rng: np.random.Generator, stencil: _Stencil) -> None:
    leaf = tuple(int(value) for value in (rng.integers(20, 90), rng.integers(70, 150), rng.integers(20, 70)))
    for tone in np.linspace(0.5, 1.25, 22):
        x, y = 0.5 + rng.normal(0, 0.2), 0.36 + rng.normal(0, 0.13)
        stencil.line(0.5, 0.72, x, y, 0.05, scaled(leaf, tone))
        stencil.oval(x, y, 0.09, 0.07, scaled(leaf, tone))
    pot = any_colour(rng)
    stencil.polygon([(0.25, 0.68), (0.75, 0.68), (0.68, 1.0), (0.32, 1.0)], pot)
    stencil.box(0.22, 0.66, 0.78, 0.72, scaled(pot, 1.15))


def _car(rng: np.random.Generator, stencil: _Stencil) -> None:
    paint, glass = any_colour(rng), (46, 54, 62)
    stencil.polygon([(0.2, 0.42), (0.32, 0.06), (0.7, 0.06), (0.84, 0.42)], scaled(paint, 0.9))
    stencil.polygon([(0.25, 0.4), (0.345, 0.12), (0.49, 0.12), (0.49, 0.4)], glass)
    stencil.polygon([(0.52, 0.4), (0.52, 0.12), (0.68, 0.12), (0.79, 0.4)], scaled(glass, 1.3))
    stencil.polygon([(0.01, 0.5), (0.1, 0.4), (0.93, 0.4), (0.99, 0.52), (0.99, 0.84), (0.01, 0.84)], paint)
    stencil.box(0.01, 0.7, 0.99, 0.84, scaled(paint, 0.7))
    stencil.box(0.93, 0.5, 0.99, 0.58, (190, 60, 50))
    for x in (0.2, 0.79):
        stencil.oval(x, 0.82, 0.085, 0.17, (22, 22, 24))
        stencil.oval(x, 0.82, 0.045, 0.09, (130, 132, 134))


def _bench(rng: np.random.Generator, stencil: _Stencil) -> None:
    wood = any_colour(rng, 50, 190)
    for top in (0.02, 0.18, 0.34):
        stencil.box(0.0, top, 1.0, top + 0.11, scaled(wood, 1 - 0.2 * top))
    stencil.box(0.0, 0.52, 1.0, 0.62, scaled(wood, 1.1))
    for left in (0.06, 0.88):
        stencil.box(left, 0.0, left + 0.06, 1.0, (50, 50, 52))


def _boxes(rng: np.random.Generator, stencil: _Stencil) -> None:
    bottom = 1.0
    while bottom > 0.12:
        top, left, right = bottom - rng.uniform(0.2, 0.45), rng.uniform(0, 0.25), rng.uniform(0.75, 1)
        colour = any_colour(rng) if rng.random() < 0.6 else (172, 132, 90)
        stencil.box(left, max(top, 0.0), right, bottom, colour)
        stencil.box(left, max(top, 0.0), left + 0.3 * (right - left), bottom, scaled(colour, 0.8))
        stencil.box(
            left + 0.45 * (right - left),
            max(top, 0.0),
            left + 0.55 * (right - left),
            bottom,
            scaled(colour, 1.15),
        )
        bottom = top


def _chair(rng: np.random.Generator, stencil: _Stencil) -> None:
    colour = any_colour(rng)
    stencil.box(0.12, 0.0, 0.88, 0.5, colour)
    stencil.oval(0.5, 0.06, 0.38, 0.06, colour)
    stencil.box(0.05, 0.52, 0.95, 0.64, scaled(colour, 0.75))
    for left in (0.1, 0.82):
        stencil.box(left, 0.62, left + 0.07, 1.0, (48, 48, 50))


def _shelf(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Draw a rack full of goods."""
    stencil.box(0.0, 0.0, 1.0, 1.0, any_colour(rng, 20, 140))
    rows = int(rng.integers(3, 6))
    for row in range(rows):
        left, floor = 0.03, (row + 0.92) / rows
        while left < 0.92:
            right = min(left + rng.uniform(0.04, 0.14), 0.97)
            stencil.box(left, floor - rng.uniform(0.3, 0.8) / rows, right, floor, any_colour(rng))
            left = right + 0.01


def _kiosk(rng: np.random.Generator, stencil: _Stencil) -> None:
    """Draw a machine or a cabinet with a screen or a door."""
    colour = any_colour(rng)
    stencil.box(0.0, 0.0, 1.0, 1.0, colour)
    stencil.box(0.12, rng.uniform(0.06, 0.2), rng.uniform(0.6, 0.88), rng.uniform(0.4, 0.9), any_colour(rng))
    stencil.box(0.0, 0.0, 0.12, 1.0, scaled(colour, 0.75))


@dataclass(frozen=True)
class Prop:
    """A kind of prop and its size in body heights."""

    width: float
    height: float
    draw: Callable[[np.random.Generator, _Stencil], None]


PROPS = (
    Prop(0.3, 1.0, _two_tone_column),
    Prop(0.3, 0.95, _dress_form),
    Prop(0.26, 0.7, _hydrant),
    Prop(1.9, 2.6, _tree),
    Prop(0.3, 1.7, _column),
    Prop(0.12, 2.2, _pole),
    Prop(0.5, 1.5, _sign),
    Prop(0.55, 0.75, _plant),
    Prop(2.5, 0.85, _car),
    Prop(1.0, 0.5, _bench),
    Prop(0.5, 0.6, _boxes),
    Prop(0.35, 0.58, _chair),
    Prop(1.1, 0.9, _shelf),
    Prop(0.45, 0.95, _kiosk),
)
"""The first four stand only in the background; the others may also stand in front of people."""
