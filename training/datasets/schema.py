"""What every data set is read into: images with labelled people, queries with galleries, and ReID crops.

Boxes are xyxy in pixels of the stored image, float32, never empty; identities are int64, >= 0, unique within a
set, and UNLABELLED for a person whom nobody named. No torch here.
Legend: M people of one image, R ignored regions, G gallery images of one query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

UNLABELLED = -1

# The camera of an image whose set does not tell. It equals no camera, itself included: an evaluator that removes
# matches of the same camera must keep these, or nothing is left to find.
NO_CAMERA = -1


class DatasetError(ValueError):
    """The files are not the data set they should be; the message names the path and the expected tree."""


@dataclass(frozen=True, eq=False)
class LabelledImage:
    """One stored image and the people in it."""

    name: str
    """Unique in its set; the key of cached embeddings and of seeded noise."""
    path: Path
    boxes_xyxy: NDArray[np.float32]
    """(M, 4)."""
    pids: NDArray[np.int64]
    """(M,)."""
    camera: int = NO_CAMERA
    ignored_xyxy: NDArray[np.float32] | None = None
    """(R, 4) regions that are neither person nor background: crowds, reflections; None for none."""


@dataclass(frozen=True, eq=False)
class Query:
    """A person to search for, where to search, and where that person is."""

    image: int
    """Index into the set's test images."""
    box_xyxy: NDArray[np.float32]
    """(4,)."""
    pid: int
    gallery: NDArray[np.int64]
    """(G,) indices into the set's test images; never the query's own image."""
    truth: Mapping[int, NDArray[np.float32]]
    """Gallery image -> (n, 4) boxes of this person there, n >= 1; images without the person are absent."""


@dataclass(frozen=True)
class PersonSearchSet:
    """Whole frames with boxes and identities; train and test share no identity."""

    name: str
    train: Sequence[LabelledImage]
    test: Sequence[LabelledImage]
    queries: Sequence[Query]

    @property
    def num_train_pids(self) -> int:
        """Named people in the training images; their pids need not be consecutive."""
        return len({int(pid) for image in self.train for pid in image.pids} - {UNLABELLED})


def boxes_by_pid(images: Sequence[LabelledImage]) -> dict[int, dict[int, NDArray[np.float32]]]:
    """Named person -> index of each image that shows it -> its (n, 4) boxes there: what a Query's truth is from."""
    found: dict[int, dict[int, NDArray[np.float32]]] = {}
    for i, image in enumerate(images):
        for pid in {int(pid) for pid in image.pids} - {UNLABELLED}:
            found.setdefault(pid, {})[i] = image.boxes_xyxy[image.pids == pid]
    return found


@dataclass(frozen=True)
class DetectionSet:
    """Frames with boxes only; every pid is UNLABELLED."""

    name: str
    train: Sequence[LabelledImage]
    test: Sequence[LabelledImage]


@dataclass(frozen=True, slots=True)
class Crop:
    """One person cut out of an image. Slots: a set may hold four million."""

    path: Path
    """An image file, or the LMDB folder or HDF5 file that holds it."""
    pid: int
    camera: int
    key: str = ""
    """Where in the container; empty for an image file."""


@dataclass(frozen=True)
class ReidSet:
    """Crops with identities; train and test share no identity. `train` alone where nothing is labelled."""

    name: str
    train: Sequence[Crop]
    query: Sequence[Crop] = ()
    gallery: Sequence[Crop] = ()
