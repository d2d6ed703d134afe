"""ReID sets of the city: crops of named people in folders, as the published sets have them.

Market-1501, DukeMTMC-reID, CUHK03-NP, MSMT17 and LUPerson; the raw files of CUHK03 are the business of cuhk03.py.
Everybody is shot several times by each of some neighbouring cameras; the first shot of a test identity by each
camera is a query, the others are the gallery.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .city import City, Style
from .writing import Plan, draw_all, write_image

Role = Literal["train", "query", "gallery"]

# Fewer would leave a query without a match in another camera.
_LEAST_SHOTS = 4
_MARKET_SIZE = (64, 128)
_DETECTED_SLACK = 0.09
# Share of the gallery that shows people outside of the set, and of false alarms, in Market-1501.
_DISTRACTOR_SHARE, _JUNK_SHARE = 0.15, 0.2

_NOBODY = -1


@dataclass(frozen=True)
class Shot:
    """One crop: who, by which camera, and which one of this camera's; all count from 0."""

    pid: int
    camera: int
    number: int
    role: Role


@dataclass(frozen=True)
class CropJob:
    """One crop to draw and where to put it."""

    shot: Shot
    path: Path
    size: tuple[int, int]
    """Width and height in pixels."""
    slack: float = 0.04


def crops_city(plan: Plan, style: Style) -> City:
    """Build the city of a ReID set. Its frames keep their size, whatever plan says: nobody sees them."""
    return City(plan.seed, num_train_people=plan.train_people, num_test_people=plan.test_people, style=style)


def shots_of(city: City, plan: Plan) -> list[Shot]:
    """List the shots of everybody, the train identities first, about plan.images of them."""
    each = max(plan.images // plan.people, _LEAST_SHOTS)
    num_cameras = min(len(city.cameras), each // 2)
    shots = []
    for pid in range(len(city.people)):
        for turn in range(each):
            number, place = divmod(turn, num_cameras)
            role: Role = "train" if pid < city.num_train_people else "gallery" if number else "query"
            shots.append(Shot(pid, (pid + place) % len(city.cameras), number, role))
    return shots


def draw_crop(city: City, job: CropJob) -> None:
    """Draw and write one crop."""
    shot = job.shot
    if shot.pid == _NOBODY:
        image = city.background_crop(shot.camera, shot.number, size=job.size)
    else:
        image = city.crop(shot.pid, shot.camera, shot.number, size=job.size, slack=job.slack)
    write_image(job.path, image, jpeg_quality=city.style.jpeg_quality)


_FOLDERS: dict[Role, str] = {
    "train": "bounding_box_train",
    "query": "query",
    "gallery": "bounding_box_test",
}


def _jobs(root: Path, shots: Sequence[Shot], name: Callable[[Shot], str]) -> list[CropJob]:
    """Put crops into the three folders of Market-1501."""
    return [CropJob(shot, root / _FOLDERS[shot.role] / name(shot), _MARKET_SIZE) for shot in shots]


def write_market1501(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as Market-1501 is released: 0002_c1s1_000451_03.jpg is identity 2 before camera 1.

    Identities count from 1. The gallery also holds 0000, people outside of the set, and -1, false alarms.
    """
    city = crops_city(plan, style)
    shots = shots_of(city, plan)
    num_gallery = sum(shot.role == "gallery" for shot in shots)
    for number in range(max(2, round(_DISTRACTOR_SHARE * num_gallery))):
        shots.append(Shot(len(city.people) + number, number % len(city.cameras), number, "gallery"))
    for number in range(max(2, round(_JUNK_SHARE * num_gallery))):
        shots.append(Shot(_NOBODY, number % len(city.cameras), number, "gallery"))

    def name(shot: Shot) -> str:
        label = "-1" if shot.pid == _NOBODY else f"{(shot.pid + 1) * (shot.pid < len(city.people)):04d}"
        frame = 25 * max(shot.pid, 0) + shot.number + 1
        return f"{label}_c{shot.camera + 1}s1_{frame:06d}_{shot.number % 100:02d}.jpg"

    draw_all(city, draw_crop, _jobs(root, shots, name), plan)


def write_dukemtmc(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as DukeMTMC-reID is released: 0001_c2_f0046182.jpg; identities count from 1."""
    city = crops_city(plan, style)

    def name(shot: Shot) -> str:
        return f"{shot.pid + 1:04d}_c{shot.camera + 1}_f{100 * shot.pid + shot.number:07d}.jpg"

    draw_all(city, draw_crop, _jobs(root, shots_of(city, plan), name), plan)


def write_cuhk03_np(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as CUHK03-NP is released: {detected,labeled}/ with the same people as PNG, 0001_c1_1.png.

    Boxes of a detector are looser than those that people have drawn.
    """
    city = crops_city(plan, style)
    shots = shots_of(city, plan)

    def name(shot: Shot) -> str:
        return f"{shot.pid + 1:04d}_c{shot.camera + 1}_{shot.number + 1}.png"

    labeled = _jobs(root / "labeled", shots, name)
    detected = [
        CropJob(job.shot, job.path, job.size, _DETECTED_SLACK)
        for job in _jobs(root / "detected", shots, name)
    ]
    draw_all(city, draw_crop, [*labeled, *detected], plan)


def write_msmt17(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as MSMT17 is released: {train,test}/<pid>/*.jpg, and lists of "path label" with labels from 0.

    Camera numbers have two digits and are the third field of a name. One shot of a train identity is in
    list_val.txt instead of list_train.txt.
    """
    city = crops_city(plan, style)
    jobs: list[CropJob] = []
    lists: dict[str, list[str]] = {"train": [], "val": [], "query": [], "gallery": []}
    shots = shots_of(city, plan)
    counts: dict[int, int] = {}
    for shot, following in zip(shots, [*shots[1:], None], strict=True):
        is_train = shot.role == "train"
        label = shot.pid if is_train else shot.pid - city.num_train_people
        count = counts[shot.pid] = counts.get(shot.pid, -1) + 1
        time = ("0113morning", "0302noon", "0303afternoon")[shot.number % 3]
        path = f"{label:04d}/{label:04d}_{count:03d}_{shot.camera + 1:02d}_{time}_{shot.number:04d}_0.jpg"
        is_last = following is None or following.pid != shot.pid
        lists["val" if is_train and is_last else shot.role].append(f"{path} {label}\n")
        jobs.append(CropJob(shot, root / ("train" if is_train else "test") / path, (96, 192)))
    draw_all(city, draw_crop, jobs, plan)
    for part, lines in lists.items():
        (root / f"list_{part}.txt").write_text("".join(lines), encoding="ascii")


def write_luperson(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as LUPerson is released, which labels nobody: JPEG in lmdb/, its keys in keys.pkl.

    The same crops lie in images/, as <key>.jpg. A key is country, city, video and frame: CC_cc_VVVV_FFFFFFFF.
    """
    import lmdb

    city = crops_city(plan, style)
    keys, jobs = [], []
    for shot in shots_of(city, plan):
        country, town = divmod(shot.camera, 4)
        keys.append(f"{country:02d}_{town:02d}_{shot.camera:04d}_{1000 * shot.pid + shot.number:08d}")
        jobs.append(CropJob(shot, root / "images" / f"{keys[-1]}.jpg", _MARKET_SIZE))
    draw_all(city, draw_crop, jobs, plan)
    paths = [job.path for job in jobs]
    size = sum(path.stat().st_size for path in paths)
    room = 2 * size + 4096 * (len(paths) + 64)
    with lmdb.open(str(root / "lmdb"), map_size=room) as store, store.begin(write=True) as transaction:
        for key, path in zip(keys, paths, strict=True):
            transaction.put(key.encode(), path.read_bytes())
    (root / "keys.pkl").write_bytes(pickle.dumps({"keys": keys}))
