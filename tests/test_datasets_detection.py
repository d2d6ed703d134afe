"""Readers of detection sets, on tiny trees in the formats of the releases, written by json."""

import json

import numpy as np
import pytest
from PIL import Image
from psdiff.training.datasets import detection
from psdiff.training.datasets.detection import load_crowdhuman, load_eurocity_persons
from psdiff.training.datasets.load import load_detection
from psdiff.training.datasets.schema import UNLABELLED, DatasetError

ID = "273271,c9db000d5146c15"


def person(*fbox, **more):
    return {"tag": "person", "fbox": list(fbox), "vbox": list(fbox), "hbox": [0, 0, 1, 1], **more}


@pytest.fixture
def crowdhuman(tmp_path):
    """One training image of 100x80 with every case, one validation image without people."""
    (tmp_path / "Images").mkdir()
    for name in (ID, "val"):
        Image.new("RGB", (100, 80)).save(tmp_path / f"Images/{name}.jpg")
    boxes = [
        person(-10, 5, 40, 90, extra={"box_id": 0, "occ": 0}, head_attr={"ignore": 1}),
        person(20, 20, 10, 30),
        person(97, 10, 20, 30, extra={"ignore": 0}),
        person(200, 10, 20, 30),
        person(60, 10, 20, 30, extra={"ignore": 1}),
        {"tag": "mask", "fbox": [70, 70, 50, 50], "extra": {"ignore": 1}},
        {"tag": "mask", "fbox": [300, 70, 50, 50], "extra": {"ignore": 1}},
    ]
    (tmp_path / "annotation_train.odgt").write_text(json.dumps({"ID": ID, "gtboxes": boxes}) + "\n")
    (tmp_path / "annotation_val.odgt").write_text(json.dumps({"ID": "val", "gtboxes": []}) + "\n")
    return tmp_path


def test_crowdhuman_clips_full_bodies_and_drops_slivers(crowdhuman):
    found = load_crowdhuman(crowdhuman)
    [image] = found.train
    # 97..117 is 3 px wide in an image of 100 px.
    assert image.boxes_xyxy.tolist() == [[0, 5, 30, 80], [20, 20, 30, 50]]
    assert image.boxes_xyxy.dtype == np.float32
    assert image.pids.tolist() == [UNLABELLED, UNLABELLED]
    assert (image.name, image.path) == (ID, crowdhuman / f"Images/{ID}.jpg")


def test_crowdhuman_ignores_masks_and_people_marked_so(crowdhuman):
    found = load_crowdhuman(crowdhuman)
    assert found.train[0].ignored_xyxy.tolist() == [[60, 10, 80, 40], [70, 70, 100, 80]]
    assert found.test[0].ignored_xyxy is None
    assert found.test[0].boxes_xyxy.shape == (0, 4)


@pytest.mark.parametrize("name", ["annotation_val.odgt", f"Images/{ID}.jpg"])
def test_crowdhuman_names_a_missing_file_and_the_tree(crowdhuman, name):
    (crowdhuman / name).unlink()
    with pytest.raises(DatasetError) as raised:
        load_crowdhuman(crowdhuman)
    assert str(crowdhuman / name) in str(raised.value)
    assert detection.CROWDHUMAN_TREE in str(raised.value)


def test_crowdhuman_names_damaged_files(crowdhuman):
    (crowdhuman / "Images/val.jpg").write_text("no image")
    with pytest.raises(DatasetError, match=r"val\.jpg must be an image"):
        load_crowdhuman(crowdhuman)
    (crowdhuman / "annotation_train.odgt").write_text('{"ID": 1}')
    with pytest.raises(DatasetError, match=r"annotation_train\.odgt must hold an ID and gtboxes"):
        load_crowdhuman(crowdhuman)
    (crowdhuman / "annotation_train.odgt").write_text('{"ID": ')
    with pytest.raises(DatasetError, match=r"annotation_train\.odgt must be JSON"):
        load_crowdhuman(crowdhuman)


def entry(identity, x0, y0, x1, y1, tags=(), children=()):
    box = {"x0": x0, "y0": y0, "x1": x1, "y1": y1}
    return {"identity": identity, **box, "tags": list(tags), "children": list(children)}


ENTRIES = [
    entry("pedestrian", 10, 10, 50, 90, ["occluded>40"], [entry("buggy", 40, 60, 60, 90)]),
    entry("pedestrian", 1900, 10, 1950, 90),
    entry("pedestrian", 1917, 10, 1950, 90),
    entry("pedestrian", 100, 10, 140, 90, ["occluded>80"]),
    entry("pedestrian", 200, 10, 240, 90, ["truncated>80", "occluded>10"]),
    entry("pedestrian", 300, 10, 340, 90, ["behind-glass"]),
    entry("person-group-far-away", 400, 10, 440, 90),
    entry(
        "rider",
        500,
        10,
        540,
        90,
        [],
        [entry("bicycle", 500, 60, 560, 95, [], [entry("pedestrian", 1, 2, 9, 9)])],
    ),
]


def write_frame(root, time, half, city, entries):
    for kind, suffix in (("img", "png"), ("labels", "json")):
        path = root / f"{time}/{kind}/{half}/{city}/{city}_00000.{suffix}"
        path.parent.mkdir(parents=True)
        path.touch()
    frame = {"identity": "frame", "imagewidth": 1920, "imageheight": 1024, "tags": [], "children": entries}
    path.write_text(json.dumps(frame))


@pytest.fixture
def eurocity(tmp_path):
    write_frame(tmp_path, "day", "train", "ulm", ENTRIES)
    write_frame(tmp_path, "day", "val", "roma", [])
    write_frame(tmp_path, "night", "train", "ulm", ENTRIES[:1])
    write_frame(tmp_path, "night", "val", "roma", [])
    return tmp_path


def test_eurocity_persons_keeps_pedestrians_at_every_depth(eurocity):
    found = load_eurocity_persons(eurocity)
    [image] = found.train
    # The second is clipped to 20 px; of the third 3 px are left, so it goes.
    assert image.boxes_xyxy.tolist() == [[10, 10, 50, 90], [1900, 10, 1920, 90], [1, 2, 9, 9]]
    assert (image.name, image.path) == (
        "day/train/ulm/ulm_00000.png",
        eurocity / "day/img/train/ulm/ulm_00000.png",
    )
    assert set(image.pids) == {UNLABELLED}
    assert found.test[0].boxes_xyxy.shape == (0, 4)


def test_eurocity_persons_ignores_who_is_hidden_and_all_that_is_no_pedestrian(eurocity):
    [image] = load_eurocity_persons(eurocity).train
    assert image.ignored_xyxy[:, 0].tolist() == [40, 100, 200, 300, 400, 500, 500]


def test_eurocity_persons_counts_riders_on_demand(eurocity):
    [image] = load_eurocity_persons(eurocity, riders=True).train
    assert [500, 10, 540, 90] in image.boxes_xyxy.tolist()
    assert image.ignored_xyxy[:, 0].tolist() == [40, 100, 200, 300, 400, 500]


def test_eurocity_persons_has_a_day_and_a_night(eurocity):
    found = load_detection("eurocity-night", eurocity)
    assert found.name == "eurocity-night"
    assert found.train[0].boxes_xyxy.tolist() == [[10, 10, 50, 90]]
    with pytest.raises(ValueError, match="time must be day or night, got 'dusk'"):
        load_eurocity_persons(eurocity, time="dusk")
    with pytest.raises(ValueError, match="name must be one of"):
        load_detection("eurocity", eurocity)


def test_eurocity_persons_names_what_is_missing_and_the_tree(eurocity):
    image = eurocity / "day/img/train/ulm/ulm_00000.png"
    image.unlink()
    with pytest.raises(DatasetError) as raised:
        load_eurocity_persons(eurocity)
    assert str(image) in str(raised.value)
    assert detection.EUROCITY_TREE in str(raised.value)
    labels = eurocity / "day/labels/val/roma/roma_00000.json"
    labels.write_text(json.dumps({"children": []}))
    with pytest.raises(DatasetError, match=r"roma_00000\.json must describe a frame"):
        load_eurocity_persons(eurocity)
    labels.unlink()
    with pytest.raises(DatasetError, match="day/labels/val must hold files"):
        load_eurocity_persons(eurocity)
