"""The synthetic city: who is seen where, crops, looks, and how sets get onto the disk."""

import json

import cv2
import numpy as np
import pytest
from psdiff.training.city.city import City, Style
from psdiff.training.city.sets import SETS, usual_people, write_set
from psdiff.training.city.writing import MARKER, Plan, cell, finished_folder, struct, write_mat
from psdiff.training.datasets.schema import UNLABELLED
from psdiff.training.synthetic.people import appearance_code
from psdiff.training.synthetic.street import MAX_PEOPLE
from scipy.io import loadmat


def small_city(seed=3, **changes):
    return City(seed, **{"num_train_people": 8, "num_test_people": 5, "width": 192, "height": 112, **changes})


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_a_frame_depends_on_seed_split_and_number_only():
    first, second = small_city(), small_city()
    drawn = [first.frame("train", index) for index in range(4)]
    second.frame("test", 2)
    assert all(same(second.frame("train", index), drawn[index]) for index in (3, 0, 2, 1))
    assert not np.array_equal(first.frame("test", 0).image, drawn[0].image)
    assert not np.array_equal(small_city(4).frame("train", 0).image, drawn[0].image)


@pytest.mark.parametrize("split", ["train", "test"])
def test_everybody_stands_twice_in_full_view_before_two_cameras(split):
    city = small_city(num_cameras=3)
    seen = {pid: [] for pid in city.pids(split)}
    for index in range(2 * len(seen)):
        camera, lead = city.cast(split, index)
        frame = city.frame(split, index)
        [row] = np.flatnonzero(frame.pids == lead)
        assert frame.visibility[row] >= 0.75
        assert frame.boxes_xyxy[row, 3] - frame.boxes_xyxy[row, 1] >= 0.12 * 112
        seen[lead].append(camera)
    assert all(len(set(cameras)) == 2 for cameras in seen.values())


def test_the_splits_share_nobody_and_codes_belong_to_people():
    city = small_city()
    assert not set(city.pids("train")) & set(city.pids("test"))
    for split in ("train", "test"):
        for index in range(12):
            frame = city.frame(split, index)
            named = frame.pids[frame.pids != UNLABELLED]
            assert set(named) <= set(city.pids(split))
            assert len(set(named)) == len(named)
            for pid, code in zip(frame.pids, frame.embeddings, strict=True):
                assert pid == UNLABELLED or np.array_equal(code, appearance_code(city.people[pid]))


def test_crowds_sizes_and_strangers_are_as_promised():
    city = City(5, num_train_people=30)
    frames = [city.frame("train", index) for index in range(60, 105)]
    counts = [len(frame.pids) for frame in frames]
    assert min(counts) == 0
    assert max(counts) <= MAX_PEOPLE
    assert 3 < np.mean(counts) < 5
    pids = np.concatenate([frame.pids for frame in frames])
    assert 0.22 < (pids == UNLABELLED).mean() < 0.38
    heights = np.concatenate([frame.boxes_xyxy[:, 3] - frame.boxes_xyxy[:, 1] for frame in frames])
    assert heights.min() < 45
    assert heights.max() > 200
    strangers = [frame.embeddings[frame.pids == UNLABELLED] for frame in frames]
    assert len(np.unique(np.concatenate(strangers), axis=0)) == (pids == UNLABELLED).sum()


def test_a_city_without_names_shows_strangers():
    frame = small_city(num_train_people=0, num_test_people=0).frame("test", 1)
    assert len(frame.pids)
    assert set(frame.pids) == {UNLABELLED}


def test_crops_of_one_person_look_more_alike_than_crops_of_two():
    city = City(2, num_train_people=12, num_test_people=0)
    crops = np.array([[city.crop(pid, 0, shot, size=(64, 128)) for shot in range(2)] for pid in range(12)])
    assert crops.shape == (12, 2, 128, 64, 3)
    assert np.array_equal(crops[3, 1], city.crop(3, 0, 1, size=(64, 128)))
    bodies = crops[:, :, 30:110, 22:42].astype(float).reshape(12, 2, 4, 20, 20, 3).mean((3, 4))
    distances = np.linalg.norm(bodies[:, None, 0] - bodies[None, :, 1], axis=(2, 3))
    assert np.diag(distances).mean() < 0.6 * distances[~np.eye(12, dtype=bool)].mean()


def test_a_looser_box_shows_the_same_shot():
    city = small_city(width=640, height=384)
    tight, loose = (city.crop(1, 0, 0, size=(64, 128), slack=slack) for slack in (0.0, 0.05))
    assert 0 < np.abs(tight.astype(int) - loose).mean() < 40


def looks(style):
    """Warmth and sharpness of a style's crops, averaged over cameras."""
    city = City(1, num_train_people=8, num_test_people=0, style=style)
    crops = [city.crop(pid, pid % 6, 0, size=(64, 128)) for pid in range(8)] + [
        city.background_crop(camera, 0, size=(64, 128)) for camera in range(6)
    ]
    warmth = np.mean([crop[..., 0].mean() - crop[..., 2].mean() for crop in crops])
    smooth = [cv2.GaussianBlur(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), (0, 0), 0.8) for crop in crops]
    return warmth, np.mean([cv2.Laplacian(grey, cv2.CV_64F).std() for grey in smooth])


def test_two_styles_differ_in_colour_and_sharpness():
    warm, cold = (looks(Style("one", warmth=warmth)) for warmth in (0.06, -0.1))
    assert warm[0] > cold[0] + 8
    assert looks(Style("one", blur_sigma=1.0))[1] < 0.8 * looks(Style("one"))[1]
    sets = [(one.style.gain, one.style.warmth, one.style.noise_sigma) for one in SETS.values()]
    market, msmt = SETS["market1501"].style, SETS["msmt17"].style
    assert looks(market)[0] > looks(msmt)[0] + 8
    assert len(set(sets)) > 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_cameras": 1}, "num_cameras must be at least 2, got 1"),
        ({"num_test_people": -1}, "must be at least 0, got 8 and -1"),
        ({"height": 60}, "width and height must be at least 96 x 64, got 192 x 60"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"style": Style(crowd=9)}, "crowd must be between 0 and 9, got 9"),
    ],
)
def test_a_city_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_city(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": 7}, "people must be at least 4 and at most a third of the images"),
        ({"people": 3}, "got 3 people and 20 images"),
        ({"images": 3, "people": 0}, "images must be at least 4, got 3"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"images": 20, "people": 5, **changes})


def test_a_set_needs_a_known_name_and_names_people_or_not(tmp_path):
    with pytest.raises(ValueError, match="format must be one of cuhk-sysu, prw"):
        write_set("imagenet", tmp_path / "out", Plan(12, 4))
    with pytest.raises(ValueError, match="people must be 0 for crowdhuman, got 4"):
        write_set("crowdhuman", tmp_path / "out", Plan(12, 4))
    assert list(tmp_path.iterdir()) == []
    assert (usual_people("crowdhuman", 100), usual_people("prw", 100), usual_people("prw", 8)) == (0, 12, 4)


def write_half(out):
    with finished_folder(out, {}) as folder:
        (folder / "half.jpg").touch()
        assert not out.exists()
        raise RuntimeError


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "a" / "out")
    assert list((tmp_path / "a").iterdir()) == []


def test_only_a_folder_of_ours_is_replaced(tmp_path):
    out = tmp_path / "out"
    for turn in ("first", "second"):
        with finished_folder(out, {"turn": turn}) as folder:
            (folder / turn).touch()
    assert sorted(path.name for path in out.iterdir()) == ["second", MARKER]
    assert json.loads((out / MARKER).read_text()) == {"turn": "second"}
    (out / MARKER).unlink()
    with pytest.raises(FileExistsError, match="out must be a new or empty folder"), finished_folder(out, {}):
        pass
    assert (out / "second").exists()


def test_a_foreign_partial_folder_is_not_removed(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"out\.partial"), finished_folder(tmp_path / "out", {}):
        pass
    assert (tmp_path / "out.partial" / "thesis.txt").exists()


def test_a_mat_file_holds_cells_and_structs_and_no_time(tmp_path):
    inner = struct(("box", "name"), [(np.zeros((1, 0)), "a"), (np.ones((1, 4)), "b")])
    write_mat(tmp_path / "x.jpg.mat", {"names": cell(["s1", "s2"]), "people": inner, "none": inner[:, :0]})
    assert b"Created on" not in (tmp_path / "x.jpg.mat").read_bytes()
    variables = loadmat(str(tmp_path / "x.jpg"))  # which appends .mat
    assert [str(name[0][0]) for name in variables["names"]] == ["s1", "s2"]
    assert variables["people"][0, 0]["box"].shape == (1, 0)
    assert variables["people"][0, 1]["box"].tolist() == [[1, 1, 1, 1]]
    assert variables["none"].shape == (1, 0)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_the_number_of_workers_changes_no_byte(tmp_path):
    reported = []
    for workers in (1, 2):
        plan = Plan(64, 8, width=96, height=64, workers=workers, report=lambda *now: reported.append(now))
        write_set("prw", tmp_path / str(workers), plan)
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert reported == 2 * [(done, 64) for done in range(65)]


@pytest.mark.parametrize("name", ["cuhk-sysu", "cuhk03", "luperson"])
def test_the_same_seed_gives_the_same_bytes(tmp_path, name):
    for turn, seed in enumerate((1, 1, 2)):
        write_set(name, tmp_path / str(turn), Plan(12, 4, seed=seed, width=96, height=64))
    one, again, other = (contents(tmp_path / str(turn)) for turn in range(3))
    assert one == again
    assert one != other
