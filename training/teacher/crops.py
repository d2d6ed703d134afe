"""People cut out of images: the rows that a teacher learns from, is judged on, and describes.

Legend: n rows, M people of one image, H, W crop size of the network, C crops of one source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ...models.reid_teacher import TeacherConfig, network_input
from ..datasets.images import read_crop
from ..datasets.load import PERSON_SEARCH_SETS, REID_SETS, load_person_search, load_reid
from ..datasets.schema import NO_CAMERA, UNLABELLED, Crop, LabelledImage, PersonSearchSet, ReidSet

# A view smaller than this in either direction shows nobody.
SMALLEST_PX = 2

# The box of a crop that is an image of its own.
WHOLE = (0.0, 0.0, np.inf, np.inf)


@dataclass(frozen=True)
class CropTable:
    """n people and where to cut them out; rows of one source stand together."""

    sources: Sequence[Crop]
    """The images; their own pid and camera are not used."""
    frames: NDArray[np.int64]
    """(n,) ascending indices into sources."""
    boxes_xyxy: NDArray[np.float32]
    """(n, 4) pixels of the source; WHOLE for all of it."""
    pids: NDArray[np.int64]
    """(n,)."""
    cameras: NDArray[np.int64]
    """(n,); which views of a person are too alike to teach or to prove anything."""

    def __len__(self) -> int:
        return len(self.frames)

    def rows(self, chosen: NDArray[np.bool_]) -> CropTable:
        """The rows where (n,) `chosen` is True; the sources stay."""
        names = ("frames", "boxes_xyxy", "pids", "cameras")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def labels(self) -> NDArray[np.int64]:
        """(n,) the pids as consecutive classes 0..N-1, in order of pid; UNLABELLED stays."""
        known = np.unique(self.pids[self.pids != UNLABELLED])
        return np.where(self.pids == UNLABELLED, UNLABELLED, np.searchsorted(known, self.pids))


def load_people(name: str, root: Path) -> PersonSearchSet | ReidSet:
    """Read any set of people by its name, with - or _ between words, from the folder of its release.

    Raises ValueError for another name, DatasetError for missing or contradicting files.
    """
    key = name.replace("_", "-")
    if key in REID_SETS:
        return load_reid(key, root)
    if key in PERSON_SEARCH_SETS:
        return load_person_search(key, root)
    known = ", ".join([*PERSON_SEARCH_SETS, *REID_SETS])
    raise ValueError(f"dataset must be one of {known}, got {name}")


def table_of_images(images: Sequence[LabelledImage]) -> CropTable:
    """Every person of whole frames, labelled or not, in order of image and box.

    Where the data set does not tell the camera, each frame counts as one.
    """
    counts = [len(image.boxes_xyxy) for image in images]
    frames = np.repeat(np.arange(len(images)), counts)
    cameras = np.array([image.camera for image in images], np.int64)[frames]
    return CropTable(
        sources=[Crop(image.path, UNLABELLED, image.camera) for image in images],
        frames=frames,
        boxes_xyxy=np.concatenate([np.zeros((0, 4), np.float32), *(image.boxes_xyxy for image in images)]),
        pids=np.concatenate([np.zeros(0, np.int64), *(image.pids for image in images)]),
        cameras=np.where(cameras == NO_CAMERA, frames, cameras),
    )


def table_of_crops(crops: Sequence[Crop]) -> CropTable:
    """Crops that are images of their own."""
    return CropTable(
        sources=crops,
        frames=np.arange(len(crops)),
        boxes_xyxy=np.tile(np.array(WHOLE, np.float32), (len(crops), 1)),
        pids=np.array([crop.pid for crop in crops], np.int64),
        cameras=np.array([crop.camera for crop in crops], np.int64),
    )


def cut(image: NDArray[np.uint8], box_xyxy: NDArray[np.float32]) -> NDArray[np.uint8] | None:
    """The whole pixels that a box touches, (h, w, 3); None where it shows less than 2 x 2 pixels of the image."""
    height, width = image.shape[:2]
    limits = np.array([width, height, width, height], np.float32)
    clipped = np.clip(box_xyxy, 0, limits)
    x1, y1 = np.floor(clipped[:2]).astype(int)
    x2, y2 = np.ceil(clipped[2:]).astype(int)
    if x2 - x1 < SMALLEST_PX or y2 - y1 < SMALLEST_PX:
        return None
    return image[y1:y2, x1:x2]


class SourceCrops(Dataset[tuple[Tensor, Tensor]]):
    """All people of one source at a time, so that each image is read once, undisturbed.

    Item f is f's rows of the table that show somebody, (C,) int64, and their crops, (C, 3, H, W) uint8.
    """

    def __init__(self, table: CropTable, config: TeacherConfig) -> None:
        self.table, self.config = table, config
        self.wanted = np.unique(table.frames)

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        frame = self.wanted[item]
        image = read_crop(self.table.sources[frame])
        start, end = np.searchsorted(self.table.frames, [frame, frame + 1])
        views = {row: cut(image, self.table.boxes_xyxy[row]) for row in range(start, end)}
        crops = {row: network_input(view, self.config) for row, view in views.items() if view is not None}
        empty = torch.zeros((0, 3, self.config.height, self.config.width), dtype=torch.uint8)
        stacked = torch.stack(list(crops.values())) if crops else empty
        return torch.tensor(list(crops), dtype=torch.int64), stacked


class TrainingCrops(Dataset[tuple[Tensor, Tensor]]):
    """Row i of a table as a disturbed (3, H, W) uint8 crop, and i. Every row must show somebody."""

    def __init__(self, table: CropTable, config: TeacherConfig, *, padding: int, erasing: float) -> None:
        self.table, self.config = table, config
        self.disturb = disturbance(config, padding=padding, erasing=erasing)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        source = self.table.sources[self.table.frames[row]]
        view = cut(read_crop(source), self.table.boxes_xyxy[row])
        if view is None:
            raise ValueError(f"row {row} must show at least 2 x 2 pixels, got a box outside {source.path}")
        return self.disturb(network_input(view, self.config)), torch.tensor(row)


def disturbance(config: TeacherConfig, *, padding: int, erasing: float) -> v2.Compose:
    """Mirror, shift by up to `padding` pixels, and cover a rectangle with probability `erasing`.

    Source: Bag of Tricks (arXiv:1903.07071), whose erased rectangles take the mean colour.
    """
    size = [config.height, config.width]
    mean = [float(round(value)) for value in config.pixel_mean]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(padding),
            v2.RandomCrop(size),
            # The library's annotation of value is narrower than its documentation, which allows three numbers.
            v2.RandomErasing(
                erasing,
                scale=(0.02, 0.4),
                ratio=(0.3, 1 / 0.3),
                value=mean,  # pyright: ignore[reportArgumentType]
            ),
        ]
    )
