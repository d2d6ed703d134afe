"""Every data set of the city, read back with plain libraries as public loaders do, and with our own readers."""

import json
import pickle
import re
from pathlib import Path

import cv2
import h5py
import lmdb
import numpy as np
import pytest
from psdiff.__main__ import app
from psdiff.commands.synth import SETS as COMMAND_SETS
from psdiff.training.city.sets import SETS, usual_people, write_set
from psdiff.training.city.writing import MARKER, Plan
from psdiff.training.datasets.load import PERSON_SEARCH_SETS, load_detection, load_person_search, load_reid
from psdiff.training.datasets.schema import UNLABELLED
from scipy.io import loadmat
from typer.testing import CliRunner

WIDTH, HEIGHT, IMAGES, PEOPLE = 160, 96, 20, 6
TRAIN = 12


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A function that writes a set when it is first asked for, and gives its folder."""
    root = tmp_path_factory.mktemp("sets")

    def folder(name):
        if not (root / name).exists():
            people = PEOPLE if usual_people(name, IMAGES) else 0
            write_set(name, root / name, Plan(IMAGES, people, seed=5, width=WIDTH, height=HEIGHT))
        return root / name

    return folder


def truth_of(root):
    """Image name -> boxes, codes and pids."""
    stored = np.load(root / "truth.npz")
    spans = zip(stored["offsets"][:-1], stored["offsets"][1:], strict=True)
    parts = ("boxes_xyxy", "embeddings", "pids")
    return {
        str(name): [stored[part][start:end] for part in parts]
        for name, (start, end) in zip(stored["names"], spans, strict=True)
    }


def xyxy(boxes_xywh):
    boxes = np.array(boxes_xywh, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)


def cuhk_images(root):
    """Boxes of each image, read as SeqNet reads them."""
    images = {}
    for name, num_boxes, boxes in loadmat(root / "annotation" / "Images.mat")["Img"].squeeze():
        found = np.asarray([box[0] for box in boxes[0]])
        images[str(name[0])] = found.reshape(found.shape[0], 4)
        assert int(num_boxes[0, 0]) == len(found)
    return images


def test_cuhk_sysu_names_train_people_in_two_scenes_by_equal_boxes(written):
    root = written("cuhk-sysu")
    images = cuhk_images(root)
    pool = {str(name[0]) for name in loadmat(root / "annotation" / "pool.mat")["pool"].squeeze()}
    assert list(images) == [f"s{number + 1}.jpg" for number in range(IMAGES)]
    assert pool == set(list(images)[TRAIN:])
    assert all((root / "Image" / "SSM" / name).is_file() for name in images)
    train = loadmat(root / "annotation" / "test" / "train_test" / "Train.mat")["Train"].squeeze()
    assert len(train) == 4  # 60 % of 6 people
    for item in train:
        scenes = item[0, 0][2].squeeze()
        assert len({str(name[0]) for name, _, _ in scenes}) == len(scenes) >= 2
        for name, box, is_hard in scenes:
            assert str(name[0]) not in pool
            assert (images[str(name[0])] == box.squeeze().astype(np.int32)).all(axis=1).sum() == 1
            assert is_hard.item() in (0, 1)


@pytest.mark.parametrize("size", [50, 100])
def test_cuhk_sysu_galleries_hold_all_truth_first_and_then_empty_rows(written, size):
    root = written("cuhk-sysu")
    images, truth = cuhk_images(root), truth_of(root)
    path = root / "annotation" / "test" / "train_test" / f"TestG{size}.mat"
    protocol = loadmat(path)[f"TestG{size}"].squeeze()
    assert len(protocol) == 2
    for item in protocol:
        query = str(item["Query"][0, 0][0][0])
        box = item["Query"][0, 0][1].squeeze().astype(np.int32)
        [row] = np.flatnonzero((images[query] == box).all(axis=1))
        pid = truth[query][2][row]
        assert str(item["Query"][0, 0][3][0]) == f"p{pid + 1}"
        gallery = item["Gallery"].squeeze()
        names = [str(row[0][0]) for row in gallery]
        assert len(set(names)) == len(names) >= 2
        assert query not in names
        sizes = [row[1][0].size for row in gallery]  # the access of SeqNet's evaluation
        num_true = sizes.count(4)
        assert num_true >= 1
        assert sizes == [4] * num_true + [0] * (len(sizes) - num_true)
        assert all(row[1].shape == (1, 0) for row in gallery[num_true:])
        seen = {name for name, (_, _, pids) in truth.items() if pid in pids}
        assert set(names[:num_true]) == seen - {query}
        assert set(names[num_true:]) == set(list(images)[TRAIN:]) - seen


def test_cuhk_sysu_subsets_ask_for_hard_boxes(written):
    root = written("cuhk-sysu")
    for name, key in (("Occlusion", "Occlusion1"), ("Resolution", "Test_Size")):
        queries = loadmat(root / "annotation" / "test" / "subset" / f"{name}.mat")[key].squeeze()
        assert len(queries) == 2
        assert all(len(item["Gallery"].squeeze()) >= 2 for item in queries)


def test_prw_matrices_lists_and_queries_agree(written):
    root = written("prw")
    ids = {}
    for half in ("train", "test"):
        frames = [str(name[0][0]) for name in loadmat(root / f"frame_{half}.mat")[f"img_index_{half}"]]
        found = [loadmat(str(root / "annotations" / f"{name}.jpg"))["box_new"] for name in frames]
        assert all(matrix.shape[1] == 5 for matrix in found)
        ids[half] = np.concatenate(found)[:, 0]
        assert set(ids[half][ids[half] > 0]) == set(loadmat(root / f"ID_{half}.mat")[f"ID_{half}"][0])
    assert set(ids["train"]) - {-2} == {1, 2, 3, 4}
    assert set(ids["test"]) - {-2} == {5, 6}
    assert -2 in ids["train"]
    content = (root / "query_info.txt").read_bytes()
    assert content.count(b"\r\n") == content.count(b"\n") >= 4
    cameras = {}
    for line in content.decode().splitlines():
        pid, *box, frame = line.strip().split(" ")
        matrix = loadmat(str(root / "annotations" / f"{frame}.jpg"))["box_new"]
        assert [int(pid), *map(float, box)] in matrix.tolist()
        cameras.setdefault(pid, []).append(re.match(r"c([1-6])s\d_\d{6}$", frame)[1])
    assert all(len(set(seen)) == len(seen) >= 2 for seen in cameras.values())


def test_posetrack21_queries_are_annotations_of_val(written):
    root = written("posetrack21")
    halves = {
        half: json.loads((root / "posetrack_person_search" / f"{half}.json").read_text())
        for half in ("train", "val", "query")
    }
    people = {half: {one["person_id"] for one in content["annotations"]} for half, content in halves.items()}
    assert people["train"] - {-1} == {0, 1, 2, 3}
    assert people["val"] - {-1} == people["query"] == {4, 5}
    for half in ("train", "val"):
        names = {image["id"]: image["file_name"] for image in halves[half]["images"]}
        assert all(re.fullmatch(rf"images/{half}/\d{{6}}_\w+/\d{{6}}\.jpg", name) for name in names.values())
        assert all((root / name).is_file() for name in names.values())
        assert {one["image_id"] for one in halves[half]["annotations"]} <= set(names)
        ids = [one["id"] for one in halves[half]["annotations"]]
        assert len(set(ids)) == len(ids)
        assert all(len(one["keypoints"]) == 51 for one in halves[half]["annotations"])
    assert all(one in halves["val"]["annotations"] for one in halves["query"]["annotations"])
    assert {one["image_id"] for one in halves["query"]["annotations"]} == {
        image["id"] for image in halves["query"]["images"]
    }


def annotated_boxes(name, root):
    """Image name -> xyxy boxes in the order of the annotation files."""
    if name == "cuhk-sysu":
        return {image: xyxy(boxes) for image, boxes in cuhk_images(root).items()}
    if name == "prw":
        paths = sorted((root / "annotations").iterdir())
        return {path.name.removesuffix(".mat"): xyxy(loadmat(path)["box_new"][:, 1:]) for path in paths}
    boxes = {}
    for half in ("train", "val"):
        content = json.loads((root / "posetrack_person_search" / f"{half}.json").read_text())
        names = {image["id"]: image["file_name"] for image in content["images"]}
        boxes |= {image: [] for image in names.values()}
        for one in content["annotations"]:
            boxes[names[one["image_id"]]].append(one["bbox"])
    return {image: xyxy(found) for image, found in boxes.items()}


@pytest.mark.parametrize("name", PERSON_SEARCH_SETS)
def test_the_truth_has_a_code_for_every_annotated_box_in_order(written, name):
    root = written(name)
    truth, boxes = truth_of(root), annotated_boxes(name, root)
    assert set(truth) == set(boxes)
    assert all(np.array_equal(truth[image][0], boxes[image]) for image in truth)
    codes, pids = (np.concatenate([row[part] for row in truth.values()]) for part in (1, 2))
    assert codes.shape == (len(pids), 64)
    assert np.allclose(np.linalg.norm(codes, axis=1), 1, atol=1e-5)
    of_named = {pid: np.unique(codes[pids == pid], axis=0) for pid in set(pids) - {UNLABELLED}}
    assert all(len(found) == 1 for found in of_named.values())
    assert len({tuple(found[0]) for found in of_named.values()}) == PEOPLE
    assert (pids == UNLABELLED).any()


@pytest.mark.parametrize("name", PERSON_SEARCH_SETS)
def test_our_reader_of_a_person_search_set_agrees_with_the_truth(written, name):
    root = written(name)
    truth = truth_of(root)
    data = load_person_search(name, root)
    assert (len(data.train), len(data.test), data.num_train_pids) == (TRAIN, IMAGES - TRAIN, 4)
    # A reader may number people otherwise, but one to one.
    pairs = set()
    for image in [*data.train, *data.test]:
        boxes, _, pids = truth[image.name]
        assert np.array_equal(image.boxes_xyxy, boxes)
        assert cv2.imread(str(image.path)).shape == (HEIGHT, WIDTH, 3)
        pairs |= set(zip(image.pids.tolist(), pids.tolist(), strict=True))
    assert len(pairs) == len({pid for pid, _ in pairs}) == len({pid for _, pid in pairs}) == PEOPLE + 1
    number = dict(pairs)
    assert {number[query.pid] for query in data.queries} == set(sorted(number.values())[-2:])
    for query in data.queries:
        seen = {
            index
            for index, image in enumerate(data.test)
            if number[query.pid] in truth[image.name][2] and index != query.image
        }
        assert set(query.truth) == seen
        assert seen


def test_crowdhuman_lines_hold_boxes_inside_the_image(written):
    root = written("crowdhuman")
    counts = {}
    for part in ("train", "val"):
        lines = [json.loads(line) for line in (root / f"annotation_{part}.odgt").read_text().splitlines()]
        counts[part] = len(lines)
        for line in lines:
            assert (root / "Images" / f"{line['ID']}.jpg").is_file()
            for one in line["gtboxes"]:
                left, top, right, bottom = xyxy(one["fbox"])[0]
                assert 0 <= left < right <= WIDTH
                assert 0 <= top < bottom <= HEIGHT
                assert (one["tag"] == "mask") == (one["extra"].get("ignore") == 1)
                assert one["vbox"][3] <= one["fbox"][3]
    assert counts == {"train": TRAIN, "val": IMAGES - TRAIN}
    data = load_detection("crowdhuman", root)
    assert (len(data.train), len(data.test)) == (TRAIN, IMAGES - TRAIN)
    assert sum(len(image.boxes_xyxy) for image in data.train) > TRAIN


def test_eurocity_frames_are_png_by_day_and_darker_by_night(written):
    root = written("eurocity")
    brightness = {}
    for time in ("day", "night"):
        labels = sorted((root / time / "labels").rglob("*.json"))
        images = sorted((root / time / "img").rglob("*.png"))
        tree = [path.relative_to(root / time / "labels").with_suffix("") for path in labels]
        assert tree == [path.relative_to(root / time / "img").with_suffix("") for path in images]
        for path in labels:
            frame = json.loads(path.read_text())
            assert (frame["identity"], frame["imagewidth"], frame["imageheight"]) == ("frame", WIDTH, HEIGHT)
            assert all(one["x0"] < one["x1"] <= WIDTH for one in frame["children"])
            assert {one["identity"] for one in frame["children"]} <= {"pedestrian"}
        pictures = [cv2.imread(str(path)) for path in images]
        assert {picture.shape for picture in pictures} == {(HEIGHT, WIDTH, 3)}
        brightness[time] = len(pictures), np.mean(pictures)
    assert (brightness["day"][0], brightness["night"][0]) == (16, 4)
    assert brightness["night"][1] < 0.7 * brightness["day"][1]
    for time in ("day", "night"):
        data = load_detection(f"eurocity-{time}", root)
        assert len(data.train) + len(data.test) == brightness[time][0]


def crops_in(folder, pattern):
    """(pid, camera) of every file of a folder."""
    found = [re.match(pattern, path.name) for path in sorted(folder.iterdir())]
    return [(int(match[1]), int(match[2])) for match in found]


def check_split(train, query, gallery):
    """Nobody is in both halves, and every query has a match that another camera took."""
    assert not {pid for pid, _ in train} & {pid for pid, _ in [*query, *gallery]}
    assert len({pid for pid, _ in train if pid >= 0}) == 4
    assert len({pid for pid, _ in query}) == 2
    for pid, camera in query:
        assert any(other == pid and other_camera != camera for other, other_camera in gallery)


FOLDERS = ("bounding_box_train", "query", "bounding_box_test")


@pytest.mark.parametrize(
    ("name", "root", "pattern"),
    [
        ("market1501", ".", r"(-1|\d{4})_c([1-6])s\d_\d{6}_\d\d\.jpg$"),
        ("dukemtmc", ".", r"(\d{4})_c([1-8])_f\d{7}\.jpg$"),
        ("cuhk03-np", "labeled", r"(\d{4})_c([12])_\d+\.png$"),
        ("cuhk03-np", "detected", r"(\d{4})_c([12])_\d+\.png$"),
    ],
)
def test_folders_of_crops_have_the_names_of_the_release(written, name, root, pattern):
    crops = [crops_in(written(name) / root / folder, pattern) for folder in FOLDERS]
    check_split(*crops)
    if name == "market1501":
        assert {pid for pid, _ in crops[2]} >= {-1, 0}
    kind = "-".join([name, *([root] if root != "." else [])])
    data = load_reid(kind, written(name))
    kept = [[pair for pair in found if pair[0] >= 0] for found in crops]
    assert [len(data.train), len(data.query), len(data.gallery)] == [len(found) for found in kept]
    assert {(crop.pid, crop.camera) for crop in data.gallery} == set(kept[2])
    assert cv2.imread(str(data.query[0].path)).shape == (128, 64, 3)


def test_msmt17_lists_name_the_files_and_labels_begin_at_0(written):
    root = written("msmt17")
    crops = {}
    for part, half in (("train", "train"), ("val", "train"), ("query", "test"), ("gallery", "test")):
        crops[part] = []
        for line in (root / f"list_{part}.txt").read_text().splitlines():
            path, label = line.split(" ")
            assert (root / half / path).is_file()
            assert path.startswith(f"{int(label):04d}/{int(label):04d}_")
            camera = path.split("/")[1].split("_")[2]
            assert len(camera) == 2
            crops[part].append((int(label), int(camera)))
    assert {pid for pid, _ in crops["train"]} == {pid for pid, _ in crops["val"]} == {0, 1, 2, 3}
    moved = [[(pid + 4, camera) for pid, camera in crops[part]] for part in ("query", "gallery")]
    check_split(crops["train"], *moved)
    assert {camera for pairs in crops.values() for _, camera in pairs} <= set(range(1, 16))
    data = load_reid("msmt17", root)
    assert len(data.train) == len(crops["train"]) + len(crops["val"])
    assert (len(data.query), len(data.gallery)) == (len(crops["query"]), len(crops["gallery"]))


def test_luperson_has_the_same_crops_in_lmdb_and_folder(written):
    root = written("luperson")
    keys = pickle.loads((root / "keys.pkl").read_bytes())["keys"]
    assert all(re.fullmatch(r"\d\d_\d\d_\d{4}_\d{8}", key) for key in keys)
    with lmdb.open(str(root / "lmdb"), readonly=True, lock=False) as store, store.begin() as transaction:
        for key in keys:
            content = transaction.get(key.encode())
            assert content == (root / "images" / f"{key}.jpg").read_bytes()
            assert cv2.imdecode(np.frombuffer(content, np.uint8), 1).shape == (128, 64, 3)
    assert len(load_reid("luperson", root).train) == len(set(keys)) == PEOPLE * 4


@pytest.mark.parametrize("kind", ["labeled", "detected"])
def test_cuhk03_images_unpack_to_the_names_of_the_new_protocol(written, kind):
    root = written("cuhk03")
    unpacked = {}
    with h5py.File(root / "cuhk03_release" / "cuhk-03.mat") as mat:
        assert mat[kind].shape == (1, 5)
        for pair, pair_reference in enumerate(mat[kind][0]):
            table = mat[pair_reference][:].T
            assert table.shape[1] == 10
            for person, references in enumerate(table):
                for column, reference in enumerate(references):
                    image = mat[reference][:].T
                    if image.size > 0 and image.ndim == 3:
                        view = 1 if column < 5 else 2
                        unpacked[f"{pair + 1}_{person + 1:03d}_{view}_{column + 1:02d}.png"] = image.shape
                    else:
                        assert mat[reference].attrs["MATLAB_empty"] == 1
        assert mat["testsets"].shape == (1, 20)
        tests = [mat[reference][:].T for reference in mat["testsets"][0]]
        assert all(rows.shape == (2, 2) and rows.min() >= 1 for rows in tests)
    protocol = loadmat(root / f"cuhk03_new_protocol_config_{kind}.mat")
    names = [str(name[0]) for name in protocol["filelist"].flatten()]
    assert set(names) == set(unpacked)
    assert set(unpacked.values()) == {(160, 60, 3)}
    crops = list(zip(protocol["labels"].flatten(), protocol["camId"].flatten(), strict=True))
    parts = ("train_idx", "query_idx", "gallery_idx")
    chosen = [protocol[part].flatten().astype(int) - 1 for part in parts]
    assert sorted(np.concatenate(chosen)) == list(range(len(names)))
    check_split(*[[crops[index] for index in indices] for indices in chosen])
    data = load_reid(f"cuhk03-{kind}", root)
    found = [len(data.train), len(data.query), len(data.gallery)]
    assert found == [len(indices) for indices in chosen]


def synth(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in ("synth", *arguments)])


def test_the_command_writes_a_set_and_refuses_other_folders(tmp_path):
    options = ("--format", "market1501", "--frames", 24, "--people", 4, "--seed", 2, "--workers", 1)
    for _ in range(2):
        result = synth(tmp_path / "market", *options)
        assert result.exit_code == 0, result.output
        assert result.stdout.strip() == str(tmp_path / "market")
    settings = json.loads((tmp_path / "market" / MARKER).read_text())
    assert (settings["format"], settings["seed"], settings["people"]) == ("market1501", 2, 4)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").touch()
    refused = synth(tmp_path / "thesis", *options)
    assert refused.exit_code == 1
    assert "error: out must be a new or empty folder" in refused.stderr
    wrong = synth(tmp_path / "x", "--format", "prw", "--frames", 20, "--people", 10)
    assert wrong.exit_code == 2
    assert "error: people must be at least 4 and at most a third" in wrong.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["market", "thesis"]


def test_the_command_knows_every_set():
    assert [one.value for one in COMMAND_SETS] == list(SETS)


@pytest.mark.slow
def test_the_command_writes_all_sets(tmp_path):
    result = synth(tmp_path, "--format", "all", "--frames", 12, "--width", 96, "--height", 64)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in Path(tmp_path).iterdir()) == sorted(SETS)
