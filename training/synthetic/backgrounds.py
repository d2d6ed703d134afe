"""Empty scenes: streets, halls, shops, parks and abstract textures, with clutter but without people."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from .props import Colour, built_colour, draw_prop, scaled

TILE_PX = 1024


def draw_background(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    horizon: float,
    scale: tuple[float, float],
    place: str | None = None,
) -> np.ndarray:
    """Draw an empty scene as uint8 RGB (height, width, 3).

    horizon: row where the floor ends, as a fraction of the height.
    scale: body height at the horizon and at the lower edge, as fractions of the frame height.
    place: one of PLACES, or None for any of them or an abstract texture.
    """
    scene = PLACES[place] if place else _SCENES[int(rng.choice(len(_SCENES), p=_SCENE_WEIGHTS))]
    image = np.empty((height, width, 3), np.uint8)
    floor_row = int(np.clip(horizon, 0.02, 0.9) * height)
    scene(rng, image, floor_row)
    _grain(rng, image, rng.uniform(0.03, 0.22))
    for _ in range(int(rng.integers(2, 9))):
        _place_prop(rng, image, floor_row, scale)
    if rng.random() < 0.5:
        _cast_shade(rng, image)
    return image


def paste(image: np.ndarray, rgb: np.ndarray, alpha: np.ndarray, left: int, top: int) -> None:
    """Blend a sprite into an image in place; what falls outside the image is cut off."""
    low_x, low_y = max(0, -left), max(0, -top)
    high_x, high_y = min(rgb.shape[1], image.shape[1] - left), min(rgb.shape[0], image.shape[0] - top)
    if high_x <= low_x or high_y <= low_y:
        return
    window = image[top + low_y : top + high_y, left + low_x : left + high_x]
    cover = alpha[low_y:high_y, low_x:high_x, None]
    window[:] = window + (rgb[low_y:high_y, low_x:high_x].astype(np.float32) - window) * cover


def shade_ground(image: np.ndarray, centre: tuple[int, int], reach: int, strength: float) -> None:
    """Darken a soft flat ellipse of ground of half width reach, in place; strength in [0, 1]."""
    size = (2 * max(reach, 2), max(reach // 2, 3))
    spot = strength * cv2.resize(_soft_spot(), size, interpolation=cv2.INTER_LINEAR)
    black = np.zeros((*spot.shape, 3), np.uint8)
    paste(image, black, spot, centre[0] - size[0] // 2, centre[1] - size[1] // 2)


@lru_cache(maxsize=1)
def _soft_spot() -> np.ndarray:
    y, x = np.mgrid[-1:1:24j, -1:1:48j].astype(np.float32)
    return np.clip(1.15 - (x**2 + y**2), 0, 1).astype(np.float32)


@lru_cache(maxsize=1)
def noise_tile() -> np.ndarray:
    """Give a fixed (TILE_PX, TILE_PX, 3) uint8 noise of five octaves around 128, mostly grey."""
    rng = np.random.default_rng(11)
    total = np.zeros((TILE_PX, TILE_PX, 3), np.float32)
    for cells in (8, 32, 128, 512, 1024):
        grid = rng.normal(0, 1, (cells, cells, 1)) + 0.35 * rng.normal(0, 1, (cells, cells, 3))
        total += cv2.resize(grid.astype(np.float32), (TILE_PX, TILE_PX), interpolation=cv2.INTER_CUBIC)
    return np.clip(128 + 26 * total, 0, 255).astype(np.uint8)


def _noise(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Cut a random piece of the noise, at a random magnification; uint8 (height, width, 3)."""
    zoom = rng.uniform(0.35, 1.0)
    across, down = (min(TILE_PX, max(2, int(side * zoom))) for side in (width, height))
    left, top = rng.integers(0, TILE_PX - across + 1), rng.integers(0, TILE_PX - down + 1)
    piece = noise_tile()[top : top + down, left : left + across]
    return cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR)


def _grain(rng: np.random.Generator, image: np.ndarray, amount: float) -> None:
    """Give every surface some texture, in place."""
    noise = _noise(rng, image.shape[1], image.shape[0])
    cv2.addWeighted(image, 1.0, noise, amount, -128 * amount, dst=image)


def _gradient(image: np.ndarray, top: Colour, bottom: Colour) -> None:
    """Fill an image with a vertical gradient, in place."""
    if not image.size:
        return
    ends = np.array([[top], [bottom]], np.uint8)
    rows = cv2.resize(ends, (1, len(image)), interpolation=cv2.INTER_LINEAR)
    image[:] = cv2.resize(rows, (image.shape[1], len(image)), interpolation=cv2.INTER_NEAREST)


def _floor(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Pave the floor below a row with tiles or boards that run towards a vanishing point."""
    height, width = image.shape[:2]
    colour = built_colour(rng, 50, 205)
    floor = image[row:]
    _gradient(floor, scaled(colour, rng.uniform(0.75, 1.0)), scaled(colour, rng.uniform(0.9, 1.15)))
    joint = scaled(colour, rng.choice([0.72, 0.85, 1.12]))
    vanish = (rng.uniform(-0.2, 1.2) * width, row - rng.uniform(0.1, 0.8) * height)
    kind = rng.random()
    if kind < 0.65:
        spacing = rng.uniform(0.04, 0.25) * width
        for step in range(-30, 60):
            x = step * spacing
            cv2.line(image, _between(vanish, (x, height), row), (int(x), height), joint, 1, cv2.LINE_AA)
    if kind < 0.45:
        for step in range(1, int(rng.integers(5, 14))):
            y = int(row + (height - row) * (step / 12) ** 1.8)
            cv2.line(image, (0, y), (width, y), joint, 1)
    if rng.random() < 0.3:
        y = int(rng.uniform(row, height))
        cv2.rectangle(image, (0, y), (width, y + max(2, height // 50)), built_colour(rng), -1)


def _between(start: tuple[float, float], end: tuple[float, float], row: int) -> tuple[int, int]:
    """Find the point of a line on a row."""
    share = (row - start[1]) / max(end[1] - start[1], 1e-6)
    return int(np.clip(start[0] + share * (end[0] - start[0]), -20_000, 20_000)), row


def _openings(rng: np.random.Generator, image: np.ndarray, top: int, bottom: int) -> None:
    """Cut a row of windows, doors or shop fronts into a wall between two rows."""
    width, tall = image.shape[1], bottom - top
    glass, frame = built_colour(rng, 20, 150), built_colour(rng)
    step = rng.uniform(0.35, 1.6) * tall
    pane_w, pane_h = rng.uniform(0.4, 0.85) * step, rng.uniform(0.5, 0.9) * tall
    x = -rng.uniform(0, step)
    while x < width and step > 4:
        low, high = (int(x), int(bottom - pane_h)), (int(x + pane_w), bottom - int(0.04 * tall))
        tone = rng.uniform(0.7, 1.3)
        cv2.rectangle(image, low, high, scaled(glass, tone), -1)
        if rng.random() < 0.5:
            wedge = np.array([low, (high[0], low[1]), (low[0], high[1])])
            cv2.fillConvexPoly(image, wedge, scaled(glass, tone * 1.25))
        cv2.rectangle(image, low, high, frame, max(1, int(0.03 * tall)))
        x += step


def _street(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Draw house fronts above a pavement, with storeys of windows and shops at the bottom."""
    _gradient(image[:row], built_colour(rng, 120, 240), built_colour(rng, 120, 240))
    x, width = -int(rng.uniform(0, 60)), image.shape[1]
    while x < width:
        house = int(rng.uniform(0.15, 0.6) * width)
        roof = int(rng.uniform(-0.6, 0.25) * row)
        front = image[max(roof, 0) : row, max(x, 0) : max(x + house, 0)]
        wall = built_colour(rng, 50, 225)
        _gradient(front, wall, scaled(wall, rng.uniform(0.75, 1.1)))
        storey = max(14, int(rng.uniform(0.25, 0.6) * row))
        bottom = len(front)
        while bottom > 8 and front.shape[1] > 8:
            _openings(rng, front, max(bottom - storey, 0), bottom)
            bottom -= storey
        x += house
    _floor(rng, image, row)
    if rng.random() < 0.6:
        _road(rng, image, row)


def _road(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Lay a road with a kerb and lane marks across the floor."""
    height, width = image.shape[:2]
    top = int(row + rng.uniform(0.0, 0.3) * (height - row))
    bottom = int(top + rng.uniform(0.1, 0.5) * (height - row))
    grey = int(rng.integers(50, 120))
    cv2.rectangle(image, (0, top), (width, bottom), (grey, grey, grey + 4), -1)
    cv2.rectangle(image, (0, bottom), (width, bottom + 3), (grey + 70, grey + 68, grey + 64), -1)
    middle, dash = (top + bottom) // 2, int(rng.uniform(0.05, 0.15) * width)
    for x in range(0, width, 2 * dash):
        cv2.rectangle(image, (x, middle), (x + dash, middle + 2), (205, 204, 196), -1)


def _hall(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Draw a room: a wall with doors, pictures and columns over a floor."""
    wall = built_colour(rng, 90, 245)
    _gradient(image[:row], scaled(wall, rng.uniform(0.8, 1.1)), wall)
    if row > 30:
        _openings(rng, image[:row], int(rng.uniform(0, 0.4) * row), row)
    _floor(rng, image, row)
    for _ in range(int(rng.integers(0, 6))):
        x, y = int(rng.integers(image.shape[1])), int(rng.integers(-20, max(row, 2)))
        wide, high = (int(rng.uniform(0.03, 0.16) * side) for side in image.shape[:2])
        cv2.rectangle(image, (x, y), (x + wide, min(y + high, row)), built_colour(rng), -1)
    skirting = scaled(wall, 0.6)
    cv2.line(image, (0, row), (image.shape[1], row), skirting, max(1, image.shape[0] // 120))
    if rng.random() < 0.6:
        for x in np.arange(0.1, 1, 0.3) * image.shape[1]:
            cv2.circle(image, (int(x), int(0.12 * row)), max(2, row // 14), (250, 248, 236), -1, cv2.LINE_AA)


def _shop(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Draw a wall of shelves full of goods, and shelves that run along the sides of the floor."""
    _hall(rng, image, row)
    height, width = image.shape[:2]
    board = built_colour(rng, 60, 220)
    _goods(rng, image[:row], board)
    for side in range(2):
        if rng.random() < 0.6:
            near, far = rng.uniform(0.1, 0.4) * width, rng.uniform(0.0, 0.15) * width
            rack = np.zeros((max(height // 2, 8), max(width // 3, 8), 3), np.uint8)
            _goods(rng, rack, board)
            _stretch(image, rack, row, (near, far), side)


def _goods(rng: np.random.Generator, image: np.ndarray, board: Colour) -> None:
    """Fill an image with rows of small things of many colours, in place."""
    height, width = image.shape[:2]
    y, palette = 0, rng.integers(10, 250, (24, 3))
    while y < height - 3:
        tall = max(6, int(rng.uniform(0.03, 0.12) * 384))
        tone = scaled(board, 0.45)
        cv2.rectangle(image, (0, y), (width, y + tall), tone, -1)
        x, item = 0, max(3, int(rng.uniform(0.3, 0.8) * tall))
        while x < width:
            colour = tuple(palette[rng.integers(24)].tolist())
            top = y + int(rng.uniform(0.1, 0.5) * tall)
            for _ in range(int(rng.integers(1, 6))):
                cv2.rectangle(image, (x, top), (x + item - 2, y + tall - 2), colour, -1)
                x += item
        cv2.rectangle(image, (0, y + tall - 2), (width, y + tall), board, -1)
        y += tall


def _stretch(image: np.ndarray, rack: np.ndarray, row: int, reach: tuple[float, float], side: int) -> None:
    """Paste a rack along the left (side 0) or right wall; reach is its width near and far, in pixels."""
    height, width = image.shape[:2]
    near, far = reach
    corners = np.array([(0, 0.3 * row), (near, 0.3 * row), (near, height), (0, height)], np.float32)
    corners[1] = (far + 0.3 * near, 0.5 * row)
    corners[2] = (near, height)
    if side:
        corners[:, 0] = width - corners[:, 0]
    source = np.array(
        [(0, 0), (rack.shape[1], 0), (rack.shape[1], rack.shape[0]), (0, rack.shape[0])], np.float32
    )
    matrix = cv2.getPerspectiveTransform(source, corners)
    cv2.warpPerspective(rack, matrix, (width, height), dst=image, borderMode=cv2.BORDER_TRANSPARENT)


def _park(rng: np.random.Generator, image: np.ndarray, row: int) -> None:
    """Draw grass, a path and a hedge under a sky."""
    _gradient(image[:row], built_colour(rng, 150, 245), built_colour(rng, 150, 245))
    green = tuple(
        int(value) for value in (rng.integers(50, 130), rng.integers(80, 150), rng.integers(30, 80))
    )
    _gradient(image[row:], scaled(green, 0.75), green)
    height, width = image.shape[:2]
    hedge = int(rng.uniform(0.3, 0.9) * row)
    _gradient(image[hedge:row], scaled(green, 0.4), scaled(green, 0.65))
    x = rng.uniform(0.1, 0.9) * width
    path = [
        (x, row),
        (x + 0.05 * width, row),
        (rng.uniform(0.4, 1.4) * width, height),
        (rng.uniform(-0.4, 0.4) * width, height),
    ]
    cv2.fillPoly(image, [np.array(path, np.int32)], built_colour(rng, 110, 210))
    _grain(rng, image, 0.4)


def _abstract(rng: np.random.Generator, image: np.ndarray, _row: int) -> None:
    """Draw a texture that no place looks like: colour cells, noise, scattered shapes."""
    height, width = image.shape[:2]
    cells = rng.integers(0, 256, (int(rng.integers(1, 9)), int(rng.integers(1, 13)), 3)).astype(np.uint8)
    smooth = cv2.INTER_CUBIC if rng.random() < 0.6 else cv2.INTER_NEAREST
    cv2.resize(cells, (width, height), dst=image, interpolation=smooth)
    if rng.random() < 0.5:
        noise = _noise(rng, width, height)
        cv2.addWeighted(image, 0.6, noise, 0.8, -20, dst=image)
    for _ in range(int(rng.integers(4, 40))):
        _scatter(rng, image)


def _scatter(rng: np.random.Generator, image: np.ndarray) -> None:
    height, width = image.shape[:2]
    colour, x, y = built_colour(rng, 0, 256), int(rng.integers(width)), int(rng.integers(height))
    reach = int(rng.uniform(0.01, 0.16) * height) + 1
    kind = rng.integers(3)
    if kind == 0:
        cv2.rectangle(image, (x, y), (x + reach, y + int(rng.uniform(0.4, 3) * reach)), colour, -1)
    elif kind == 1:
        axes = (reach, int(rng.uniform(0.4, 2) * reach) + 1)
        cv2.ellipse(image, (x, y), axes, float(rng.integers(180)), 0, 360, colour, -1, cv2.LINE_AA)
    else:
        end = (int(rng.integers(width)), int(rng.integers(height)))
        cv2.line(image, (x, y), end, colour, int(rng.integers(1, 7)), cv2.LINE_AA)


def _place_prop(rng: np.random.Generator, image: np.ndarray, row: int, scale: tuple[float, float]) -> None:
    """Stand a prop on the floor, at the size that the perspective asks for."""
    height, width = image.shape[:2]
    share = rng.random() ** 1.5
    unit = (scale[0] + share * (scale[1] - scale[0])) * height * rng.uniform(0.8, 1.2)
    rgb, alpha = draw_prop(rng, float(np.clip(unit, 16, 0.65 * height)))
    left = int(rng.uniform(-0.1, 1.0) * width - rgb.shape[1] / 2)
    foot = int(row + share * (height - row))
    shade_ground(image, (left + rgb.shape[1] // 2, foot), int(0.6 * rgb.shape[1]), rng.uniform(0.2, 0.7))
    paste(image, rgb, alpha, left, foot - rgb.shape[0])


def _cast_shade(rng: np.random.Generator, image: np.ndarray) -> None:
    """Darken or lighten a part of the scene, as the shadow of a house or a shaft of sun does."""
    height, width = image.shape[:2]
    shade = np.zeros((height // 8, width // 8), np.float32)
    corners = rng.uniform(-0.3, 1.3, (4, 2)) * (shade.shape[1], shade.shape[0])
    cv2.fillConvexPoly(shade, cv2.convexHull(corners.astype(np.int32)), 1.0)
    soft = cv2.GaussianBlur(shade, (0, 0), rng.uniform(0.3, 3.0))
    factor = 1 + rng.uniform(-0.5, 0.3) * cv2.resize(soft, (width, height))
    cv2.multiply(image, cv2.merge([factor] * 3), dst=image, dtype=cv2.CV_8U)


_Scene = Callable[[np.random.Generator, np.ndarray, int], None]

PLACES: dict[str, _Scene] = {"street": _street, "hall": _hall, "shop": _shop, "park": _park}
_SCENES: tuple[_Scene, ...] = (*PLACES.values(), _abstract)
_SCENE_WEIGHTS = (0.36, 0.24, 0.18, 0.08, 0.14)
