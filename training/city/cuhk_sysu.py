"""A person-search set of the city in the files of CUHK-SYSU: frames, and MAT structs that name people by boxes.

Identities are attached by equal boxes: Images.mat lists all boxes of a frame without names, Train.mat and the
TestG files list the named ones. truth.npz is told in person_search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .city import Style
from .person_search import (
    FrameJob,
    Scene,
    appearances,
    city_of,
    draw_frame,
    query_boxes,
    split_of,
    write_truth,
)
from .writing import Plan, cell, draw_all, struct, write_mat

GALLERY_SIZES = (50, 100, 500, 1000, 2000, 4000)
"""Rows of a query's gallery in each protocol; a set with fewer test frames has as many as it can."""

_HARD_VISIBILITY = 0.5
# The subsets of hard queries hold this share of the test identities, as in the release.
_SUBSET_SHARE = 0.1
_SCENE_FIELDS = ("imname", "idlocate", "ishard")
_NO_BOX = np.zeros((1, 0))

Place = tuple[int, int]
"""A scene, and the row of a box in it."""


def write_cuhk_sysu(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as CUHK-SYSU is released. Identities are 0 .. people - 1, named p1, p2, ...

    Truth rows come first in a gallery, and there all of them are: a gallery has more rows than its
    protocol's number where somebody is seen in more than half of it.
    """
    city = city_of(plan, style)
    jobs = []
    for position in range(plan.images):
        name = f"s{position + 1}.jpg"
        jobs.append(FrameJob(*split_of(plan, position), name, root / "Image" / "SSM" / name))
    scenes = draw_all(city, draw_frame, jobs, plan)
    annotation = root / "annotation"
    write_mat(annotation / "Images.mat", {"Img": _all_boxes(scenes)})
    test = [scene.name for scene in scenes if scene.split == "test"]
    write_mat(annotation / "pool.mat", {"pool": cell(test)})
    train = [_person(scenes, pid, places) for pid, places in appearances(scenes, "train").items()]
    write_mat(annotation / "test" / "train_test" / "Train.mat", {"Train": cell(train)})
    _write_person(annotation / "Person.mat", scenes)
    _write_protocols(annotation / "test", scenes, plan)
    write_truth(root / "truth.npz", scenes)


def _all_boxes(scenes: Sequence[Scene]) -> np.ndarray:
    rows = []
    for scene in scenes:
        boxes = [_box(scene, row) for row in range(len(scene.pids))]
        rows.append((scene.name, _number(len(boxes)), struct(("idlocate", "ishard"), boxes)))
    return struct(("imname", "nAppear", "box"), rows)


def _person(scenes: Sequence[Scene], pid: int, places: list[Place]) -> np.ndarray:
    """Give the struct of one identity: everywhere this person is seen."""
    seen = struct(_SCENE_FIELDS, [_located(scenes, place) for place in places])
    return struct(("idname", "nAppear", "scene"), [(_idname(pid), _number(len(places)), seen)])


def _write_person(path: Path, scenes: Sequence[Scene]) -> None:
    everybody = {**appearances(scenes, "train"), **appearances(scenes, "test")}
    people = [_person(scenes, pid, places)[0, 0].item() for pid, places in everybody.items()]
    write_mat(path, {"Person": struct(("idname", "nAppear", "scene"), people)})


def _write_protocols(folder: Path, scenes: Sequence[Scene], plan: Plan) -> None:
    """Write the galleries of every size, and the two subsets of hard queries."""
    searches = _searches(scenes, query_boxes(scenes, plan, per_camera=False), plan.seed)
    num_test = plan.images - plan.train_images
    for size in GALLERY_SIZES:
        if size > 100 and size >= num_test:
            break
        protocol = struct(("Query", "Gallery"), [one.structs(scenes, size) for one in searches])
        write_mat(folder / "train_test" / f"TestG{size}.mat", {f"TestG{size}": protocol})
    hidden = _searches(scenes, _hardest(scenes, _visibility), plan.seed)
    rows = [(*one.structs(scenes, 100), _number(1 - _visibility(scenes, one.query))) for one in hidden]
    occlusion = struct(("Query", "Gallery", "occlusion"), rows)
    write_mat(folder / "subset" / "Occlusion.mat", {"Occlusion1": occlusion})
    small = _searches(scenes, _hardest(scenes, _area), plan.seed)
    resolution = struct(("Query", "Gallery"), [one.structs(scenes, 100) for one in small])
    write_mat(folder / "subset" / "Resolution.mat", {"Test_Size": resolution})


@dataclass(frozen=True)
class _Search:
    """A query, everywhere else this person is, and the other test frames in random order."""

    query: Place
    truth: list[Place]
    others: list[int]

    def structs(self, scenes: Sequence[Scene], size: int) -> tuple[np.ndarray, np.ndarray]:
        """Give the structs of the query and of a gallery; a smaller one is the beginning of a larger one."""
        rows = [_located(scenes, place) for place in self.truth]
        num_others = max(size - len(rows), size // 2)
        rows += [(scenes[number].name, _NO_BOX, _NO_BOX) for number in self.others[:num_others]]
        query = (*_located(scenes, self.query), _idname(_pid(scenes, self.query)))
        return struct((*_SCENE_FIELDS, "idname"), [query]), struct(_SCENE_FIELDS, rows)


def _searches(scenes: Sequence[Scene], queries: Sequence[Place], seed: int) -> list[_Search]:
    everywhere = appearances(scenes, "test")
    pool = [number for number, scene in enumerate(scenes) if scene.split == "test"]
    found = []
    for query in queries:
        pid = _pid(scenes, query)
        with_person = {number for number, _ in everywhere[pid]}
        others = np.array([number for number in pool if number not in with_person], np.int64)
        shuffled = np.random.default_rng([seed, pid]).permutation(others).tolist()
        truth = [place for place in everywhere[pid] if place[0] != query[0]]
        found.append(_Search(query, truth, shuffled))
    return found


def _hardest(scenes: Sequence[Scene], measure: Callable[[Sequence[Scene], Place], float]) -> list[Place]:
    """Choose those test identities that have the boxes with the smallest measure, and these boxes."""
    worst = [
        min(places, key=lambda place: measure(scenes, place))
        for places in appearances(scenes, "test").values()
    ]
    worst.sort(key=lambda place: measure(scenes, place))
    return worst[: max(2, round(_SUBSET_SHARE * len(worst)))]


def _visibility(scenes: Sequence[Scene], place: Place) -> float:
    return float(scenes[place[0]].visibility[place[1]])


def _area(scenes: Sequence[Scene], place: Place) -> float:
    return float(np.prod(scenes[place[0]].boxes_xywh[place[1], 2:]))


def _pid(scenes: Sequence[Scene], place: Place) -> int:
    return int(scenes[place[0]].pids[place[1]])


def _idname(pid: int) -> str:
    return f"p{pid + 1}"


def _located(scenes: Sequence[Scene], place: Place) -> tuple[str, np.ndarray, np.ndarray]:
    """Give image name, box and ishard of one appearance."""
    scene = scenes[place[0]]
    return scene.name, *_box(scene, place[1])


def _box(scene: Scene, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Give idlocate (1, 4) xywh and ishard of one box."""
    return scene.boxes_xywh[row : row + 1], _number(scene.visibility[row] < _HARD_VISIBILITY)


def _number(value: float) -> np.ndarray:
    return np.array([[float(value)]])
