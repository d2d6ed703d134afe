"""Person-search sets of the city: what all of them share, and the writers of PRW and PoseTrack21.

CUHK-SYSU has a module of its own, cuhk_sysu.py. Beside the published files every set holds `truth.npz`, the
perfect teacher, with one row for every box of every image, named or not:

    names       (N,) str: the images, as the annotation files call them, training images first
    offsets     (N + 1,) int64: the boxes of image i are the rows offsets[i] .. offsets[i + 1] - 1 (CSR)
    boxes_xyxy  (T, 4) float32: pixels, whole numbers, in the order in which the annotation file lists them
    embeddings  (T, E) float32: unit vectors, people.appearance_code
    pids        (T,) int64: identity as the annotation files number it, UNLABELLED for strangers
    visibility  (T,) float32: share of the person that is neither hidden nor cut off

Legend: N images, T boxes of all images, M boxes of one image, E length of an appearance code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..datasets.schema import UNLABELLED
from .city import City, Split, Style
from .writing import Plan, cell, draw_all, write_image, write_json, write_mat

GOOD_VISIBILITY = 0.75
"""From which share of a person that is seen a box may be a query."""
_GOOD_HEIGHT = 0.12


@dataclass(frozen=True)
class Scene:
    """One written frame and the people in it."""

    name: str
    """As the annotation files call it."""
    split: Split
    camera: int
    boxes_xyxy: np.ndarray
    """float32 (M, 4), whole pixels."""
    pids: np.ndarray
    """int64 (M,), as the annotation files number them, or UNLABELLED."""
    embeddings: np.ndarray
    """float32 (M, E)."""
    visibility: np.ndarray
    """float32 (M,)."""

    @property
    def boxes_xywh(self) -> np.ndarray:
        """float64 (M, 4)."""
        boxes = self.boxes_xyxy.astype(np.float64)
        return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


@dataclass(frozen=True)
class FrameJob:
    """One frame to draw and where to put it."""

    split: Split
    index: int
    name: str
    path: Path


def draw_frame(city: City, job: FrameJob) -> Scene:
    """Draw and write one frame. The pids are those of the city."""
    labelled = city.frame(job.split, job.index)
    write_image(job.path, labelled.image, jpeg_quality=city.style.jpeg_quality)
    camera = city.cast(job.split, job.index)[0]
    return Scene(
        job.name,
        job.split,
        camera,
        labelled.boxes_xyxy,
        labelled.pids,
        labelled.embeddings,
        labelled.visibility,
    )


def split_of(plan: Plan, position: int) -> tuple[Split, int]:
    """Give split and index of the frame at a position in the whole set; training frames come first."""
    if position < plan.train_images:
        return "train", position
    return "test", position - plan.train_images


def city_of(plan: Plan, style: Style) -> City:
    """Build the city that a set shows."""
    return City(
        plan.seed,
        num_train_people=plan.train_people,
        num_test_people=plan.test_people,
        style=style,
        width=plan.width,
        height=plan.height,
    )


def renumbered(scenes: Sequence[Scene], first: int) -> list[Scene]:
    """Count named people from first instead of 0."""
    return [
        replace(scene, pids=np.where(scene.pids == UNLABELLED, UNLABELLED, scene.pids + first))
        for scene in scenes
    ]


def write_truth(path: Path, scenes: Sequence[Scene]) -> None:
    """Write truth.npz as the docstring of this module tells."""
    offsets = np.cumsum([0, *[len(scene.pids) for scene in scenes]], dtype=np.int64)
    np.savez(
        path,
        names=np.array([scene.name for scene in scenes]),
        offsets=offsets,
        boxes_xyxy=np.concatenate([scene.boxes_xyxy for scene in scenes]),
        embeddings=np.concatenate([scene.embeddings for scene in scenes]),
        pids=np.concatenate([scene.pids for scene in scenes]),
        visibility=np.concatenate([scene.visibility for scene in scenes]),
    )


def appearances(scenes: Sequence[Scene], split: Split) -> dict[int, list[tuple[int, int]]]:
    """List where everybody with a name is seen in a split: pid -> (scene, row of the box)."""
    found: dict[int, list[tuple[int, int]]] = {}
    for number, scene in enumerate(scenes):
        if scene.split == split:
            for row in np.flatnonzero(scene.pids != UNLABELLED):
                found.setdefault(int(scene.pids[row]), []).append((number, int(row)))
    return dict(sorted(found.items()))


def query_boxes(scenes: Sequence[Scene], plan: Plan, *, per_camera: bool) -> list[tuple[int, int]]:
    """Choose good views of every test identity as (scene, row): its first one, or its first of each camera."""
    chosen: list[tuple[int, int]] = []
    for places in appearances(scenes, "test").values():
        good = [place for place in places if _is_good(scenes[place[0]], place[1], plan.height)]
        firsts: dict[int, tuple[int, int]] = {}
        for place in good:
            firsts.setdefault(scenes[place[0]].camera if per_camera else 0, place)
        chosen += firsts.values()
    return chosen


def _is_good(scene: Scene, row: int, height: int) -> bool:
    tall = scene.boxes_xyxy[row, 3] - scene.boxes_xyxy[row, 1]
    return bool(scene.visibility[row] >= GOOD_VISIBILITY and tall >= _GOOD_HEIGHT * height)


def write_prw(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as PRW is released: frames, one MAT file a frame, frame lists, and query_info.txt.

    Training identities are 1 .. train_people, test identities follow; -2 marks people without a name.
    """
    city = city_of(plan, style)
    jobs = []
    for position in range(plan.images):
        split, index = split_of(plan, position)
        name = f"c{city.cast(split, index)[0] + 1}s1_{position + 1:06d}.jpg"
        jobs.append(FrameJob(split, index, name, root / "frames" / name))
    scenes = renumbered(draw_all(city, draw_frame, jobs, plan), 1)
    for scene in scenes:
        pids = np.where(scene.pids == UNLABELLED, -2, scene.pids).astype(np.float64)
        rows = np.concatenate([pids[:, None], scene.boxes_xywh], axis=1)
        write_mat(root / "annotations" / f"{scene.name}.mat", {"box_new": rows})
    splits: tuple[Split, ...] = ("train", "test")
    for split in splits:
        names = [scene.name.removesuffix(".jpg") for scene in scenes if scene.split == split]
        write_mat(root / f"frame_{split}.mat", {f"img_index_{split}": cell(names)})
        pids = np.array([list(appearances(scenes, split))], np.float64)
        write_mat(root / f"ID_{split}.mat", {f"ID_{split}": pids})
    _write_prw_queries(root, scenes, plan)
    write_truth(root / "truth.npz", scenes)


def _write_prw_queries(root: Path, scenes: Sequence[Scene], plan: Plan) -> None:
    """Write the queries, "pid x y w h frame" with the line ends of the release."""
    lines = []
    for number, row in query_boxes(scenes, plan, per_camera=True):
        scene = scenes[number]
        box = " ".join(f"{value:.2f}" for value in scene.boxes_xywh[row])
        lines.append(f"{scene.pids[row]} {box} {scene.name.removesuffix('.jpg')}\r\n")
    (root / "query_info.txt").write_text("".join(lines), encoding="ascii", newline="")


def write_posetrack21(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as PoseTrack21 person search is released: a sequence for each camera and split, and JSON.

    The city knows no joints: keypoints are 51 zeros, which is "not labelled", and bbox_head is a share of the
    box. Identities count from 0; person_id is -1 for people without a name.
    """
    city = city_of(plan, style)
    jobs: list[FrameJob] = []
    lengths: dict[str, int] = {}
    for position in range(plan.images):
        split, index = split_of(plan, position)
        folder = "train" if split == "train" else "val"
        number = city.cast(split, index)[0] + 1 + (0 if split == "train" else len(city.cameras))
        sequence = f"images/{folder}/{number:06d}_city_{folder}"
        name = f"{sequence}/{lengths.setdefault(sequence, 0):06d}.jpg"
        lengths[sequence] += 1
        jobs.append(FrameJob(split, index, name, root / name))
    scenes = draw_all(city, draw_frame, jobs, plan)
    annotated = root / "posetrack_person_search"
    train, val = ([s for s in scenes if s.split == split] for split in ("train", "test"))
    write_json(annotated / "train.json", _coco(train, lengths))
    coco = _coco(val, lengths)
    write_json(annotated / "val.json", coco)
    chosen = {
        100 * _image_id(scenes[number]) + row for number, row in query_boxes(scenes, plan, per_camera=False)
    }
    queries = [one for one in coco["annotations"] if one["id"] in chosen]
    kept = {one["image_id"] for one in queries}
    images = [image for image in coco["images"] if image["id"] in kept]
    write_json(annotated / "query.json", {**coco, "images": images, "annotations": queries})
    write_truth(root / "truth.npz", scenes)


def _coco(scenes: Sequence[Scene], lengths: dict[str, int]) -> dict[str, list]:
    """Give the content of a COCO-like file, with the additional keys of PoseTrack21."""
    images, annotations = [], []
    for scene in scenes:
        sequence, image_id = scene.name.rsplit("/", 1)[0], _image_id(scene)
        images.append(
            {
                "id": image_id,
                "file_name": scene.name,
                "vid_id": sequence.rsplit("/", 1)[1][:6],
                "frame_id": image_id,
                "nframes": lengths[sequence],
                "is_labeled": True,
                "has_labeled_person": bool((scene.pids != UNLABELLED).any()),
                "ignore_regions_x": [],
                "ignore_regions_y": [],
            }
        )
        annotations += _coco_people(scene, image_id)
    categories = [{"id": 1, "name": "person", "supercategory": "person"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def _image_id(scene: Scene) -> int:
    """Give a number without leading zeros from sequence and frame; boxes count in hundreds of it."""
    _, sequence, frame = scene.name.rsplit("/", 2)
    return int(f"1{sequence[:6]}{frame.removesuffix('.jpg')}")


def _coco_people(scene: Scene, image_id: int) -> list[dict]:
    """Give one annotation a person; a stranger has a track of their own."""
    people = []
    for row, (x, y, w, h) in enumerate(scene.boxes_xywh.tolist()):
        pid = int(scene.pids[row])
        people.append(
            {
                "id": image_id * 100 + row,
                "image_id": image_id,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "bbox_head": [x + 0.3 * w, y, 0.4 * w, 0.15 * h],
                "keypoints": [0] * 51,
                "person_id": pid,
                "track_id": pid if pid != UNLABELLED else image_id * 100 + row,
            }
        )
    return people
