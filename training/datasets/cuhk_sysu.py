"""CUHK-SYSU person search: 18,184 street photographs and film stills, 8,432 identities, no cameras.

Source: Xiao et al., "Joint Detection and Identification Feature Learning for Person Search" (arXiv:1604.01850),
and the annotation folder of its release.
Legend: M people of one image, N boxes of one person in one image.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .boxes import xyxy_from_xywh
from .files import fail, read_mat, require, require_images, text_of
from .mat_structures import nested_structures, numbers, read_structures, text
from .schema import UNLABELLED, DatasetError, LabelledImage, PersonSearchSet, Query

TREE = """\
<root>/Image/SSM/s1.jpg, s2.jpg, ...
<root>/annotation/Images.mat
<root>/annotation/pool.mat
<root>/annotation/test/train_test/Train.mat
<root>/annotation/test/train_test/TestG50.mat, TestG100.mat, ... TestG4000.mat
<root>/annotation/test/subset/Occlusion.mat, Resolution.mat    (for the subsets only)"""

GALLERY_SIZES = (50, 100, 500, 1000, 2000, 4000)

# The gallery size that stands for every test image but the query's own.
ALL_IMAGES = -1

# Subset -> its file and the variable in it.
SUBSETS = {"occlusion": ("Occlusion.mat", "Occlusion1"), "resolution": ("Resolution.mat", "Test_Size")}

Sighting = tuple[int, str, tuple[int, ...]]
"""A person's pid, an image, and the box xywh of the person in it."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ProtocolQuery:
    """One entry of a TestG file, as it stands there."""

    image: str
    box_xywh: NDArray[np.int64]
    """(4,)."""
    idname: str
    """Empty where the file does not tell."""
    gallery: Sequence[str]
    matches: Mapping[str, NDArray[np.int64]]
    """Gallery image -> (N, 4) xywh boxes of the person there."""


def load_cuhk_sysu(root: Path, *, gallery_size: int = 100, subset: str | None = None) -> PersonSearchSet:
    """Read CUHK-SYSU: 11,206 training and 6,978 test images, 2,900 queries.

    gallery_size: one of GALLERY_SIZES, images per query; or ALL_IMAGES.
    subset: "occlusion" (187 queries) or "resolution" (290 queries) with the galleries of their own files; None
    for all queries. Identities then still come from TestG<gallery_size>.mat.
    Training pids are the rows of Train.mat from 0; test pids follow, in the order of the queries. Annotated
    boxes without width or height are dropped. Gallery images that a file lists twice are kept once, and a
    query's own image leaves its gallery: this concerns 4 and 2 of the 2,900 queries of the released TestG100.
    Raises DatasetError for missing or contradicting files, ValueError for a wrong gallery_size or subset.
    """
    if gallery_size not in (*GALLERY_SIZES, ALL_IMAGES):
        raise ValueError(f"gallery_size must be one of {GALLERY_SIZES} or {ALL_IMAGES}, got {gallery_size}")
    if subset is not None and subset not in SUBSETS:
        raise ValueError(f"subset must be one of {sorted(SUBSETS)} or None, got {subset!r}")
    paths = _paths(root, gallery_size, subset)
    protocol = read_gallery_protocol(paths["protocol"])
    seen_in_training = list(_training_sightings(paths["train"]))
    num_train = 1 + max((pid for pid, _, _ in seen_in_training), default=-1)
    seen_in_test = list(_test_sightings(protocol, num_train))
    images = _read_images(root, paths["images"], [*seen_in_training, *seen_in_test])
    pool = [text_of(name) for name in read_mat(paths["pool"], ["pool"], TREE).ravel()]
    _require_named(pool, images, paths["images"])
    asked = protocol if subset is None else read_gallery_protocol(paths["asked"], key=SUBSETS[subset][1])
    test_index = {name: i for i, name in enumerate(pool)}
    _require_named((name for q in asked for name in (q.image, *q.gallery)), test_index, paths["pool"])
    by_name = {query.idname: pid for pid, query in enumerate(protocol, num_train)}
    pids = _query_pids(asked, seen_in_test, by_name, paths["asked"])
    is_full = gallery_size == ALL_IMAGES
    return PersonSearchSet(
        name="cuhk-sysu" if subset is None else f"cuhk-sysu-{subset}",
        train=[image for name, image in images.items() if name not in test_index],
        test=[images[name] for name in pool],
        queries=[_query(q, pid, test_index, is_full) for q, pid in zip(asked, pids, strict=True)],
    )


def read_gallery_protocol(path: Path, *, key: str | None = None) -> tuple[ProtocolQuery, ...]:
    """Read one TestG*.mat, or a subset's file, without the rest of the set.

    key: the variable in the file; None for the name of the file without its ending.
    The released TestG100.mat (2,900 queries of 100 images) takes 1.0 s of one CPU core and 70 MB, where
    scipy.io.loadmat alone takes 3.0 s and 310 MB (process_time, x86-64). Both grow with the gallery size.
    Raises DatasetError if the file is missing or is not such a file.
    """
    require(path, (), TREE)
    try:
        return tuple(_protocol_query(entry) for entry in read_structures(path, key or path.stem))
    except (ValueError, KeyError) as error:
        fail(path, f"must be an array of structures with Query and Gallery, got {error}", TREE)


def _protocol_query(entry: Mapping[str, bytes]) -> ProtocolQuery:
    [query] = nested_structures(entry["Query"])
    gallery = []
    matches: dict[str, list[NDArray[np.int64]]] = {}
    for row in nested_structures(entry["Gallery"]):
        gallery.append(name := text(row["imname"]))
        box = numbers(row["idlocate"])
        if box.size:  # the entries without the person hold a (1, 0) array
            matches.setdefault(name, []).append(_whole(box))
    return ProtocolQuery(
        image=text(query["imname"]),
        box_xywh=_whole(numbers(query["idlocate"])),
        idname=text(query["idname"]) if "idname" in query else "",
        gallery=tuple(gallery),
        matches={name: _distinct(found) for name, found in matches.items()},
    )


def _distinct(boxes: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """(N, 4): a gallery may list an image twice, with one box of the person or with two."""
    return np.array(boxes) if len(boxes) == 1 else np.unique(boxes, axis=0)


def _paths(root: Path, gallery_size: int, subset: str | None) -> dict[str, Path]:
    size = GALLERY_SIZES[0] if gallery_size == ALL_IMAGES else gallery_size
    relative = {
        "images": "annotation/Images.mat",
        "pool": "annotation/pool.mat",
        "train": "annotation/test/train_test/Train.mat",
        "protocol": f"annotation/test/train_test/TestG{size}.mat",
    }
    relative["asked"] = f"annotation/test/subset/{SUBSETS[subset][0]}" if subset else relative["protocol"]
    require(root, ["Image/SSM", *relative.values()], TREE)
    return {name: root / path for name, path in relative.items()}


def _require_named(names: Iterable[str], known: Mapping[str, object], path: Path) -> None:
    """Check that the file which gave the known names gave these, too. Raises DatasetError with the first."""
    if missing := sorted(set(names) - known.keys()):
        fail(path, f"must name every image of the other files, got none named {missing[0]}", TREE)


def _read_images(root: Path, path: Path, sightings: Sequence[Sighting]) -> dict[str, LabelledImage]:
    """Every image of Images.mat by its name, with the pids that the sightings tell."""
    boxes = _read_boxes(path)
    require_images((root / "Image/SSM" / name for name in boxes), TREE)
    _require_named((name for _, name, _ in sightings), boxes, path)
    pids = _attach_pids(boxes, sightings)
    return {
        name: LabelledImage(name, root / "Image/SSM" / name, _xyxy32(found), pids[name])
        for name, found in boxes.items()
    }


def _read_boxes(path: Path) -> dict[str, NDArray[np.int64]]:
    """Image -> (M, 4) xywh boxes with width and height, in the order of Images.mat."""
    images = read_mat(path, ["Img"], TREE).ravel()
    boxes = {}
    try:
        for name, people in zip(images["imname"], images["box"], strict=True):
            found = [_whole(box) for box in people.ravel()["idlocate"]] if people.size else []
            stacked = np.array(found, dtype=np.int64).reshape(-1, 4)
            boxes[text_of(name)] = stacked[(stacked[:, 2:] > 0).all(axis=1)]
    except (ValueError, IndexError, TypeError) as error:
        fail(path, f"must be an array of structures with imname and box, got {error}", TREE)
    return boxes


def _training_sightings(path: Path) -> Iterator[Sighting]:
    """Everyone of Train.mat, numbered from 0: a cell of structures, each with an array of scenes."""
    try:
        for pid, person in enumerate(read_mat(path, ["Train"], TREE).ravel()):
            scenes = person["scene"].ravel()[0].ravel()
            for name, box in zip(scenes["imname"], scenes["idlocate"], strict=True):
                if box.size:
                    yield pid, text_of(name), tuple(_whole(box).tolist())
    except DatasetError:
        raise
    except (ValueError, IndexError, TypeError) as error:
        fail(path, f"must be a cell of structures with scene, got {error}", TREE)


def _test_sightings(protocol: Iterable[ProtocolQuery], first_pid: int) -> Iterator[Sighting]:
    for pid, query in enumerate(protocol, first_pid):
        yield pid, query.image, tuple(query.box_xywh.tolist())
        for name, found in query.matches.items():
            yield from ((pid, name, tuple(box)) for box in found.tolist())


def _attach_pids(
    boxes: Mapping[str, NDArray[np.int64]], sightings: Iterable[Sighting]
) -> dict[str, NDArray[np.int64]]:
    """Image -> (M,) pids: a box gets the pid of the sighting with exactly its numbers, else UNLABELLED."""
    pids = {name: np.full(len(found), UNLABELLED, dtype=np.int64) for name, found in boxes.items()}
    num_lost = 0
    for pid, name, box in sightings:
        same = np.flatnonzero((boxes[name] == box).all(axis=1))
        pids[name][same[:1]] = pid
        num_lost += not same.size
    if num_lost:
        logger.warning("CUHK-SYSU: %d identities of a box are lost, for Images.mat lacks the box", num_lost)
    return pids


def _query_pids(
    asked: Sequence[ProtocolQuery], sightings: Iterable[Sighting], by_name: Mapping[str, int], path: Path
) -> list[int]:
    """The pid of each query of a file, by its box as anywhere in the set, or else by its idname."""
    by_box = {(name, box): pid for pid, name, box in sightings}
    pids = []
    for query in asked:
        pid = by_box.get((query.image, tuple(query.box_xywh.tolist())), by_name.get(query.idname))
        if pid is None:
            fail(path, f"must ask for people of the TestG file, got {query.idname!r} in {query.image}", TREE)
        pids.append(pid)
    return pids


def _query(entry: ProtocolQuery, pid: int, test_index: Mapping[str, int], is_full: bool) -> Query:
    own = entry.image
    listed = [test_index[name] for name in dict.fromkeys(entry.gallery) if name != own]
    if is_full:
        # Listed first, then each other image once. SeqNet's loader takes listed images a second time.
        is_other = np.ones(len(test_index), dtype=np.bool_)
        is_other[[*listed, test_index[own]]] = False
        listed = [*listed, *np.flatnonzero(is_other).tolist()]
    shown = {
        name: found[(found[:, 2:] > 0).all(axis=1)] for name, found in entry.matches.items() if name != own
    }
    return Query(
        image=test_index[own],
        box_xyxy=_xyxy32(entry.box_xywh),
        pid=pid,
        gallery=np.array(listed, dtype=np.int64),
        truth={test_index[name]: _xyxy32(found) for name, found in shown.items() if len(found)},
    )


def _whole(box: NDArray[Any]) -> NDArray[np.int64]:
    """(4,) of a MATLAB box in whatever integer type it was stored; int64, so that sums do not wrap around."""
    return np.asarray(box, dtype=np.int64).reshape(4)


def _xyxy32(boxes_xywh: NDArray[np.int64]) -> NDArray[np.float32]:
    return xyxy_from_xywh(boxes_xywh).astype(np.float32)
