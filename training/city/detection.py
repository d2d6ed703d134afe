"""Detection sets of the city in the files of CrowdHuman and EuroCity Persons: boxes, and nobody has a name.

The city knows the extent of whole people only. Where a format asks for more, it gets a share of the box: the
visible part of somebody half hidden is the upper half, a head the middle of the top.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

from .city import City, Split, Style
from .person_search import FrameJob, Scene, draw_frame, split_of
from .writing import TRAIN_SHARE, Plan, draw_all, write_json

MASK_VISIBILITY = 0.4
"""Below this share of a person that is seen CrowdHuman has a mask to be ignored instead of a person."""

# Tags of EuroCity Persons: the share that is hidden, in percent, from the largest.
_OCCLUSION_TAGS = (80, 40, 10)
_NIGHT_SHARE = 0.2
_TOWNS = ("amsterdam", "barcelona", "budapest", "dresden", "lyon", "torino", "wuerzburg", "zagreb")


def _strangers(plan: Plan, style: Style) -> City:
    """Build a city where nobody has a name."""
    return City(
        plan.seed,
        num_train_people=0,
        num_test_people=0,
        style=style,
        width=plan.width,
        height=plan.height,
    )


def write_crowdhuman(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as CrowdHuman is released: Images/<ID>.jpg, annotation_train.odgt and annotation_val.odgt."""
    jobs = []
    for position in range(plan.images):
        name = f"{273271 + position},{zlib.crc32(f'{plan.seed} {position}'.encode()):08x}"
        jobs.append(FrameJob(*split_of(plan, position), name, root / "Images" / f"{name}.jpg"))
    scenes = draw_all(_strangers(plan, style), draw_frame, jobs, plan)
    parts: tuple[tuple[str, Split], ...] = (("train", "train"), ("val", "test"))
    for part, split in parts:
        lines = [json.dumps(_odgt(scene)) + "\n" for scene in scenes if scene.split == split]
        (root / f"annotation_{part}.odgt").write_text("".join(lines), encoding="utf-8")


def _odgt(scene: Scene) -> dict:
    """Give one line of an odgt file."""
    people = []
    for row, (x, y, w, h) in enumerate(scene.boxes_xywh.astype(int).tolist()):
        visibility = float(scene.visibility[row])
        is_mask = visibility < MASK_VISIBILITY
        people.append(
            {
                "tag": "mask" if is_mask else "person",
                "fbox": [x, y, w, h],
                "vbox": [x, y, w, max(1, round(visibility * h))],
                "hbox": [x + int(0.3 * w), y, max(1, int(0.4 * w)), max(1, int(0.15 * h))],
                "head_attr": {"ignore": int(is_mask), "occ": 0, "unsure": 0},
                "extra": {"box_id": row, "occ": int(visibility < 0.9), **({"ignore": 1} if is_mask else {})},
            }
        )
    return {"ID": scene.name, "gtboxes": people}


def write_eurocity(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as EuroCity Persons is released: PNG frames and JSON, {day,night}/{img,labels}/{train,val}/.

    root: the folder that the release calls ECP. A fifth of the frames show the night; a camera of the city
    stands for a town.
    """
    num_night = max(1, round(_NIGHT_SHARE * plan.images))
    num_day = plan.images - num_night
    night = replace(style, name=f"{style.name}-night", gain=0.45 * style.gain, noise_sigma=6.0)
    _write_ecp(root / "day", plan, style, range(num_day))
    _write_ecp(root / "night", plan, night, range(num_day, plan.images))


def _write_ecp(root: Path, plan: Plan, style: Style, positions: range) -> None:
    """Write one time of the day: some of the frames of the whole set."""
    city = _strangers(plan, style)
    num_train = round(TRAIN_SHARE * len(positions))
    jobs = []
    for number in range(len(positions)):
        split: Split = "train" if number < num_train else "test"
        part = "train" if split == "train" else "val"
        town = _TOWNS[city.cast(split, number)[0] % len(_TOWNS)]
        name = f"{part}/{town}/{town}_{number:05d}"
        jobs.append(FrameJob(split, number, name, root / "img" / f"{name}.png"))
    ahead = replace(plan, report=lambda done, _: plan.report(positions.start + done, plan.images))
    for scene in draw_all(city, draw_frame, jobs, ahead):
        write_json(root / "labels" / f"{scene.name}.json", _ecp_frame(scene, plan))


def _ecp_frame(scene: Scene, plan: Plan) -> dict:
    """Give the content of the JSON file of one frame."""
    people = []
    for (left, top, right, bottom), seen in zip(
        scene.boxes_xyxy.astype(int).tolist(), scene.visibility.tolist(), strict=True
    ):
        box = {"x0": left, "y0": top, "x1": right, "y1": bottom}
        people.append({"identity": "pedestrian", **box, "tags": _occlusion_tags(seen), "children": []})
    size = {"imagewidth": plan.width, "imageheight": plan.height}
    return {"identity": "frame", **size, "tags": [], "children": people}


def _occlusion_tags(visibility: float) -> list[str]:
    hidden = 100 * (1 - visibility)
    return next(([f"occluded>{percent}"] for percent in _OCCLUSION_TAGS if hidden > percent), [])
