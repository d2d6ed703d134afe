"""Labelled frames of the synthetic street as training batches.

A frame takes longer to draw than to learn from, so frames are drawn once into a pool on disk and then read.
Legend: B images, H, W canvas, M people of one image, E embedding dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..models.preprocess import Letterbox
from .matcher import People
from .synthetic.street import LabelledFrame, random_frame

# Good enough to keep the noise that the cameras add; one frame is about 100 KB.
JPEG_QUALITY = 95


class Batch(NamedTuple):
    """Images with their people."""

    images: Tensor
    """(B, H, W, 3) uint8 RGB."""
    people: list[People]


class FramePool:
    """`size` frames of the street, each drawn at its first use and kept in a folder."""

    def __init__(self, folder: Path, seed: int, size: int) -> None:
        self.folder, self.seed, self.size = folder / f"frames-{seed}", seed, size
        self.folder.mkdir(parents=True, exist_ok=True)

    def frame(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image (height, width, 3) uint8 RGB, boxes (M, 4) pixels, embeddings (M, E) of frame index % size."""
        path = self.folder / f"{index % self.size:07d}.npz"
        if not path.is_file():
            self._write(path, random_frame(self.seed, index % self.size))
        with np.load(path) as stored:
            image = cv2.imdecode(stored["jpeg"], cv2.IMREAD_COLOR_RGB)
            assert image is not None
            return np.asarray(image), stored["boxes_xyxy"], stored["embeddings"]

    def _write(self, path: Path, frame: LabelledFrame) -> None:
        bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
        jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        # A worker of another rank may draw the same frame: whole files only, the last one wins.
        temporary = path.with_name(f".{path.stem}-{os.getpid()}.npz")
        np.savez(temporary, jpeg=jpeg, boxes_xyxy=frame.boxes_xyxy, embeddings=frame.embeddings)
        temporary.replace(path)


class StreetFrames(Dataset[tuple[Tensor, People]]):
    """Frames of a pool on a canvas, half of them mirrored; item i is a function of the seed and of i."""

    def __init__(self, pool: FramePool, indices: range, *, width: int, height: int) -> None:
        self.pool, self.indices = pool, indices
        self.width, self.height = width, height

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, People]:
        index = self.indices[item]
        image, boxes_xyxy, embeddings = self.pool.frame(index)
        if np.random.default_rng([self.pool.seed, index]).random() < 0.5:
            image, boxes_xyxy = mirrored(image, boxes_xyxy)
        letterbox = Letterbox(image.shape[1], image.shape[0], self.width, self.height)
        canvas = torch.from_numpy(letterbox.image(image))
        boxes_norm = torch.from_numpy(letterbox.boxes_to_canvas(boxes_xyxy))
        return canvas, People(boxes_norm, torch.from_numpy(embeddings))


def mirrored(image: np.ndarray, boxes_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flip left and right: image (height, width, 3) and boxes (M, 4) pixels. Embeddings do not change."""
    x1, y1, x2, y2 = boxes_xyxy.T
    width = image.shape[1]
    return np.ascontiguousarray(image[:, ::-1]), np.stack([width - x2, y1, width - x1, y2], axis=1)


def street_batches(
    pool: FramePool, indices: range, *, width: int, height: int, batch_size: int, workers: int
) -> Iterator[Batch]:
    """Batches of the pool's frames in the order of their indices; beyond the pool's size they come again."""
    loader = DataLoader(
        StreetFrames(pool, indices, width=width, height=height),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
    )
    yield from loader


def _collate(samples: list[tuple[Tensor, People]]) -> Batch:
    images, people = zip(*samples, strict=True)
    return Batch(torch.stack(images), list(people))


def _one_thread(worker: int) -> None:
    # The workers are the parallelism; OpenCV's own threads would fight with PyTorch's.
    cv2.setNumThreads(1)
