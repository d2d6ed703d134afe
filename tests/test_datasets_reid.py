"""Readers of ReID sets and of single crops, on tiny trees in the formats of the releases."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import h5py
import lmdb
import numpy as np
import pytest
from psdiff.training.datasets import cuhk03, luperson, market, msmt17
from psdiff.training.datasets.cuhk03 import load_cuhk03_raw
from psdiff.training.datasets.images import open_lmdb, read_crop, read_image
from psdiff.training.datasets.load import load_reid
from psdiff.training.datasets.luperson import load_luperson
from psdiff.training.datasets.market import load_cuhk03_np, load_dukemtmc, load_market1501
from psdiff.training.datasets.msmt17 import load_msmt17
from psdiff.training.datasets.schema import NO_CAMERA, UNLABELLED, Crop, DatasetError, LabelledImage
from scipy.io import savemat

# 4 high, 2 wide: red left, blue right.
STRIPES = np.zeros((4, 2, 3), dtype=np.uint8)
STRIPES[:, 0, 0] = STRIPES[:, 1, 2] = 250


def png_bytes(rgb):
    return cv2.imencode(".png", rgb[:, :, ::-1])[1].tobytes()


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def seen(crops):
    return [(crop.path.name, crop.pid, crop.camera) for crop in crops]


@pytest.fixture
def market_root(tmp_path):
    return touch(
        tmp_path,
        "bounding_box_train/0002_c1s1_000451_03.jpg",
        "bounding_box_train/0007_c6s3_077392_01.jpg",
        "bounding_box_train/Thumbs.db",
        "query/0001_c1s1_001051_00.jpg",
        "bounding_box_test/-1_c3s1_000401_03.jpg",
        "bounding_box_test/0000_c4s6_016896_04.jpg",
        "bounding_box_test/0001_c2s1_009051_03.jpg",
    )


def test_market1501_leaves_out_junk_and_keeps_distractors(market_root):
    found = load_market1501(market_root)
    assert seen(found.train) == [("0002_c1s1_000451_03.jpg", 2, 1), ("0007_c6s3_077392_01.jpg", 7, 6)]
    assert seen(found.query) == [("0001_c1s1_001051_00.jpg", 1, 1)]
    assert [(crop.pid, crop.camera) for crop in found.gallery] == [(0, 4), (1, 2)]


def test_dukemtmc_reads_pid_and_camera(tmp_path):
    names = ["bounding_box_train/0001_c2_f0046182.jpg", "query/0005_c8_f0000001.jpg"]
    found = load_dukemtmc(touch(tmp_path, *names, "bounding_box_test/0005_c1_f0099999.jpg"))
    assert (seen(found.train), seen(found.query)) == (
        [("0001_c2_f0046182.jpg", 1, 2)],
        [("0005_c8_f0000001.jpg", 5, 8)],
    )


def test_cuhk03_np_reads_png_files_of_one_kind(tmp_path):
    for kind in ("labeled", "detected"):
        touch(
            tmp_path,
            *(
                f"{kind}/{name}"
                for name in (
                    "bounding_box_train/0003_c2_10.png",
                    "query/0001_c1_1.png",
                    "bounding_box_test/0001_c2_6.png",
                )
            ),
        )
    found = load_cuhk03_np(tmp_path, "detected")
    assert seen(found.train) == [("0003_c2_10.png", 3, 2)]
    assert found.gallery[0].path == tmp_path / "detected/bounding_box_test/0001_c2_6.png"
    with pytest.raises(ValueError, match="kind must be labeled or detected"):
        load_cuhk03_np(tmp_path, "drawn")


def test_market_folders_name_what_is_missing_and_the_tree(market_root):
    (market_root / "query/0001_c1s1_001051_00.jpg").rename(market_root / "query/person.jpg")
    with pytest.raises(DatasetError, match=r"person\.jpg must have a name that begins with"):
        load_market1501(market_root)
    (market_root / "query/person.jpg").unlink()
    with pytest.raises(DatasetError, match=r"query must hold files \*\.jpg, got none"):
        load_market1501(market_root)
    (market_root / "query").rmdir()
    with pytest.raises(DatasetError) as raised:
        load_market1501(market_root)
    assert str(market_root / "query") in str(raised.value)
    assert market.TREE in str(raised.value)
    with pytest.raises(DatasetError) as raised:
        load_cuhk03_np(market_root)
    assert str(market_root / "labeled/bounding_box_train") in str(raised.value)
    assert market.CUHK03_NP_TREE in str(raised.value)


def test_training_people_in_the_test_half_are_refused(market_root):
    touch(market_root, "bounding_box_test/0007_c1s1_000001_00.jpg")
    with pytest.raises(DatasetError, match="got 1 in both, such as 7"):
        load_market1501(market_root)


@pytest.fixture(params=[("train", "test"), ("mask_train_v2", "mask_test_v2")])
def msmt_root(tmp_path, request):
    train, test = request.param
    lists = {
        "train": ["0000/0000_000_01_0303morning_0015_0.jpg 0", "0001/0001_004_15_0303noon_0200_1.jpg 1"],
        "val": ["0001/0001_009_02_0113afternoon_0001_0.jpg 1"],
        "query": ["0000/0000_001_12_0303morning_0020_0.jpg 0"],
        "gallery": ["0000/0000_002_03_0303morning_0020_0.jpg 0", "0004/0004_000_10_0303noon_0001_2.jpg 4"],
    }
    for name, lines in lists.items():
        folder = train if name in ("train", "val") else test
        touch(tmp_path, *(f"{folder}/{line.split()[0]}" for line in lines))
        (tmp_path / f"list_{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_msmt17_reads_its_lists_in_both_versions(msmt_root):
    found = load_msmt17(msmt_root)
    assert [(crop.pid, crop.camera) for crop in found.train] == [(0, 1), (1, 15), (1, 2)]
    # The labels of the test half start at 0 again: 0 -> 2, 4 -> 6.
    assert [(crop.pid, crop.camera) for crop in found.query] == [(2, 12)]
    assert [(crop.pid, crop.camera) for crop in found.gallery] == [(2, 3), (6, 10)]
    assert all(crop.path.exists() for crop in (*found.train, *found.query, *found.gallery))


def test_msmt17_names_what_is_missing_and_the_tree(msmt_root):
    path = load_msmt17(msmt_root).query[0].path
    path.unlink()
    for missing in (path, msmt_root / "list_gallery.txt"):
        missing.unlink(missing_ok=True)
        with pytest.raises(DatasetError) as raised:
            load_msmt17(msmt_root)
        assert str(missing) in str(raised.value)
        assert msmt17.TREE in str(raised.value)


def test_msmt17_names_a_line_of_another_form(msmt_root):
    (msmt_root / "list_query.txt").write_text("0000/0000.jpg 0\n")
    with pytest.raises(DatasetError, match=r"list_query\.txt must hold lines like .*, got '0000/0000.jpg 0'"):
        load_msmt17(msmt_root)


def test_a_copy_of_msmt17_in_market_folders_keeps_cameras_of_two_digits(tmp_path):
    names = ["bounding_box_train/0003_c12_0001.jpg", "query/0000_c15_0002.jpg"]
    found = load_msmt17(touch(tmp_path, *names, "bounding_box_test/0000_c1_0003.jpg"))
    assert [(crop.pid, crop.camera) for crop in (*found.train, *found.query, *found.gallery)] == [
        (3, 12),
        (4, 15),
        (4, 1),
    ]


def write_cuhk03(root, kind="detected"):
    """Two pairs of cameras; MATLAB's 5-by-1 and P-by-10 cells have their axes reversed in HDF5.

    Person 2 of pair 1 has one image in view 1, column 3, and one in view 2, column 6; all else is empty.
    """
    (root / "cuhk03_release").mkdir()
    reference = h5py.special_dtype(ref=h5py.Reference)
    images = {(1, 0, 0): 10, (1, 0, 5): 20, (1, 1, 2): 30, (1, 1, 5): 40, (2, 0, 9): 50}
    with h5py.File(root / "cuhk03_release/cuhk-03.mat", "w") as file:
        empty = file.create_dataset("#refs#/empty", data=np.zeros(2, dtype=np.uint64))
        pairs = file.create_dataset(kind, (1, 2), dtype=reference)
        for pair, people in ((1, 2), (2, 1)):
            cells = file.create_dataset(f"#refs#/pair{pair}", (10, people), dtype=reference)
            pairs[0, pair - 1] = cells.ref
            for person in range(people):
                for column in range(10):
                    value = images.get((pair, person, column))
                    rgb = np.full((4, 3, 3), value or 0, dtype=np.uint8)
                    rgb[0, 2] = (1, 2, 3)
                    name = f"#refs#/{pair}_{person}_{column}"
                    stored = file.create_dataset(name, data=rgb.T) if value else empty
                    cells[column, person] = stored.ref
    names = ["1_001_1_01.png", "1_001_2_06.png", "1_002_1_03.png", "1_002_2_06.png", "2_001_2_10.png"]
    filelist = np.empty((5, 1), dtype=object)
    filelist[:, 0] = names
    config = {
        "filelist": filelist,
        "labels": np.array([[1], [1], [2], [2], [844]]),
        "camId": np.array([[1], [2], [1], [2], [2]]),
        "train_idx": np.array([[5]]),
        "query_idx": np.array([[1], [3]]),
        "gallery_idx": np.array([[2], [4]]),
    }
    savemat(root / f"cuhk03_new_protocol_config_{kind}.mat", config)
    return config


def test_cuhk03_reads_the_new_protocol_from_the_released_file(tmp_path):
    write_cuhk03(tmp_path)
    found = load_cuhk03_raw(tmp_path, "detected")
    assert [(crop.pid, crop.camera) for crop in found.train] == [(844, 2)]
    assert [(crop.pid, crop.camera, crop.key) for crop in found.query] == [
        (1, 1, "detected/0/0/0"),
        (2, 1, "detected/0/1/2"),
    ]
    assert [(crop.pid, crop.camera) for crop in found.gallery] == [(1, 2), (2, 2)]


def test_cuhk03_images_are_turned_upright(tmp_path):
    write_cuhk03(tmp_path)
    found = load_cuhk03_raw(tmp_path, "detected")
    picture = read_crop(found.query[1])
    assert (picture.shape, picture.dtype) == ((4, 3, 3), np.uint8)
    assert picture[0, 2].tolist() == [1, 2, 3]
    assert picture[1, 0].tolist() == [30, 30, 30]
    assert read_crop(found.train[0])[3, 2].tolist() == [50, 50, 50]
    with pytest.raises(DatasetError, match="got an empty cell"):
        read_crop(Crop(found.query[0].path, 1, 1, "detected/0/0/1"))
    with pytest.raises(DatasetError, match="must hold the crop detected/7/0/1"):
        read_crop(Crop(found.query[0].path, 1, 1, "detected/7/0/1"))


def test_cuhk03_refuses_a_protocol_that_names_empty_cells(tmp_path):
    config = write_cuhk03(tmp_path)
    config["filelist"][0, 0] = "1_001_1_02.png"
    savemat(tmp_path / "cuhk03_new_protocol_config_detected.mat", config)
    with pytest.raises(DatasetError, match=r"must hold the image 1_001_1_02\.png"):
        load_cuhk03_raw(tmp_path, "detected")


def test_cuhk03_names_what_is_missing_and_the_tree(tmp_path):
    write_cuhk03(tmp_path)
    with pytest.raises(DatasetError) as raised:
        load_cuhk03_raw(tmp_path, "labeled")
    assert str(tmp_path / "cuhk03_new_protocol_config_labeled.mat") in str(raised.value)
    assert cuhk03.TREE in str(raised.value)
    (tmp_path / "cuhk03_release/cuhk-03.mat").write_bytes(b"half of it")
    with pytest.raises(DatasetError, match=r"cuhk-03\.mat must be an HDF5 file"):
        load_cuhk03_raw(tmp_path, "detected")


KEYS = ["01_02_0003_00000004", "01_02_0003_00000005"]


def write_luperson(root, keys, folder="lmdb"):
    (root / folder).mkdir(exist_ok=True)
    environment = lmdb.open(str(root / folder), map_size=1 << 20)
    with environment.begin(write=True) as transaction:
        for key in KEYS:
            transaction.put(key.encode(), png_bytes(STRIPES))
    environment.close()
    (root / "keys.pkl").write_bytes(pickle.dumps(keys))
    return root


@pytest.mark.parametrize(
    ("keys", "folder"),
    [(KEYS, "lmdb"), ({"keys": KEYS}, "."), ([key.encode() for key in KEYS], "lmdb")],
    ids=["list", "dict", "bytes"],
)
def test_luperson_reads_its_lmdb(tmp_path, keys, folder):
    found = load_luperson(write_luperson(tmp_path, keys, folder))
    assert [crop.key for crop in found.train] == KEYS
    assert {(crop.pid, crop.camera) for crop in found.train} == {(UNLABELLED, NO_CAMERA)}
    assert not found.query
    assert np.array_equal(read_crop(found.train[1]), STRIPES)


def test_luperson_reads_a_plain_folder(tmp_path):
    found = load_luperson(touch(tmp_path, "b/2.jpg", "a/1.jpg", "a/readme.txt"))
    assert [crop.path for crop in found.train] == [tmp_path / "a/1.jpg", tmp_path / "b/2.jpg"]
    assert {crop.pid for crop in found.train} == {UNLABELLED}


def test_luperson_names_what_is_missing_and_the_tree(tmp_path):
    write_luperson(tmp_path, KEYS)
    for missing in ("keys.pkl", "lmdb/data.mdb"):
        kept = (tmp_path / missing).read_bytes()
        (tmp_path / missing).unlink()
        with pytest.raises(DatasetError) as raised:
            load_luperson(tmp_path)
        assert str(tmp_path / missing) in str(raised.value)
        assert luperson.TREE in str(raised.value)
        (tmp_path / missing).write_bytes(kept)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="empty must hold files"):
        load_luperson(tmp_path / "empty")
    with pytest.raises(DatasetError, match="must be a folder, got none"):
        load_luperson(tmp_path / "nothing")


class Intruder:
    def __reduce__(self):
        return os.getcwd, ()


def test_luperson_runs_nothing_that_a_pickle_asks_for(tmp_path):
    with pytest.raises(DatasetError, match=r"keys\.pkl must be a pickled list of keys, got .*getcwd"):
        load_luperson(write_luperson(tmp_path, [Intruder()]))


@pytest.mark.parametrize("keys", [[*KEYS, "09_09_0009_00000009"], ["09_09_0009_00000009"]])
def test_luperson_refuses_keys_that_its_lmdb_lacks(tmp_path, keys):
    with pytest.raises(DatasetError, match="must name entries of"):
        load_luperson(write_luperson(tmp_path, keys))
    (tmp_path / "keys.pkl").write_bytes(pickle.dumps({"names": KEYS}))
    with pytest.raises(DatasetError, match="must hold a list of keys"):
        load_luperson(tmp_path)


def test_images_are_rgb_as_they_are_stored(tmp_path):
    path = tmp_path / "stripes.png"
    path.write_bytes(png_bytes(STRIPES))
    picture = read_image(LabelledImage("stripes", path, np.zeros((0, 4), np.float32), np.zeros(0, np.int64)))
    assert (picture.dtype, picture.flags.c_contiguous) == (np.uint8, True)
    assert np.array_equal(picture, STRIPES)
    assert np.array_equal(read_crop(Crop(path, 1, 1)), STRIPES)


def test_an_orientation_tag_does_not_turn_an_image_away_from_its_boxes(tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show"
    Image.fromarray(STRIPES).save(tmp_path / "turned.jpg", exif=exif)
    assert read_crop(Crop(tmp_path / "turned.jpg", 1, 1)).shape == (4, 2, 3)


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(DatasetError, match=r"text\.jpg must be an image, got 8 bytes"):
        read_crop(Crop(tmp_path / "text.jpg", 1, 1))
    with pytest.raises(DatasetError, match=r"none\.jpg must be an image file that can be read"):
        read_crop(Crop(tmp_path / "none.jpg", 1, 1))
    crop = load_luperson(write_luperson(tmp_path, KEYS)).train[0]
    with pytest.raises(DatasetError, match=r"entry nobody of .*lmdb must be an image, got 0 bytes"):
        read_crop(Crop(crop.path, 1, 1, "nobody"))


def test_a_forked_process_and_threads_read_what_the_parent_opened(tmp_path):
    write_cuhk03(tmp_path)
    crops = [
        pickle.loads(pickle.dumps(load_luperson(write_luperson(tmp_path, KEYS)).train[0])),
        load_cuhk03_raw(tmp_path, "detected").query[0],
    ]
    inherited = open_lmdb(crops[0].path)
    expected = [read_crop(crop) for crop in crops]
    child = os.fork()
    if child == 0:
        try:
            is_new = open_lmdb(crops[0].path) is not inherited
            is_same = all(np.array_equal(read_crop(crop), e) for crop, e in zip(crops, expected, strict=True))
            os._exit(0 if is_new and is_same else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert open_lmdb(crops[0].path) is inherited
    with ThreadPoolExecutor(4) as pool:
        assert all(np.array_equal(picture, expected[0]) for picture in pool.map(read_crop, crops[:1] * 16))


def test_reid_sets_are_loaded_by_name(market_root):
    assert load_reid("market1501", market_root).name == "market1501"
    with pytest.raises(ValueError, match="name must be one of"):
        load_reid("market", market_root)
