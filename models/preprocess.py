"""What goes into the network: the letterboxed frame and the seeded noise; NumPy and OpenCV only.

Legend: H, W canvas height and width (the network's input), N proposals, E embedding dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Float32Array = NDArray[np.float32]
Frame = NDArray[np.uint8]


@dataclass(frozen=True)
class Letterbox:
    """Place a frame on the canvas, keeping its aspect ratio, and bring boxes back.

    The frame lies in the top left corner; the rest of the canvas is grey. Boxes on the canvas are
    normalised by the canvas width and height, in [0, 1].
    """

    frame_width: int
    frame_height: int
    width: int
    height: int

    @property
    def scale(self) -> float:
        """Canvas pixels per frame pixel."""
        return min(self.width / self.frame_width, self.height / self.frame_height)

    def image(self, frame: Frame) -> Frame:
        """Return the canvas, (H, W, 3) uint8 RGB, that holds the frame, (frame_height, frame_width, 3)."""
        width = max(1, round(self.frame_width * self.scale))
        height = max(1, round(self.frame_height * self.scale))
        if (width, height) != (self.frame_width, self.frame_height):
            # Area averaging keeps thin limbs that bilinear sampling would skip when a frame shrinks.
            interpolation = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_LINEAR
            frame = np.asarray(cv2.resize(frame, (width, height), interpolation=interpolation), np.uint8)
        if (width, height) == (self.width, self.height):
            return np.ascontiguousarray(frame)
        canvas = np.full((self.height, self.width, 3), PAD_VALUE, np.uint8)
        canvas[:height, :width] = frame
        return canvas

    def boxes_to_frame(self, boxes_norm: Float32Array) -> Float32Array:
        """(n, 4) xyxy normalised on the canvas -> (n, 4) xyxy frame pixels, clipped to the frame."""
        boxes = boxes_norm * np.array([self.width, self.height] * 2, np.float32) / np.float32(self.scale)
        limits = np.array([self.frame_width, self.frame_height] * 2, np.float32)
        return np.clip(boxes, 0, limits).astype(np.float32)

    def boxes_to_canvas(self, boxes_xyxy: Float32Array) -> Float32Array:
        """(n, 4) xyxy frame pixels -> (n, 4) xyxy normalised on the canvas."""
        boxes = np.asarray(boxes_xyxy, np.float32) * np.float32(self.scale)
        return (boxes / np.array([self.width, self.height] * 2, np.float32)).astype(np.float32)


# Mid grey: about the mean of natural images, so the padding carries no strong edge or colour.
PAD_VALUE = 114


def check_frame(frame: Frame, name: str = "frame") -> None:
    """Raise ValueError unless frame is a uint8 RGB array of shape (height, width, 3) with pixels in it."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.size == 0:
        raise ValueError(
            f"{name} must be a uint8 RGB array (height, width, 3), got {frame.dtype} {frame.shape}"
        )


def seeded_noise(seed: int, num_proposals: int, embedding_dim: int) -> tuple[Float32Array, Float32Array]:
    """Draw the start of one image's diffusion: boxes_T (N, 4) and emb_T (N, E), standard normal.

    One image, one seed: what is found in it does not depend on the batch it rides in. Philox is counter
    based and fixed across NumPy versions and platforms.
    """
    rng = np.random.Generator(np.random.Philox(seed))
    boxes = rng.standard_normal((num_proposals, 4), dtype=np.float32)
    embeddings = rng.standard_normal((num_proposals, embedding_dim), dtype=np.float32)
    return boxes, embeddings
