import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from psdiff.training.synthetic.cameras import Camera, expose, random_camera
from psdiff.training.synthetic.composition import MIN_SIDE_PX, MIN_VISIBILITY, NOBODY, Standing, compose
from psdiff.training.synthetic.figures import draw_person
from psdiff.training.synthetic.people import EMBEDDING_DIM, appearance_code, random_person
from psdiff.training.synthetic.street import Street, random_frame

PLAIN = Camera(background_seed=0, shadow=0.0)


def somebody(left, top, pid=1, seed=0, height_px=120.0):
    person = random_person(np.random.default_rng(seed))
    rgb, alpha = draw_person(person, height_px, view=0.5, phase=0.2)
    return Standing(rgb, alpha, left, top, top + len(alpha), pid, appearance_code(person))


def picture(*standing):
    scene = np.full((240, 320, 3), (255, 0, 255), np.uint8)
    return scene, compose(PLAIN, scene, list(standing), np.random.default_rng(0))


@pytest.fixture(scope="module")
def street():
    return Street(11, num_people=5, width=320, height=192, duration_s=20)


def test_a_still_is_a_function_of_seed_and_index():
    first, again, other, later = (
        random_frame(*key, width=320, height=192) for key in ((1, 2), (1, 2), (2, 2), (1, 3))
    )
    assert first.image.tobytes() == again.image.tobytes()
    assert np.array_equal(first.boxes_xyxy, again.boxes_xyxy)
    assert np.array_equal(first.pids, again.pids)
    assert first.image.tobytes() != other.image.tobytes()
    assert first.image.tobytes() != later.image.tobytes()


def test_stills_keep_the_promises_of_a_labelled_frame():
    pids, counts = [], []
    for index in range(25):
        frame = random_frame(4, index, width=320, height=192)
        many = len(frame.pids)
        assert frame.image.shape == (192, 320, 3)
        assert frame.image.dtype == np.uint8
        assert frame.boxes_xyxy.shape == (many, 4)
        assert frame.embeddings.shape == (many, EMBEDDING_DIM)
        assert {a.dtype for a in (frame.boxes_xyxy, frame.embeddings, frame.visibility)} <= {
            np.dtype("float32")
        }
        assert frame.pids.dtype == np.int64
        left, top, right, bottom = frame.boxes_xyxy.T
        assert (right - left >= MIN_SIDE_PX).all()
        assert (bottom - top >= MIN_SIDE_PX).all()
        assert ((frame.boxes_xyxy >= 0) & (frame.boxes_xyxy <= (320, 192, 320, 192))).all()
        assert ((frame.visibility >= MIN_VISIBILITY) & (frame.visibility <= 1)).all()
        pids += frame.pids.tolist()
        counts.append(many)
    assert len(set(pids)) == len(pids)
    assert 2.5 < np.mean(counts) < 6.5


def test_a_box_is_tight_around_the_pixels_that_differ():
    for seed in range(6):
        scene, frame = picture(somebody(60, 20, seed=seed))
        empty = compose(PLAIN, scene, [], np.random.default_rng(0)).image
        differs = np.abs(frame.image.astype(int) - empty).max(axis=2) > 100
        rows, columns = np.flatnonzero(differs.any(axis=1)), np.flatnonzero(differs.any(axis=0))
        seen = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert np.abs(frame.boxes_xyxy[0] - seen).max() <= 2
        assert frame.visibility[0] == 1.0


def test_an_occluder_in_front_takes_its_share_of_the_visibility():
    person = somebody(60, 20)
    middle = 20 + 75
    board = np.full((120, 320, 3), 90, np.uint8)
    hides_below = Standing(board, np.ones((120, 320), np.float32), 0, middle, 300.0)
    solid = person.alpha >= 0.4
    _, frame = picture(person, hides_below)
    assert frame.visibility[0] == pytest.approx(solid[:75].sum() / solid.sum(), abs=1e-5)
    assert frame.boxes_xyxy[0, 3] > middle
    behind = Standing(board, hides_below.alpha, 0, middle, 1.0, NOBODY)
    assert picture(person, behind)[1].visibility[0] == 1.0


def test_people_cut_off_are_clipped_and_people_hardly_seen_are_left_out():
    solid = somebody(0, 0).alpha >= 0.4
    columns = np.flatnonzero(solid.any(axis=0))
    half = -int(columns.mean())
    _, frame = picture(somebody(half, 20))
    assert frame.boxes_xyxy[0, 0] == 0
    assert 0.3 < frame.visibility[0] < 0.75
    assert not len(picture(somebody(-int(columns[-1]) + 3, 20))[1].pids)


def test_a_nearer_person_hides_a_farther_one():
    far, near = somebody(60, 10, pid=1, seed=1), somebody(66, 30, pid=2, seed=2)
    _, frame = picture(near, far)
    share = dict(zip(frame.pids.tolist(), frame.visibility.tolist(), strict=True))
    assert share[2] == 1.0
    assert share.get(1, 0.0) < 0.8


def test_exposure_brightens_tints_and_compresses():
    grey = np.full((64, 64, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    bright = expose(Camera(0, gain=1.5, tint=(1.2, 1.0, 0.8)), grey, rng)
    assert bright[32, 32].tolist() == pytest.approx([180, 150, 120], abs=2)
    noisy = expose(Camera(0, noise_sigma=8.0), grey, rng).astype(float)
    assert 6 < noisy.std() < 12
    assert noisy.mean() == pytest.approx(100, abs=1.5)
    packed = expose(Camera(0, noise_sigma=8.0, jpeg_quality=30), grey, rng)
    assert packed.std() < noisy.std()


def test_random_cameras_differ():
    rng = np.random.default_rng(0)
    cameras = [random_camera(rng) for _ in range(20)]
    assert len({camera.background_seed for camera in cameras}) == 20
    assert all(0 < camera.far_scale < camera.near_scale for camera in cameras)


def test_a_street_is_deterministic_whatever_was_drawn_before(street):
    same = Street(11, num_people=5, width=320, height=192, duration_s=20)
    same.frame(1, 3.0)
    assert street.frame(0, 7.3).image.tobytes() == same.frame(0, 7.3).image.tobytes()
    other = Street(12, num_people=5, width=320, height=192, duration_s=20)
    assert other.frame(0, 7.3).image.tobytes() != street.frame(0, 7.3).image.tobytes()


def test_noise_differs_from_frame_to_frame(street):
    first, second = street.frame(1, 5.0).image.astype(int), street.frame(1, 5.1).image.astype(int)
    assert (np.abs(first - second) > 0).mean() > 0.3


def test_everybody_is_seen_by_every_camera_and_never_by_two_at_once(street):
    for camera in range(2):
        seen = {pid for t in np.arange(0, 20, 0.5) for pid in street.frame(camera, t).pids.tolist()}
        assert seen == set(range(5))
    for t in np.arange(0, 20, 1.0):
        assert not set(street.frame(0, t).pids.tolist()) & set(street.frame(1, t).pids.tolist())


def test_people_move_smoothly(street):
    compared = 0
    frames = [street.frame(0, t) for t in np.arange(3, 9, 0.1)]
    for now, then in pairwise(frames):
        for pid in set(now.pids.tolist()) & set(then.pids.tolist()):
            before, after = (f.boxes_xyxy[f.pids.tolist().index(pid)] for f in (now, then))
            inside = (before[0] > 0) & (before[2] < 320) & (after[0] > 0) & (after[2] < 320)
            if inside:
                moved = np.hypot(*((after - before).reshape(2, 2).mean(axis=0)))
                # A foot swings about twice as fast as its owner walks, and the box goes with it.
                assert moved < 0.18 * (before[3] - before[1])
                compared += 1
    assert compared > 40


def test_embeddings_are_the_codes_of_the_cast(street):
    frame = street.frame(0, 8.0)
    assert np.array_equal(frame.embeddings, street.codes[frame.pids])


def test_a_street_needs_people():
    with pytest.raises(ValueError, match="must be positive, got 0, 2 and 60"):
        Street(0, num_people=0)


def test_the_street_needs_no_torch():
    code = "import sys, psdiff.training.synthetic.clips; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
