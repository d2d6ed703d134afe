"""Placing figures in an empty scene: depth, hiding, shadows, and the labels that follow from them.

M is the number of labelled people in a frame, D the length of an appearance code.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from .backgrounds import paste, shade_ground
from .cameras import Camera, expose
from .people import EMBEDDING_DIM

MIN_VISIBILITY = 0.3
MIN_SIDE_PX = 6.0
SOLID = 0.4
"""Coverage from which a pixel belongs to a figure."""

NOBODY = -1


@dataclass(frozen=True)
class LabelledFrame:
    """A frame and everybody in it who can be seen."""

    image: np.ndarray
    """uint8 RGB (H, W, 3)."""
    boxes_xyxy: np.ndarray
    """float32 (M, 4), frame pixels: the tight extent of the whole figure, clipped to the frame."""
    pids: np.ndarray
    """int64 (M,)."""
    embeddings: np.ndarray
    """float32 (M, D), unit vectors: the appearance codes."""
    visibility: np.ndarray
    """float32 (M,) in [MIN_VISIBILITY, 1]: share of the figure that is neither hidden nor cut off."""


@dataclass(frozen=True)
class Standing:
    """A sprite placed in a frame: a person, or a thing that hides people."""

    rgb: np.ndarray
    alpha: np.ndarray
    left: int
    top: int
    ground_row: float
    pid: int = NOBODY
    code: np.ndarray | None = None


def compose(
    camera: Camera, scene: np.ndarray, standing: list[Standing], rng: np.random.Generator
) -> LabelledFrame:
    """Place sprites in an empty scene, far ones first, label the people and take the picture."""
    image = scene.copy()
    owner = np.full(image.shape[:2], NOBODY, np.int32)
    ordered = sorted((_trimmed(one) for one in standing), key=lambda one: one.ground_row)
    for number, one in enumerate(ordered):
        if one.pid != NOBODY:
            _cast_shadow(image, one, camera)
        paste(image, one.rgb, one.alpha, one.left, one.top)
        _claim(owner, one, number)
    labels = [
        label
        for number, one in enumerate(ordered)
        if one.pid != NOBODY and (label := _label(owner, one, number)) is not None
    ]
    return _labelled(expose(camera, image, rng), labels)


def _trimmed(one: Standing) -> Standing:
    """Cut the empty margins off a sprite."""
    left, top, width, height = cv2.boundingRect((one.alpha > 0).view(np.uint8))
    rows, columns = slice(top, top + height), slice(left, left + width)
    return replace(
        one,
        rgb=one.rgb[rows, columns],
        alpha=one.alpha[rows, columns],
        left=one.left + left,
        top=one.top + top,
    )


_Label = tuple[np.ndarray, float, Standing]


def _label(owner: np.ndarray, one: Standing, number: int) -> _Label | None:
    """Give box, visibility and figure, or None for somebody too hidden or too small to be labelled."""
    solid = one.alpha >= SOLID
    columns, rows = np.flatnonzero(solid.any(axis=0)), np.flatnonzero(solid.any(axis=1))
    if not len(columns):
        return None
    height, width = owner.shape
    box = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)
    box += np.array([one.left, one.top, one.left, one.top], np.float32)
    box = np.clip(box, 0, np.array([width, height, width, height], np.float32))
    if min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE_PX:
        return None
    left, top, right, bottom = box.astype(int)
    seen = np.count_nonzero(owner[top:bottom, left:right] == number)
    visibility = seen / np.count_nonzero(solid)
    return (box, visibility, one) if visibility >= MIN_VISIBILITY else None


def _labelled(image: np.ndarray, labels: list[_Label]) -> LabelledFrame:
    codes = [one.code for _, _, one in labels if one.code is not None]
    return LabelledFrame(
        image=image,
        boxes_xyxy=np.array([box for box, _, _ in labels], np.float32).reshape(-1, 4),
        pids=np.array([one.pid for _, _, one in labels], np.int64),
        embeddings=np.array(codes, np.float32).reshape(len(labels), -1 if labels else EMBEDDING_DIM),
        visibility=np.array([visibility for _, visibility, _ in labels], np.float32),
    )


def _claim(owner: np.ndarray, one: Standing, number: int) -> None:
    """Write a sprite's number into the map of who covers which pixel."""
    low_x, low_y = max(0, one.left), max(0, one.top)
    window = owner[low_y : max(one.top + len(one.alpha), 0), low_x : max(one.left + one.alpha.shape[1], 0)]
    solid = one.alpha[low_y - one.top :, low_x - one.left :][: window.shape[0], : window.shape[1]] >= SOLID
    window[solid] = number


def _cast_shadow(image: np.ndarray, one: Standing, camera: Camera) -> None:
    """Darken the floor under the feet and to the side that the light does not come from."""
    columns = np.flatnonzero((one.alpha >= SOLID).any(axis=0))
    if not len(columns):
        return
    reach = max(4, int(columns[-1] - columns[0]))
    x = one.left + int(columns[0] + columns[-1]) // 2 - int(0.4 * reach * camera.light)
    shade_ground(image, (x, int(one.ground_row)), reach, camera.shadow)
