"""Readers of person-search sets, on tiny trees in the formats of the releases, written by scipy and json."""

import json
import logging
from pathlib import Path

import numpy as np
import psdiff
import pytest
from psdiff.training.datasets import cuhk_sysu, posetrack21, prw
from psdiff.training.datasets.cuhk_sysu import ALL_IMAGES, load_cuhk_sysu, read_gallery_protocol
from psdiff.training.datasets.load import load_person_search
from psdiff.training.datasets.mat_structures import nested_structures, numbers, read_structures, text
from psdiff.training.datasets.posetrack21 import load_posetrack21
from psdiff.training.datasets.prw import load_prw
from psdiff.training.datasets.schema import NO_CAMERA, UNLABELLED, DatasetError
from scipy.io import loadmat, savemat

GENUINE_G100 = Path(psdiff.__file__).parent.parent / "shared/data/personsearch-anno/cuhk-sysu/TestG100.mat"
NOWHERE = np.zeros((1, 0))


def struct(*rows, **columns):
    """A MATLAB structure array (1, n): of one row given by name, or of dicts."""
    rows = rows or (columns,)
    array = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for i, row in enumerate(rows):
        for name, value in row.items():
            array[name][0, i] = value
    return array


def cell(values):
    array = np.empty((len(values), 1), dtype=object)
    array[:, 0] = values
    return array


def xywh(*numbers, dtype=np.float64):
    return np.array([numbers], dtype=dtype)


def sighting(name, box, **more):
    return {"imname": name, "idlocate": box, "ishard": 0.0, **more}


def protocol(*queries):
    """A TestG array of (query image, box, idname, [(gallery image, box or NOWHERE), ...])."""
    return struct(
        *(
            {
                "Query": struct(sighting(image, box, idname=idname)),
                "Gallery": struct(*(sighting(name, where) for name, where in gallery)),
            }
            for image, box, idname, gallery in queries
        )
    )


ANNA, BERT = xywh(10, 20, 30, 60), xywh(5, 5, 20, 40)
# uint8, as MATLAB stores small numbers: 200 + 100 would wrap around to 44.
ANNA_AGAIN = xywh(200, 20, 100, 220, dtype=np.uint8)
QUERIES = (
    ("t1.jpg", ANNA, "p90", [("t2.jpg", ANNA_AGAIN), ("t3.jpg", NOWHERE), ("t1.jpg", NOWHERE)]),
    ("t3.jpg", BERT, "p91", [("t4.jpg", BERT), ("t4.jpg", BERT), ("t1.jpg", NOWHERE)]),
)
BOXES = {
    "s1.jpg": [xywh(1, 2, 3, 4), xywh(50, 60, 0, 80), xywh(7, 8, 9, 10)],
    "s2.jpg": [xywh(11, 12, 13, 14)],
    "t1.jpg": [ANNA, xywh(11, 20, 30, 60)],
    "t2.jpg": [ANNA_AGAIN],
    "t3.jpg": [BERT, xywh(60, 60, 10, 10, dtype=np.uint16)],
    "t4.jpg": [BERT],
    "t5.jpg": [xywh(0, 0, 5, 5)],
}


@pytest.fixture
def sysu(tmp_path):
    folder = tmp_path / "annotation/test"
    for path in (folder / "train_test", folder / "subset", tmp_path / "Image/SSM"):
        path.mkdir(parents=True)
    for name in BOXES:
        (tmp_path / "Image/SSM" / name).touch()
    people = {name: struct(*({"idlocate": b, "ishard": 0.0} for b in found)) for name, found in BOXES.items()}
    images = ({"imname": n, "nAppear": float(p.size), "box": p} for n, p in people.items())
    savemat(tmp_path / "annotation/Images.mat", {"Img": struct(*images)})
    savemat(tmp_path / "annotation/pool.mat", {"pool": cell([n for n in BOXES if n.startswith("t")])})
    train = [
        struct(
            idname="p1",
            nAppear=2.0,
            scene=struct(sighting("s1.jpg", xywh(7, 8, 9, 10)), sighting("s2.jpg", xywh(11, 12, 13, 14))),
        )
    ]
    savemat(folder / "train_test/Train.mat", {"Train": cell(train)})
    for size in (50, 100):
        savemat(folder / f"train_test/TestG{size}.mat", {f"TestG{size}": protocol(*QUERIES)})
    # The subset's file counts its people anew: only the box says who is meant.
    occluded = ("t3.jpg", BERT, "p1", [("t5.jpg", NOWHERE), ("t4.jpg", BERT)])
    savemat(folder / "subset/Occlusion.mat", {"Occlusion1": protocol(occluded)})
    return tmp_path


def test_cuhk_sysu_reads_images_people_and_queries(sysu):
    found = load_cuhk_sysu(sysu)
    assert [image.name for image in found.train] == ["s1.jpg", "s2.jpg"]
    assert [image.name for image in found.test] == ["t1.jpg", "t2.jpg", "t3.jpg", "t4.jpg", "t5.jpg"]
    assert found.train[1].path == sysu / "Image/SSM/s2.jpg"
    assert found.train[1].camera == NO_CAMERA
    assert found.test[2].boxes_xyxy.dtype == np.float32
    assert found.test[2].boxes_xyxy.tolist() == [[5, 5, 25, 45], [60, 60, 70, 70]]
    assert found.num_train_pids == 1
    anna, bert = found.queries
    assert (anna.image, anna.pid, anna.box_xyxy.tolist()) == (0, 1, [10, 20, 40, 80])
    assert (bert.image, bert.pid) == (2, 2)


def test_cuhk_sysu_drops_boxes_without_width(sysu):
    assert load_cuhk_sysu(sysu).train[0].boxes_xyxy.tolist() == [[1, 2, 4, 6], [7, 8, 16, 18]]


def test_cuhk_sysu_names_people_by_equal_boxes_only(sysu):
    found = load_cuhk_sysu(sysu)
    assert [image.pids.tolist() for image in found.train] == [[UNLABELLED, 0], [0]]
    # The second box of t1 is one pixel beside Anna's.
    assert [image.pids.tolist() for image in found.test] == [[1, -1], [1], [2, -1], [2], [-1]]


def test_cuhk_sysu_sums_small_integers_without_wrapping(sysu):
    assert load_cuhk_sysu(sysu).queries[0].truth[1].tolist() == [[200, 20, 300, 240]]


def test_cuhk_sysu_galleries_hold_each_image_once_and_never_the_query(sysu):
    anna, bert = load_cuhk_sysu(sysu).queries
    assert anna.gallery.tolist() == [1, 2]
    assert bert.gallery.tolist() == [3, 0]
    assert {image: boxes.tolist() for image, boxes in bert.truth.items()} == {3: [[5, 5, 25, 45]]}


def test_cuhk_sysu_full_galleries_hold_every_other_image_once(sysu):
    anna, bert = load_cuhk_sysu(sysu, gallery_size=ALL_IMAGES).queries
    assert anna.gallery.tolist() == [1, 2, 3, 4]
    assert bert.gallery.tolist() == [3, 0, 1, 4]
    assert list(anna.truth) == [1]


def test_cuhk_sysu_subsets_have_their_own_queries_and_the_identities_of_the_set(sysu):
    found = load_cuhk_sysu(sysu, subset="occlusion")
    [query] = found.queries
    assert (found.name, query.image, query.pid) == ("cuhk-sysu-occlusion", 2, 2)
    assert query.gallery.tolist() == [4, 3]
    assert list(query.truth) == [3]
    assert len(found.test) == 5


def test_cuhk_sysu_knows_a_query_of_a_subset_by_its_name_where_its_box_is_new(sysu):
    path = sysu / "annotation/test/subset/Resolution.mat"
    for idname in ("p91", "p17"):
        small = ("t3.jpg", xywh(6, 6, 20, 40), idname, [("t4.jpg", BERT), ("t1.jpg", NOWHERE)])
        savemat(path, {"Test_Size": protocol(small, small)})
        if idname == "p91":
            assert [query.pid for query in load_cuhk_sysu(sysu, subset="resolution").queries] == [2, 2]
    with pytest.raises(
        DatasetError, match=r"Resolution\.mat must ask for people of .*, got 'p17' in t3\.jpg"
    ):
        load_cuhk_sysu(sysu, subset="resolution")


def test_cuhk_sysu_says_when_images_mat_lacks_the_box_of_an_identity(sysu, caplog):
    moved = ("t1.jpg", xywh(99, 99, 9, 9), "p90", [("t2.jpg", ANNA_AGAIN)])
    savemat(sysu / "annotation/test/train_test/TestG100.mat", {"TestG100": protocol(moved)})
    with caplog.at_level(logging.WARNING):
        found = load_cuhk_sysu(sysu)
    assert "1 identities" in caplog.text
    assert found.queries[0].pid == 1


@pytest.mark.parametrize(
    "name", ["annotation/Images.mat", "annotation/test/train_test/TestG100.mat", "Image/SSM/t5.jpg"]
)
def test_cuhk_sysu_names_a_missing_file_and_the_tree(sysu, name):
    (sysu / name).unlink()
    with pytest.raises(DatasetError) as raised:
        load_cuhk_sysu(sysu)
    assert str(sysu / name) in str(raised.value)
    assert cuhk_sysu.TREE in str(raised.value)


def test_cuhk_sysu_refuses_files_that_contradict_each_other(sysu):
    stranger = ("t1.jpg", ANNA, "p90", [("s99.jpg", NOWHERE), ("t2.jpg", ANNA_AGAIN)])
    savemat(sysu / "annotation/test/train_test/TestG100.mat", {"TestG100": protocol(stranger)})
    with pytest.raises(DatasetError, match=r"got none named s99\.jpg"):
        load_cuhk_sysu(sysu)
    savemat(sysu / "annotation/test/train_test/TestG100.mat", {"TestG50": protocol(*QUERIES)})
    with pytest.raises(
        DatasetError, match=r"TestG100\.mat must be .*, got the variables \['TestG50'\] and no"
    ):
        load_cuhk_sysu(sysu)


@pytest.mark.parametrize("compressed", [False, True])
def test_structures_are_read_as_loadmat_reads_them(tmp_path, compressed):
    rows = [
        {"imname": "s1.jpg", "idlocate": xywh(1, 2, 300, 4, dtype=np.uint16), "no": -7.5, "more": NOWHERE},
        {
            "imname": "straße.jpg",
            "idlocate": xywh(-1, 2, 3, 4, dtype=np.int8),
            "no": 1e300,
            "more": struct(a="b"),
        },
        {"imname": "x", "idlocate": np.zeros((0, 0)), "no": 3.0, "more": struct(a="c")},
    ]
    variables = {"first": np.arange(5.0), "T": struct(*rows)}
    savemat(tmp_path / "t.mat", variables, do_compression=compressed)
    expected = loadmat(tmp_path / "t.mat")["T"][0]
    found = list(read_structures(tmp_path / "t.mat", "T"))
    assert [list(row) for row in found] == [list(expected.dtype.names)] * 3
    for row, other in zip(found, expected, strict=True):
        assert text(row["imname"]) == other["imname"][0]
        assert numbers(row["idlocate"]).tolist() == other["idlocate"].ravel().tolist()
        assert numbers(row["no"]).tolist() == other["no"].ravel().tolist()
    assert [text(row["a"]) for row in nested_structures(found[1]["more"])] == ["b"]
    with pytest.raises(ValueError, match=r"the variables \['first', 'T'\] and no U"):
        read_structures(tmp_path / "t.mat", "U")
    with pytest.raises(ValueError, match="in place of structures"):
        list(read_structures(tmp_path / "t.mat", "first"))
    with pytest.raises(ValueError, match="in place of text"):
        text(found[0]["no"])
    with pytest.raises(ValueError, match="in place of numbers"):
        numbers(found[1]["more"])


@pytest.mark.parametrize("num_bytes", [0, 100, 200, 1500])
@pytest.mark.parametrize("compressed", [False, True])
def test_a_gallery_file_that_is_cut_off_is_named(tmp_path, num_bytes, compressed):
    path = tmp_path / "TestG50.mat"
    savemat(path, {"TestG50": protocol(*QUERIES)}, do_compression=compressed)
    content = path.read_bytes()
    path.write_bytes(content[: min(num_bytes, len(content) - 9)])
    with pytest.raises(DatasetError, match=r"TestG50\.mat must be an array of structures"):
        read_gallery_protocol(path)


def test_a_truncated_mat_file_is_named(sysu):
    path = sysu / "annotation/Images.mat"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DatasetError, match=r"Images\.mat must be a MATLAB v5 file"):
        load_cuhk_sysu(sysu)


def test_cuhk_sysu_refuses_other_gallery_sizes_and_subsets(tmp_path):
    with pytest.raises(ValueError, match="gallery_size must be one of"):
        load_cuhk_sysu(tmp_path, gallery_size=99)
    with pytest.raises(ValueError, match="subset must be one of"):
        load_cuhk_sysu(tmp_path, subset="night")


@pytest.mark.slow
@pytest.mark.skipif(not GENUINE_G100.exists(), reason="needs the TestG100.mat of the CUHK-SYSU release")
def test_the_released_gallery_protocol_is_read():
    queries = read_gallery_protocol(GENUINE_G100)
    assert len(queries) == len({query.idname for query in queries}) == 2900
    assert {len(query.gallery) for query in queries} == {100}
    first = queries[0]
    assert (first.image, first.idname, first.box_xywh.tolist()) == (
        "s15538.jpg",
        "p10581",
        [488, 90, 88, 250],
    )
    assert {name: boxes.tolist() for name, boxes in first.matches.items()} == {
        "s15535.jpg": [[430, 121, 93, 266]],
        "s15536.jpg": [[420, 108, 89, 276]],
        first.gallery[2]: [[387, 110, 76, 248]],
        first.gallery[3]: [[535, 97, 99, 292]],
    }
    # 5,447 entries show the person; one image is listed twice with one box, three with two boxes.
    assert sum(len(boxes) for query in queries for boxes in query.matches.values()) == 5446
    assert sum(len(query.matches) for query in queries) == 5443


@pytest.fixture
def prw_root(tmp_path):
    """Training ids 5 and 932, test ids 7 and 9; c2s1_000003 has a box that begins left of the frame."""
    tables = {
        "c1s1_000001": ("box_new", [[932, 10, 20, 30, 40], [-2, 1, 2, 3, 4]]),
        "c6s1_000002": ("anno_previous", [[5, 10, 20, 30, 40], [932, 50, 50, 0, 10]]),
        "c1s1_000003": ("box_new", [[9, 10.5, 20.25, 30.5, 40]]),
        "c2s1_000003": ("anno_file", [[9, -4, 6, 20, 30], [7, 100, 6, 20, 30]]),
        "c1s1_000004": ("box_new", [[9, 1, 1, 10, 10], [7, 30, 1, 10, 10]]),
    }
    (tmp_path / "frames").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, (key, table) in tables.items():
        (tmp_path / f"frames/{name}.jpg").touch()
        savemat(tmp_path / f"annotations/{name}.jpg.mat", {key: np.array(table, dtype=np.float64)})
    names = list(tables)
    savemat(tmp_path / "frame_train.mat", {"img_index_train": cell(names[:2])})
    savemat(tmp_path / "frame_test.mat", {"img_index_test": cell(names[2:])})
    lines = ["9 10.5 20.25 30.5 40 c1s1_000003", "9 -4 6 20.7 30 c2s1_000003", "7 30 1 10 10 c1s1_000004"]
    (tmp_path / "query_info.txt").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    return tmp_path


def test_prw_renumbers_people_and_marks_those_whom_nobody_named(prw_root):
    found = load_prw(prw_root)
    assert [image.name for image in found.train] == ["c1s1_000001.jpg", "c6s1_000002.jpg"]
    # 5 -> 0, 932 -> 1, then 7 -> 2, 9 -> 3; the 932 without width is dropped.
    assert [image.pids.tolist() for image in found.train] == [[1, UNLABELLED], [0]]
    assert [image.pids.tolist() for image in found.test] == [[3], [3, 2], [3, 2]]
    assert found.num_train_pids == 2
    assert [image.camera for image in found.train] == [1, 6]
    assert found.train[0].boxes_xyxy.tolist() == [[10, 20, 40, 60], [1, 2, 4, 6]]
    assert found.train[0].path == prw_root / "frames/c1s1_000001.jpg"


def test_prw_searches_every_other_frame(prw_root):
    first, second, third = load_prw(prw_root).queries
    assert (first.image, first.pid, first.gallery.tolist()) == (0, 3, [1, 2])
    assert sorted(first.truth) == [1, 2]
    assert (second.image, second.gallery.tolist(), sorted(second.truth)) == (1, [0, 2], [0, 2])
    assert (third.pid, third.gallery.tolist(), sorted(third.truth)) == (2, [0, 1], [1])


def test_prw_searches_frames_of_other_cameras_on_demand(prw_root):
    first, second, third = load_prw(prw_root, cross_camera=True).queries
    assert (first.gallery.tolist(), sorted(first.truth)) == ([1], [1])
    assert (second.gallery.tolist(), sorted(second.truth)) == ([0, 2], [0, 2])
    assert (third.gallery.tolist(), sorted(third.truth)) == ([1], [1])


def test_prw_clips_negative_coordinates_in_place_or_moves_the_box_as_others_do(prw_root):
    plain, compat = load_prw(prw_root), load_prw(prw_root, compat=True)
    # Box x=-4, w=20 ends at 16; raised to x=0 first it ends at 20.
    assert plain.test[1].boxes_xyxy[0].tolist() == [0, 6, 16, 36]
    assert compat.test[1].boxes_xyxy[0].tolist() == [0, 6, 20, 36]
    np.testing.assert_allclose(plain.queries[1].box_xyxy, [0, 6, 16.7, 36], rtol=1e-6)
    assert compat.queries[1].box_xyxy.tolist() == [0, 6, 16, 36]
    assert plain.queries[0].box_xyxy.tolist() == [10.5, 20.25, 41, 60.25]
    assert compat.queries[0].box_xyxy.tolist() == [10, 20, 41, 60]


def test_prw_leaves_out_queries_without_a_match_and_counts_them(prw_root, caplog):
    savemat(prw_root / "annotations/c2s1_000003.jpg.mat", {"box_new": np.array([[9.0, 1, 1, 5, 5]])})
    with caplog.at_level(logging.WARNING):
        found = load_prw(prw_root)
    assert [query.pid for query in found.queries] == [3, 3]
    assert "1 of 3 queries have no match" in caplog.text


@pytest.mark.parametrize(
    "name", ["frame_test.mat", "annotations/c1s1_000004.jpg.mat", "frames/c1s1_000004.jpg", "query_info.txt"]
)
def test_prw_names_a_missing_file_and_the_tree(prw_root, name):
    (prw_root / name).unlink()
    with pytest.raises(DatasetError) as raised:
        load_prw(prw_root)
    assert str(prw_root / name) in str(raised.value)
    assert prw.TREE in str(raised.value)


def test_prw_names_a_broken_query_line(prw_root):
    (prw_root / "query_info.txt").write_text("9 1 2 3 4 c9s9_000001\n")
    with pytest.raises(DatasetError, match="got '9 1 2 3 4 c9s9_000001'"):
        load_prw(prw_root)


@pytest.fixture
def posetrack(tmp_path):
    def image(number, half, **more):
        name = f"images/{half}/00001_x/{number:06}.jpg"
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return {"id": number, "file_name": name, "vid_id": "00001", "is_labeled": True, **more}

    def person(image_id, person_id, *bbox):
        more = {"category_id": 1, "keypoints": [], "track_id": 0}
        return {"image_id": image_id, "person_id": person_id, "bbox": list(bbox), **more}

    polygons = {"ignore_regions_x": [[5, 9, 7], [1, 2]], "ignore_regions_y": [[1, 1, 8], [1, 2]]}
    train = {
        "images": [
            image(1, "train", **polygons),
            image(2, "train", ignore_regions_x=[], ignore_regions_y=[]),
        ],
        "annotations": [person(1, 40, 1, 2, 10, 20), person(1, 0, 5, 5, 0, 20), person(1, 0, 5, 6, 7, 8)],
    }
    val = {
        "images": [image(n, "val") for n in (11, 12, 13)],
        "annotations": [
            person(11, 0, 1, 1, 4, 4),
            person(12, 0, 2, 2, 4, 4),
            person(12, 0, 9, 9, 4, 4),
            person(13, 40, -3, 0, 8, 8),
            person(13, None, 30, 0, 8, 8),
        ],
    }
    query = {"images": [val["images"][0]], "annotations": [person(11, 0, 1, 1, 4, 4)]}
    (tmp_path / "posetrack_person_search").mkdir()
    for name, content in (("train", train), ("val", val), ("query", query)):
        (tmp_path / f"posetrack_person_search/{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_posetrack21_reads_images_and_keeps_identity_zero(posetrack):
    found = load_posetrack21(posetrack)
    assert [image.name for image in found.train] == [f"images/train/00001_x/00000{n}.jpg" for n in (1, 2)]
    assert found.train[0].pids.tolist() == [1, 0]
    assert found.train[0].boxes_xyxy.tolist() == [[1, 2, 11, 22], [5, 6, 12, 14]]
    assert found.train[1].boxes_xyxy.shape == (0, 4)
    assert found.num_train_pids == 2
    # The numbers of val.json mean other people than those of train.json.
    assert [image.pids.tolist() for image in found.test] == [[2], [2, 2], [3, UNLABELLED]]
    assert {image.camera for image in found.test} == {NO_CAMERA}


def test_posetrack21_ignores_the_boxes_around_its_polygons(posetrack):
    first, second = load_posetrack21(posetrack).train
    assert first.ignored_xyxy.tolist() == [[5, 1, 9, 8]]
    assert second.ignored_xyxy is None


def test_posetrack21_searches_every_other_test_image(posetrack):
    [query] = load_posetrack21(posetrack).queries
    assert (query.image, query.pid, query.box_xyxy.tolist()) == (0, 2, [1, 1, 5, 5])
    assert query.gallery.tolist() == [1, 2]
    assert {i: boxes.tolist() for i, boxes in query.truth.items()} == {1: [[2, 2, 6, 6], [9, 9, 13, 13]]}


@pytest.mark.parametrize("name", ["posetrack_person_search/query.json", "images/val/00001_x/000013.jpg"])
def test_posetrack21_names_a_missing_file_and_the_tree(posetrack, name):
    (posetrack / name).unlink()
    with pytest.raises(DatasetError) as raised:
        load_posetrack21(posetrack)
    assert str(posetrack / name) in str(raised.value)
    assert posetrack21.TREE in str(raised.value)


def test_posetrack21_refuses_queries_for_people_of_no_test_image(posetrack):
    path = posetrack / "posetrack_person_search/query.json"
    path.write_text(path.read_text().replace('"person_id": 0', '"person_id": 77'))
    with pytest.raises(DatasetError, match=r"must ask for people and images of val\.json, got 77"):
        load_posetrack21(posetrack)
    path.write_text("{")
    with pytest.raises(DatasetError, match="must be JSON"):
        load_posetrack21(posetrack)


def test_sets_are_loaded_by_name(prw_root):
    found = load_person_search("prw", prw_root, cross_camera=True)
    assert (found.name, len(found.queries)) == ("prw_cross_camera", 3)
    with pytest.raises(ValueError, match="name must be one of"):
        load_person_search("street", prw_root)
