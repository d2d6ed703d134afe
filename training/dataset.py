"""Labelled frames as training batches: a data set's images, or frames of the synthetic street.

Which image a run reads as its i-th, and whether it is mirrored, is a function of the seed and of i: any process
can take any share of them, and a resumed run goes on where it stopped.
Legend: B images, H, W canvas, M people of one image, E embedding dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..models.preprocess import Letterbox
from .datasets.images import read_image
from .datasets.schema import LabelledImage
from .matcher import People
from .synthetic.people import EMBEDDING_DIM
from .synthetic.street import LabelledFrame, random_frame
from .teacher.cache import EmbeddingCache

# Good enough to keep the noise that the cameras add; one frame is about 100 KB.
JPEG_QUALITY = 95

Example = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]
"""Image (height, width, 3) RGB, boxes (M, 4) xyxy pixels, embeddings (M, E), zero rows where unknown."""


class Batch(NamedTuple):
    """Images with their people, and the number that each has in the run."""

    images: Tensor
    """(B, H, W, 3) uint8 RGB."""
    people: list[People]
    samples: list[int]


class FrameSource(Protocol):
    """An endless sequence of examples, a function of the index."""

    @property
    def embedding_dim(self) -> int:
        """E."""
        ...

    def frame(self, index: int) -> Example:
        """The index-th example of a run."""
        ...


class FramePool:
    """`size` frames of the street, each drawn at its first use and kept in a folder."""

    embedding_dim = EMBEDDING_DIM

    def __init__(self, folder: Path, seed: int, size: int) -> None:
        self.folder, self.seed, self.size = folder / f"frames-{seed}", seed, size

    def frame(self, index: int) -> Example:
        """Frame index % size of the pool."""
        path = self.folder / f"{index % self.size:07d}.npz"
        if not path.is_file():
            self._write(path, random_frame(self.seed, index % self.size))
        with np.load(path) as stored:
            image = cv2.imdecode(stored["jpeg"], cv2.IMREAD_COLOR_RGB)
            assert image is not None
            return np.asarray(image, np.uint8), stored["boxes_xyxy"], stored["embeddings"]

    def _write(self, path: Path, frame: LabelledFrame) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        bgr = cv2.cvtColor(frame.image, cv2.COLOR_RGB2BGR)
        jpeg = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
        # A worker of another rank may draw the same frame: whole files only, the last one wins.
        temporary = path.with_name(f".{path.stem}-{os.getpid()}.npz")
        np.savez(temporary, jpeg=jpeg, boxes_xyxy=frame.boxes_xyxy, embeddings=frame.embeddings)
        temporary.replace(path)


class SearchFrames:
    """The training images of a data set with their cached embeddings, every epoch in another order."""

    def __init__(self, images: Sequence[LabelledImage], cache: EmbeddingCache, seed: int) -> None:
        self.images, self.cache, self.seed = images, cache, seed
        self.embedding_dim = cache.dim

    def frame(self, index: int) -> Example:
        """The example that comes index-th."""
        epoch, place = divmod(index, len(self.images))
        image = self.images[int(_epoch_order(self.seed, epoch, len(self.images))[place])]
        return read_image(image), image.boxes_xyxy, self.cache.embeddings(image)


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(size)


class CanvasFrames(Dataset[tuple[Tensor, People, int]]):
    """Frames of a source on a canvas, half of them mirrored; item i is a function of the seed and of indices[i]."""

    def __init__(self, source: FrameSource, indices: range, *, seed: int, width: int, height: int) -> None:
        self.source, self.indices, self.seed = source, indices, seed
        self.width, self.height = width, height

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> tuple[Tensor, People, int]:
        index = self.indices[item]
        image, boxes_xyxy, embeddings = self.source.frame(index)
        # One cached embedding serves both: the teacher averages a crop with its mirror image.
        if np.random.default_rng([self.seed, index]).random() < 0.5:
            image, boxes_xyxy = mirrored(image, boxes_xyxy)
        letterbox = Letterbox(image.shape[1], image.shape[0], self.width, self.height)
        canvas = torch.from_numpy(letterbox.image(image))
        boxes_norm = torch.from_numpy(letterbox.boxes_to_canvas(boxes_xyxy))
        return canvas, People(boxes_norm, torch.from_numpy(embeddings)), index


def mirrored(
    image: NDArray[np.uint8], boxes_xyxy: NDArray[np.float32]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Flip left and right: image (height, width, 3) and boxes (M, 4) pixels. Embeddings do not change."""
    x1, y1, x2, y2 = boxes_xyxy.T
    width = image.shape[1]
    return np.ascontiguousarray(image[:, ::-1]), np.stack([width - x2, y1, width - x1, y2], axis=1)


def frame_batches(frames: CanvasFrames, *, batch_size: int, workers: int) -> Iterator[Batch]:
    """Batches of the frames in the order of their indices."""
    # A worker is a fork, and OpenCV's thread pool does not survive one: a worker would wait for it forever.
    cv2.setNumThreads(1)
    loader = DataLoader(
        frames,
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_one_thread,
        persistent_workers=workers > 0,
    )
    yield from loader


def _collate(items: list[tuple[Tensor, People, int]]) -> Batch:
    images, people, samples = zip(*items, strict=True)
    return Batch(torch.stack(images), list(people), list(samples))


def _one_thread(worker: int) -> None:
    # The workers are the parallelism; OpenCV's own threads would fight with PyTorch's.
    cv2.setNumThreads(1)
