"""PoseTrack21 person search: 42,861 training and 19,935 test frames of videos, no cameras.

Source: Doering et al., "PoseTrack21: A Dataset for Person Search, Multi-Object Tracking and Multi-Person Pose
Tracking" (CVPR 2022), and the description of its files at github.com/anDoer/PoseTrack21. The release names no
evaluation protocol; this is that of PRW without cameras.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .boxes import is_wide, rows, xyxy_from_xywh
from .files import fail, read_json, require, require_images
from .schema import UNLABELLED, DatasetError, LabelledImage, PersonSearchSet, Query, boxes_by_pid

TREE = """\
<root>/images/train/000001_bonn_train/000000.jpg, ...
<root>/images/val/<sequence>/<frame>.jpg, ...
<root>/posetrack_person_search/train.json
<root>/posetrack_person_search/val.json
<root>/posetrack_person_search/query.json"""


def load_posetrack21(root: Path) -> PersonSearchSet:
    """Read PoseTrack21 person search; the test images are those of val.json, the queries those of query.json.

    Each annotation of query.json is a query, searched in all other test images; in an image that shows its
    person twice, both boxes are true. Training ids become 0, 1, ... in the order of their numbers; test ids
    follow, whatever their numbers, for no person is in both halves. Ignored regions are the boxes around the
    polygons of the release.
    Raises DatasetError for missing or contradicting files.
    """
    folder = root / "posetrack_person_search"
    halves = ("train", "val", "query")
    require(root, [f"posetrack_person_search/{half}.json" for half in halves], TREE)
    train, val, asked = (_read(folder / f"{half}.json") for half in halves)
    train_pids = _renumber(train, 0)
    test_pids = _renumber(val, len(train_pids))
    train_images, test_images = _labelled(root, train, train_pids), _labelled(root, val, test_pids)
    require_images((image.path for image in (*train_images, *test_images)), TREE)
    queries = _queries(asked, test_images, test_pids, folder / "query.json")
    return PersonSearchSet("posetrack21", train_images, test_images, queries)


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not {"images", "annotations"} <= content.keys():
        fail(path, "must hold images and annotations, got something else", TREE)
    return content


def _renumber(content: Mapping[str, Any], first_pid: int) -> dict[int, int]:
    ids = {_person(annotation) for annotation in content["annotations"]} - {UNLABELLED}
    return {person: pid for pid, person in enumerate(sorted(ids), first_pid)}


def _person(annotation: Mapping[str, Any]) -> int:
    person = annotation.get("person_id")
    return UNLABELLED if person is None or person < 0 else int(person)


def _labelled(root: Path, content: Mapping[str, Any], pids: Mapping[int, int]) -> list[LabelledImage]:
    people: dict[int, list[tuple[int, Sequence[float]]]] = defaultdict(list)
    for annotation in content["annotations"]:
        pid = pids.get(_person(annotation), UNLABELLED)
        people[annotation["image_id"]].append((pid, annotation["bbox"]))
    images = []
    for record in content["images"]:
        found = people[record["id"]]
        boxes = xyxy_from_xywh(rows([box for _, box in found]))
        is_real = is_wide(boxes)
        images.append(
            LabelledImage(
                name=record["file_name"],
                path=root / record["file_name"],
                boxes_xyxy=boxes[is_real].astype(np.float32),
                pids=np.array([pid for pid, _ in found], dtype=np.int64)[is_real],
                ignored_xyxy=_ignored(record),
            )
        )
    return images


def _ignored(record: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Boxes around the polygons of an image; the release keeps their x and y in two lists of lists."""
    polygons = zip(record.get("ignore_regions_x") or (), record.get("ignore_regions_y") or (), strict=True)
    boxes = rows([[min(x), min(y), max(x), max(y)] for x, y in polygons if len(x) > 2])
    boxes = boxes[is_wide(boxes)]
    return boxes.astype(np.float32) if len(boxes) else None


def _queries(
    asked: Mapping[str, Any], test: Sequence[LabelledImage], pids: Mapping[int, int], path: Path
) -> list[Query]:
    index = {image.name: i for i, image in enumerate(test)}
    names = {record["id"]: record["file_name"] for record in asked["images"]}
    truth = boxes_by_pid(test)
    queries = []
    for annotation in asked["annotations"]:
        name, person = names.get(annotation["image_id"]), _person(annotation)
        if name not in index or person not in pids:
            raise DatasetError(f"{path} must ask for people and images of val.json, got {person} in {name}")
        own, pid = index[name], pids[person]
        queries.append(
            Query(
                image=own,
                box_xyxy=xyxy_from_xywh(annotation["bbox"]).astype(np.float32),
                pid=pid,
                gallery=np.delete(np.arange(len(test), dtype=np.int64), own),
                truth={i: boxes for i, boxes in truth.get(pid, {}).items() if i != own},
            )
        )
    return queries
