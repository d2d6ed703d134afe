"""PRW, person re-identification in the wild: 11,816 frames of six cameras on a campus.

Source: Zheng et al., "Person Re-identification in the Wild" (arXiv:1604.02531), and its release.
Legend: M people of one frame.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .boxes import is_wide, xyxy_from_xywh
from .files import fail, read_mat, require, require_images, text_of
from .schema import UNLABELLED, LabelledImage, PersonSearchSet, Query, boxes_by_pid

TREE = """\
<root>/frames/c1s1_001051.jpg, ...
<root>/annotations/c1s1_001051.jpg.mat, ...
<root>/frame_train.mat
<root>/frame_test.mat
<root>/query_info.txt"""

# The annotations were revised twice; a file holds one of these, the newest first.
BOX_KEYS = ("box_new", "anno_file", "anno_previous")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class _Frame:
    """One annotation file; ids are those of the release."""

    name: str
    camera: int
    ids: NDArray[np.int64]
    boxes_xyxy: NDArray[np.float32]


def load_prw(root: Path, *, cross_camera: bool = False, compat: bool = False) -> PersonSearchSet:
    """Read PRW: 5,704 training and 6,112 test frames, 2,057 queries.

    cross_camera: search only frames of other cameras than the query's, instead of all other frames.
    compat: treat the few negative coordinates as SeqNet's and NAE's loaders do, to compare with their numbers:
    x and y of annotated boxes are raised to 0 before the width and height are added, so that such boxes move;
    query boxes are cut to whole pixels. Otherwise boxes are clipped at 0.
    Training ids become 0..482 in the order of their numbers (483 people, though the paper counts 482); test ids
    follow. Id -2, a person whom nobody could name, becomes UNLABELLED. Queries whose person is nowhere in their
    gallery are left out, with a warning that counts them.
    Raises DatasetError for missing or contradicting files.
    """
    require(root, ["frames", "annotations", "frame_train.mat", "frame_test.mat", "query_info.txt"], TREE)
    train, test = (_read_frames(root, half, compat) for half in ("train", "test"))
    pids = _renumber(train, test)
    images = [[_labelled(root, frame, pids) for frame in half] for half in (train, test)]
    require_images((image.path for half in images for image in half), TREE)
    queries = _read_queries(root / "query_info.txt", images[1], pids, compat)
    cameras = np.array([image.camera for image in images[1]])
    kept = [query for asked in queries if (query := _with_gallery(asked, cameras, cross_camera)).truth]
    if len(kept) < len(queries):
        logger.warning("PRW: %d of %d queries have no match", len(queries) - len(kept), len(queries))
    return PersonSearchSet("prw_cross_camera" if cross_camera else "prw", images[0], images[1], kept)


def _read_frames(root: Path, half: str, compat: bool) -> list[_Frame]:
    names = read_mat(root / f"frame_{half}.mat", [f"img_index_{half}"], TREE).ravel()
    frames = []
    for name in map(text_of, names):
        path = root / "annotations" / f"{name}.jpg.mat"
        table = read_mat(path, BOX_KEYS, TREE)
        if table.size % 5:
            fail(path, f"must hold rows of id x y w h, got an array of shape {table.shape}", TREE)
        table = table.astype(np.float64).reshape(-1, 5)
        boxes = _at_least_0(table[:, 1:], compat)
        is_real = is_wide(boxes)
        ids = table[is_real, 0].astype(np.int64)
        frames.append(_Frame(name, _camera(path, name), ids, boxes[is_real].astype(np.float32)))
    return frames


def _camera(path: Path, name: str) -> int:
    if not (match := re.match(r"c(\d+)s", name)):
        fail(path, f"must be named like c1s1_001051.jpg.mat, got {path.name}", TREE)
    return int(match[1])


def _at_least_0(boxes_xywh: NDArray[np.float64], compat: bool) -> NDArray[np.float64]:
    if compat:
        return xyxy_from_xywh(np.clip(boxes_xywh, 0, None))
    return np.clip(xyxy_from_xywh(boxes_xywh), 0, None)


def _renumber(train: Iterable[_Frame], test: Iterable[_Frame]) -> dict[int, int]:
    """Id of the release -> pid: those of the training frames first, each half in the order of its ids."""
    pids: dict[int, int] = {}
    for half in (train, test):
        ids = {int(i) for frame in half for i in frame.ids if i >= 0} - pids.keys()
        pids |= {i: pid for pid, i in enumerate(sorted(ids), len(pids))}
    return pids


def _labelled(root: Path, frame: _Frame, pids: Mapping[int, int]) -> LabelledImage:
    return LabelledImage(
        name=f"{frame.name}.jpg",
        path=root / "frames" / f"{frame.name}.jpg",
        boxes_xyxy=frame.boxes_xyxy,
        pids=np.array([pids.get(int(i), UNLABELLED) for i in frame.ids], dtype=np.int64),
        camera=frame.camera,
    )


def _read_queries(
    path: Path, test: Sequence[LabelledImage], pids: Mapping[int, int], compat: bool
) -> list[Query]:
    """Queries of lines `id x y w h frame`, with every box of their person as truth and no gallery yet."""
    index = {image.path.stem: i for i, image in enumerate(test)}
    truth = boxes_by_pid(test)
    queries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            person, *numbers, frame = line.split()  # also takes the CRLF of the release
            box, image, pid = xyxy_from_xywh([float(n) for n in numbers]), index[frame], pids.get(int(person))
        except (ValueError, KeyError):
            fail(path, f"must hold lines `id x y w h frame` of frames of frame_test.mat, got {line!r}", TREE)
        box = np.clip(np.trunc(box) if compat else box, 0, None).astype(np.float32)
        known = UNLABELLED if pid is None else pid
        queries.append(Query(image, box, known, np.empty(0, np.int64), truth.get(known, {})))
    return queries


def _with_gallery(query: Query, cameras: NDArray[np.int64], cross_camera: bool) -> Query:
    is_searched = np.ones(len(cameras), dtype=np.bool_)
    if cross_camera:
        is_searched = cameras != cameras[query.image]
    is_searched[query.image] = False
    truth = {i: boxes for i, boxes in query.truth.items() if is_searched[i]}
    return Query(query.image, query.box_xyxy, query.pid, np.flatnonzero(is_searched), truth)
