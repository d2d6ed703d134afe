"""Cameras of the synthetic street: where they look from, and what they do to light and pixels."""

from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from .backgrounds import draw_background

NOISE_PX = 1536


@dataclass(frozen=True)
class Camera:
    """One mounted camera: perspective, light and picture quality."""

    background_seed: int
    place: str | None = None
    """A place of backgrounds.PLACES, or None for any scene."""
    horizon: float = 0.3
    """Row where the floor ends, as a fraction of the frame height."""
    far_scale: float = 0.2
    near_scale: float = 0.6
    """Height of an average person standing at the horizon and at the lower edge, in frame heights."""
    tilt: float = 0.2
    """0: at eye level .. 1: looking down steeply."""
    gain: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """White balance: factors of red, green and blue."""
    gamma: float = 1.0
    light: float = -0.6
    """Side the light comes from, -1 left .. 1 right."""
    light_falloff: float = 0.0
    """Share by which the far side of the frame is darker than the lit side."""
    vignette: float = 0.0
    shadow: float = 0.4
    noise_sigma: float = 0.0
    """Standard deviation of the luma noise in grey levels; the chroma noise has half of it."""
    blur_sigma: float = 0.0
    """In pixels; 0 is sharp."""
    jpeg_quality: int | None = None
    """1..100, or None for a camera that does not compress."""

    def person_px(self, row: float, height: int) -> float:
        """Give the height in pixels of an average person whose feet are on a pixel row."""
        share = (row / height - self.horizon) / (1 - self.horizon)
        return height * max(self.far_scale + share * (self.near_scale - self.far_scale), 0.02)

    def row_of(self, person_px: float, height: int) -> float:
        """Give the pixel row on which an average person of this height has the feet."""
        share = (person_px / height - self.far_scale) / (self.near_scale - self.far_scale)
        return height * (self.horizon + share * (1 - self.horizon))

    def background(self, width: int, height: int) -> np.ndarray:
        """Draw the empty scene in front of the camera, before exposure: uint8 RGB (height, width, 3)."""
        return draw_background(
            np.random.default_rng(self.background_seed),
            width,
            height,
            horizon=self.horizon,
            scale=(self.far_scale, self.near_scale),
            place=self.place,
        )


def random_camera(rng: np.random.Generator) -> Camera:
    """Draw a camera: from eye level to under the ceiling, day to dusk, sharp to poor."""
    near = float(np.exp(rng.uniform(np.log(0.3), np.log(1.15))))
    warmth, magenta = rng.normal(0, 0.07), rng.normal(0, 0.03)
    return Camera(
        background_seed=int(rng.integers(2**31)),
        horizon=float(rng.uniform(0.08, 0.55)),
        far_scale=near * float(rng.uniform(0.22, 0.55)),
        near_scale=near,
        tilt=float(rng.uniform(0.0, 0.55) if rng.random() < 0.8 else rng.uniform(0.5, 0.95)),
        gain=float(np.exp(rng.normal(0.12, 0.24))),
        tint=(1 + float(warmth), 1 - float(magenta), 1 - float(warmth)),
        gamma=float(np.exp(rng.normal(-0.05, 0.17))),
        light=float(rng.uniform(-1, 1)),
        light_falloff=float(rng.uniform(0, 0.4)),
        vignette=float(rng.uniform(0, 0.35)),
        shadow=float(rng.uniform(0.1, 0.65)),
        noise_sigma=float(rng.gamma(1.5, 2.2)),
        blur_sigma=float(rng.uniform(0.4, 1.3)) if rng.random() < 0.4 else 0.0,
        jpeg_quality=int(rng.integers(30, 92)) if rng.random() < 0.5 else None,
    )


def expose(camera: Camera, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Turn a scene into what the camera delivers; uint8 (H, W, 3) in and out, rng draws the noise."""
    if camera.blur_sigma > 0:
        image = cv2.GaussianBlur(image, (0, 0), camera.blur_sigma)
    image = cv2.LUT(image, _tone_curves(camera))
    height, width = image.shape[:2]
    light = cv2.resize(_light_field(camera), (width, height), interpolation=cv2.INTER_LINEAR)
    image = cv2.multiply(image, light, dtype=cv2.CV_8U)
    if camera.noise_sigma > 0:
        image = _add_noise(image, camera.noise_sigma, rng)
    if camera.jpeg_quality is not None:
        image = _through_jpeg(image, camera.jpeg_quality)
    return np.ascontiguousarray(image)


def _through_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress and decompress; red and blue stay swapped in between, which JPEG treats nearly alike."""
    encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    decoded = cv2.imdecode(encoded, cv2.IMREAD_COLOR)
    if decoded is None:
        raise RuntimeError(f"a JPEG of quality {quality} must decode")
    return decoded


def _tone_curves(camera: Camera) -> np.ndarray:
    """Give the response of the sensor as a uint8 (1, 256, 3) table."""
    levels = np.linspace(0, 1, 256)[:, None] ** camera.gamma
    return np.clip(255 * levels * camera.gain * np.array(camera.tint), 0, 255).astype(np.uint8)[None]


def _light_field(camera: Camera) -> np.ndarray:
    """Give brightness factors over the frame on a coarse float32 (24, 40, 3) grid."""
    y, x = np.mgrid[-1:1:24j, -1:1:40j].astype(np.float32)
    sides = 1 - camera.light_falloff * (0.5 - 0.5 * x * np.sign(camera.light))
    return np.repeat((sides * (1 - camera.vignette * (x**2 + y**2) / 2))[..., None], 3, axis=2)


@lru_cache(maxsize=1)
def _noise_field() -> np.ndarray:
    """Give (NOISE_PX, NOISE_PX, 3) uint8 noise around 128: luma of deviation 32, chroma of about half."""
    rng = np.random.default_rng(5)
    luma = 32 * rng.standard_normal((NOISE_PX, NOISE_PX, 1), np.float32)
    chroma = 32 * rng.standard_normal((NOISE_PX // 2, NOISE_PX // 2, 3), np.float32)
    chroma = cv2.resize(chroma, (NOISE_PX, NOISE_PX), interpolation=cv2.INTER_LINEAR)
    return np.clip(np.rint(128 + luma + 0.7 * chroma), 0, 255).astype(np.uint8)


def _add_noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Add a random cut-out of the noise field: far cheaper than fresh noise, and never the same twice."""
    height, width = image.shape[:2]
    field = _noise_field()
    if height > NOISE_PX or width > NOISE_PX:
        field = np.tile(field, (height // NOISE_PX + 1, width // NOISE_PX + 1, 1))
    top = int(rng.integers(field.shape[0] - height + 1))
    left = int(rng.integers(field.shape[1] - width + 1))
    noise = field[top : top + height, left : left + width]
    strength = sigma / 32
    return cv2.addWeighted(image, 1.0, noise, strength, -128 * strength)
