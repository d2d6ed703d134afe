"""Embeddings of every training box, computed once and read by image and box, not by order.

A cache is one .npz: teacher_hash, dataset, names (S,), offsets (S + 1,) int64, boxes_xyxy (n, 4) float32 and
embeddings (n, E) float32; rows offsets[i] to offsets[i + 1] belong to names[i]. The truth of a synthetic city
has the same arrays without a teacher, so it reads as the cache of a perfect one.
Legend: S images, n boxes of all images, M boxes of one, E embedding dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ...models.reid_teacher import ReidTeacher, teacher_hash
from ..datasets.schema import LabelledImage
from .crops import table_of_images
from .embedding import embed_table

REMAKE = "make it again with psdiff teacher embed"
REDRAW = "draw the city again with psdiff synth"

TRUTH_KEYS = ("names", "offsets", "boxes_xyxy", "embeddings")


class CacheError(ValueError):
    """The cached embeddings do not belong to these images and this teacher; the message says what to do."""


@dataclass(frozen=True)
class EmbeddingCache:
    """Embeddings of the boxes of images, by image name."""

    rows: Mapping[str, NDArray[np.float32]]
    """Name -> (M, E) unit rows in the order of the image's boxes; a zero row where a box shows nobody."""
    dim: int
    """E."""

    def embeddings(self, image: LabelledImage) -> NDArray[np.float32]:
        """(M, E) unit rows, zero where `known` is False. The same rows serve the mirrored image."""
        return self.rows[image.name]

    def known(self, image: LabelledImage) -> NDArray[np.bool_]:
        """(M,) whether a box showed enough to be described; otherwise its row teaches nothing."""
        return np.any(self.rows[image.name] != 0, axis=1)


def cache_path(folder: Path, dataset: str, teacher: str) -> Path:
    """Where the cache of a data set and a teacher's hash lies."""
    return folder / f"{dataset}_{teacher}.npz"


def write_cache(
    folder: Path,
    teacher: ReidTeacher,
    images: Sequence[LabelledImage],
    *,
    dataset: str,
    workers: int = 0,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Path:
    """Embed every box of the images, labelled or not, from its pixels at full resolution; return the file.

    The file appears at once or not at all. on_progress: told how many boxes are done.
    """
    table = table_of_images(images)
    embeddings = embed_table(teacher, table, workers=workers, on_progress=on_progress)
    teacher_id = teacher_hash(teacher)
    path = cache_path(folder, dataset, teacher_id)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.npz")
    np.savez(
        temporary,
        teacher_hash=np.array(teacher_id),
        dataset=np.array(dataset),
        names=np.array([image.name for image in images], np.str_),
        offsets=np.cumsum([0, *(len(image.boxes_xyxy) for image in images)], dtype=np.int64),
        boxes_xyxy=table.boxes_xyxy,
        embeddings=embeddings.cpu().numpy(),
    )
    temporary.replace(path)
    return path


def load_cache(path: Path, images: Sequence[LabelledImage], teacher: str) -> EmbeddingCache:
    """Read the embeddings of `images` by the teacher of that hash.

    Raises CacheError where the file was made by another teacher, lacks an image or holds other boxes.
    """
    stored = _read(path, (*TRUTH_KEYS, "teacher_hash"), REMAKE)
    if str(stored["teacher_hash"]) != teacher:
        raise CacheError(
            f"embedding cache must be of teacher {teacher}, got {stored['teacher_hash']} in {path}; {REMAKE}"
        )
    return _checked(path, stored, images, REMAKE)


def truth_cache(path: Path, images: Sequence[LabelledImage]) -> EmbeddingCache:
    """Read the appearance codes of a synthetic city as the embeddings of a perfect teacher.

    Raises CacheError where the file lacks an image or holds other boxes.
    """
    return _checked(path, _read(path, TRUTH_KEYS, REDRAW), images, REDRAW)


def _read(path: Path, keys: Sequence[str], remedy: str) -> dict[str, NDArray]:
    if not path.is_file():
        raise CacheError(f"embedding cache must be an .npz file, got {path}, which does not exist; {remedy}")
    try:
        with np.load(path) as file:
            return {key: file[key] for key in keys}
    except (BadZipFile, KeyError, OSError, ValueError) as error:
        raise CacheError(
            f"embedding cache must hold {', '.join(keys)}, got {path}: {error}; {remedy}"
        ) from None


def _checked(
    path: Path, stored: Mapping[str, NDArray], images: Sequence[LabelledImage], remedy: str
) -> EmbeddingCache:
    bounds = itertools.pairwise(stored["offsets"].tolist())
    spans = dict(zip(stored["names"].tolist(), bounds, strict=True))
    embeddings = np.asarray(stored["embeddings"], np.float32)
    rows = {}
    for image in images:
        if image.name not in spans:
            raise CacheError(
                f"embedding cache must hold the image {image.name}, got {path} without; {remedy}"
            )
        span = slice(*spans[image.name])
        _check_boxes(image, stored["boxes_xyxy"][span], f"{path}; {remedy}")
        rows[image.name] = embeddings[span]
    return EmbeddingCache(rows, embeddings.shape[1])


def _check_boxes(image: LabelledImage, stored: NDArray, where: str) -> None:
    if stored.shape != image.boxes_xyxy.shape:
        raise CacheError(
            f"{image.name} must have the {len(image.boxes_xyxy)} boxes of the data set, got {len(stored)} in {where}"
        )
    differs = (stored.astype(np.float32) != image.boxes_xyxy).any(axis=1)
    if differs.any():
        row = int(differs.argmax())
        raise CacheError(
            f"box {row} of {image.name} must be {image.boxes_xyxy[row].tolist()} as in the data set, "
            f"got {stored[row].tolist()} in {where}"
        )
