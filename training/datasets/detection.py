"""Detection sets for pre-training: CrowdHuman and EuroCity Persons. Nobody in them is named.

Sources: Shao et al., "CrowdHuman: A Benchmark for Detecting Human in a Crowd" (arXiv:1805.00123); Braun et al.,
"EuroCity Persons: A Novel Benchmark for Person Detection in Traffic Scenes" (TPAMI 2019) and its evaluation code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, UnidentifiedImageError

from .boxes import MIN_SIDE_PX, clip, is_wide, rows, xyxy_from_xywh
from .files import fail, list_files, read_json, require, require_images
from .schema import UNLABELLED, DatasetError, DetectionSet, LabelledImage

CROWDHUMAN_TREE = """\
<root>/Images/273271,c9db000d5146c15.jpg, ...
<root>/annotation_train.odgt
<root>/annotation_val.odgt"""

EUROCITY_TREE = """\
<root>/day/img/train/<city>/<city>_00000.png, ...
<root>/day/img/val/<city>/...
<root>/day/labels/train/<city>/<city>_00000.json, ...
<root>/day/labels/val/<city>/...
<root>/night/...    (the same, for time="night")"""

# The widest setting of the benchmark ("all") ignores people of whom at least this much is hidden.
EUROCITY_MAX_HIDDEN_PERCENT = 80

# People that are hard to tell from the background. The benchmark ignores the first two, and discards depictions.
EUROCITY_IGNORED_TAGS = frozenset({"sitting-lying", "behind-glass", "depiction", "reflection"})


def load_crowdhuman(root: Path) -> DetectionSet:
    """Read CrowdHuman: 15,000 training and 4,370 validation images.

    Boxes are the full bodies, clipped to the image; those with a side under MIN_SIDE_PX then are dropped. Masks
    and people that the release marks to be ignored are ignored regions. Opens each image to learn its size.
    Raises DatasetError for missing or damaged files.
    """
    require(root, ["Images", "annotation_train.odgt", "annotation_val.odgt"], CROWDHUMAN_TREE)
    train, test = (_read_odgt(root, root / f"annotation_{half}.odgt") for half in ("train", "val"))
    return DetectionSet("crowdhuman", train, test)


def load_eurocity_persons(
    root: Path, *, time: Literal["day", "night"] = "day", riders: bool = False
) -> DetectionSet:
    """Read EuroCity Persons: 21,795 training images by day; its val images are the test images here.

    riders: count riders as people, instead of as ignored regions.
    Kept are pedestrians. Everything else that is annotated (groups, riders, vehicles) is an ignored region, and
    so is a person behind glass, on a poster, sitting, or hidden by EUROCITY_MAX_HIDDEN_PERCENT or more.
    Boxes are clipped to the image; those with a side under MIN_SIDE_PX then are dropped.
    Raises DatasetError for missing or damaged files, ValueError for another time.
    """
    if time not in ("day", "night"):
        raise ValueError(f"time must be day or night, got {time!r}")
    kept = frozenset({"pedestrian", "rider"} if riders else {"pedestrian"})
    train, test = (_read_eurocity(root, f"{time}/labels/{half}", kept) for half in ("train", "val"))
    require_images((image.path for image in (*train, *test)), EUROCITY_TREE)
    return DetectionSet(f"eurocity-{time}", train, test)


def _read_odgt(root: Path, path: Path) -> list[LabelledImage]:
    """One JSON object a line."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = [read_json(path, line) for line in lines]
    if wrong := [line for line, record in zip(lines, records, strict=True) if "gtboxes" not in record]:
        fail(path, f"must hold an ID and gtboxes in each line, got {wrong[0][:80]}", CROWDHUMAN_TREE)
    require_images((root / "Images" / f"{record['ID']}.jpg" for record in records), CROWDHUMAN_TREE)
    return [_crowdhuman_image(root, record) for record in records]


def _crowdhuman_image(root: Path, record: Mapping[str, Any]) -> LabelledImage:
    path = root / "Images" / f"{record['ID']}.jpg"
    people, ignored = [], []
    for box in record["gtboxes"]:
        # A box without `extra` is an ordinary person.
        is_person = box["tag"] == "person" and not box.get("extra", {}).get("ignore")
        (people if is_person else ignored).append(box["fbox"])
    return _image(
        record["ID"],
        path,
        _size_px(path),
        people=xyxy_from_xywh(rows(people)),
        ignored=xyxy_from_xywh(rows(ignored)),
    )


def _size_px(path: Path) -> tuple[int, int]:
    """Width and height of the stored pixels, from the head of the file."""
    try:
        with Image.open(path) as image:
            return image.size
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path} must be an image, got something else; copy it again") from error


def _read_eurocity(root: Path, labels: str, kept: frozenset[str]) -> list[LabelledImage]:
    require(root, [labels], EUROCITY_TREE)
    return [
        _eurocity_image(root, path, kept) for path in list_files(root / labels, "*/*.json", EUROCITY_TREE)
    ]


def _eurocity_image(root: Path, path: Path, kept: frozenset[str]) -> LabelledImage:
    frame = read_json(path)
    relative = path.relative_to(root).with_suffix(".png")
    people, ignored = [], []
    try:
        for entry in _descendants(frame):
            is_person = entry["identity"] in kept and not _is_unclear(entry.get("tags", ()))
            (people if is_person else ignored).append([entry[side] for side in ("x0", "y0", "x1", "y1")])
        size_px = (frame["imagewidth"], frame["imageheight"])
    except KeyError as error:
        raise DatasetError(f"{path} must describe a frame of EuroCity Persons, got no {error}") from error
    time, _, *rest = relative.parts
    name = "/".join([time, *rest])
    return _image(name, root.joinpath(time, "img", *rest), size_px, people=people, ignored=ignored)


def _descendants(entry: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Everything below an entry: a rider's bicycle is a child of the rider, and may have children itself."""
    for child in entry.get("children", ()):
        yield child
        yield from _descendants(child)


def _is_unclear(tags: Sequence[str]) -> bool:
    """Whether the tags of a person, such as occluded>40 or behind-glass, say that little of it can be seen."""
    hidden = [re.fullmatch(r"(?:occluded|truncated)>(\d+)", tag) for tag in tags]
    is_hidden = any(match and int(match[1]) >= EUROCITY_MAX_HIDDEN_PERCENT for match in hidden)
    return is_hidden or not EUROCITY_IGNORED_TAGS.isdisjoint(tags)


def _image(
    name: str, path: Path, size_px: tuple[int, int], *, people: ArrayLike, ignored: ArrayLike
) -> LabelledImage:
    boxes, regions = clip(rows(people), size_px), clip(rows(ignored), size_px)
    boxes, regions = boxes[is_wide(boxes, MIN_SIDE_PX)], regions[is_wide(regions)]
    return LabelledImage(
        name=name,
        path=path,
        boxes_xyxy=boxes.astype(np.float32),
        pids=np.full(len(boxes), UNLABELLED, dtype=np.int64),
        ignored_xyxy=regions.astype(np.float32) if len(regions) else None,
    )
