"""Starts below T: the algebra, what a camera expects, when it starts cold, batches of both."""

import numpy as np
import pytest
from psdiff.models.detections import Detections
from psdiff.models.detector import Detector, canvas_of
from psdiff.models.preprocess import Letterbox, seeded_noise
from psdiff.models.renoising import noised, people_at, shared_out, timesteps_from
from psdiff.models.sampling import SamplerSettings, StepOutput, denoise, sampling_timesteps
from psdiff.models.solvers import SamplerOptions, Schedule, boxes_to_signal
from psdiff.runtime.detector import open_detector
from psdiff.runtime.tracks import CameraTracks
from psdiff.runtime.warm_start import (
    LEAST_CORRELATION,
    Shot,
    WarmDetector,
    WarmSettings,
    correlation,
    expected,
    thumbnail,
    warm_threshold,
)

SETTINGS = SamplerSettings(
    width=160,
    height=96,
    num_proposals=20,
    embedding_dim=4,
    box_scale=2.0,
    timesteps={steps: sampling_timesteps(steps, 1000, 3.0) for steps in (1, 2, 4, 8)},
    score_threshold=0.0,
    embedding_scale=3.0,
    num_timesteps=1000,
)
BOXES = np.array([[0.1, 0.2, 0.3, 0.8], [0.6, 0.3, 0.7, 0.9]], np.float32)
LOOKS = np.eye(4, dtype=np.float32)[:2]


class KeepingEngine:
    """Predicts the boxes it is given; notes the timesteps of each call."""

    def __init__(self):
        self.times = []

    def backbone(self, images):
        return [images.astype(np.float32).mean(axis=(1, 2, 3))]

    def denoise_step(self, features, boxes_t, emb_t, t, t_next):
        self.times.append((t.tolist(), t_next.tolist()))
        boxes = (boxes_t.clip(-2, 2) / 2 + 1) / 2
        xyxy = np.concatenate(
            [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
        )
        scores = np.full(boxes_t.shape[:2], 0.5, np.float32) + features[0][:, None] / 1000
        embeddings = emb_t / np.linalg.norm(emb_t, axis=-1, keepdims=True)
        later = (t_next[:, None, None] + 2).astype(np.float32) / 1000
        return StepOutput(boxes_t * later, emb_t * later, xyxy, scores, embeddings)


def picture(seed=0, width=160, height=96):
    """Large patches of grey, like a scene: other seeds, other scenes."""
    patches = np.random.default_rng(seed).integers(0, 255, (6, 10, 1), dtype=np.uint8)
    return np.kron(patches, np.ones((height // 6, width // 10, 3), np.uint8))


def tracked(boxes=((20, 20, 36, 60),), time_s=0.0, size=(160, 96), tracks=None, seq=0):
    """Tracks of a camera that saw these boxes, in frame pixels."""
    tracks = tracks or CameraTracks()
    found = np.array(boxes, np.float32).reshape(-1, 4)
    people = Detections(found, np.full(len(found), 0.9, np.float32), LOOKS[: len(found)])
    tracks.update(people, time_s, seq, size)
    return tracks


def shot(tracks, time_s=0.2, *, image=None, camera="gate", connection=0, seed=5):
    image = picture() if image is None else image
    return Shot(camera, image, time_s, connection, seed, tracks)


def test_noising_has_the_mean_and_the_spread_of_the_forward_process():
    noise = np.random.default_rng(0).standard_normal((200_000,)).astype(np.float32)
    for t in (0, 299, 998):
        level = Schedule(1000).at(t)
        x_t = noised(np.full(200_000, 1.5, np.float32), noise, t, SETTINGS)
        assert x_t.mean() == pytest.approx(1.5 * level.signal, abs=0.01)
        assert x_t.std() == pytest.approx(level.noise, rel=0.01)
    np.testing.assert_array_equal(noised(noise, noise, -1, SETTINGS), noise)


def test_known_people_are_repeated_and_noised_and_the_rest_is_fresh():
    boxes_t, emb_t = people_at(BOXES, LOOKS, 299, 7, SETTINGS, fresh_share=0.35)
    level = Schedule(1000).at(299)
    noise = seeded_noise(7, 20, 4)
    clean_boxes = (boxes_t - level.noise * noise[0]) / level.signal
    clean_emb = (emb_t - level.noise * noise[1]) / level.signal
    # 7 of 20 are fresh; the first of two people has the odd place.
    for i in range(13):
        np.testing.assert_allclose(clean_boxes[i], boxes_to_signal(BOXES, 2.0)[i % 2], atol=1e-5)
        np.testing.assert_allclose(clean_emb[i], 3.0 * LOOKS[i % 2], atol=1e-5)
    np.testing.assert_allclose(clean_emb[13:], 0, atol=1e-5)
    assert len(np.unique(clean_boxes[13:].round(4), axis=0)) == 7


@pytest.mark.parametrize(
    ("people", "proposals", "share", "most", "counts"),
    [
        (3, 20, 0.3, None, [5, 5, 4]),
        (3, 20, 0.3, 2, [2, 2, 2]),
        (3, 20, 1.0, None, [0, 0, 0]),
        (30, 20, 0.5, None, [1] * 10 + [0] * 20),
        (2, 9, 0.3, None, [3, 3]),
    ],
)
def test_at_least_the_share_is_fresh(people, proposals, share, most, counts):
    origin = shared_out(people, proposals, share, most)
    assert [origin.count(i) for i in range(people)] == counts
    assert proposals - len(origin) >= share * proposals


def fresh_boxes(kind):
    """20000 clean ones, cxcywh normalised."""
    settings = SamplerSettings(**(vars(SETTINGS) | {"num_proposals": 20_000}))
    boxes_t, _ = people_at(BOXES[:0], LOOKS[:0], 0, 3, settings, fresh_share=0.5, fresh=kind)
    level = Schedule(1000).at(0)
    return ((boxes_t - level.noise * seeded_noise(3, 20_000, 4)[0]) / level.signal / 2 + 1) / 2


def test_gaussian_fresh_boxes_lie_around_the_middle():
    centres = fresh_boxes("gaussian")[:, :2]
    assert centres.mean() == pytest.approx(0.5, abs=0.01)
    assert centres.std() == pytest.approx(1 / 6, rel=0.02)


def test_spread_fresh_boxes_lie_everywhere_and_are_shaped_like_people():
    boxes = fresh_boxes("spread")
    share_at_the_sides = ((boxes[:, 0] < 0.1) | (boxes[:, 0] > 0.9)).mean()
    assert 0.2 < share_at_the_sides < 0.35
    whole = (boxes[:, 0] - boxes[:, 2] / 2 > 0.01) & (boxes[:, 0] + boxes[:, 2] / 2 < 0.99)
    whole &= (boxes[:, 1] - boxes[:, 3] / 2 > 0.01) & (boxes[:, 1] + boxes[:, 3] / 2 < 0.99)
    assert 0.119 < boxes[whole, 3].min() < boxes[whole, 3].max() < 0.801
    np.testing.assert_allclose(boxes[whole, 2] * 160, 0.4 * boxes[whole, 3] * 96, rtol=1e-2)
    # Who comes in is seen in part.
    assert 0.05 < (boxes[:, 2] * 160 < 0.38 * boxes[:, 3] * 96).mean() < 0.3


def test_the_same_seed_gives_the_same_start_and_another_seed_another():
    one, same, other = (people_at(BOXES, LOOKS, 299, seed, SETTINGS, fresh_share=0.5) for seed in (1, 1, 2))
    for part, again, else_ in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(part, again)
        assert (part != else_).all()


def test_the_grid_from_the_last_timestep_is_the_models_own_and_below_it_is_shrunk():
    for steps, grid in SETTINGS.timesteps.items():
        assert timesteps_from(999, steps, SETTINGS) == grid
    assert timesteps_from(299, 1, SETTINGS) == [299]
    assert timesteps_from(299, 2, SETTINGS) == [299, 36]
    assert timesteps_from(7, 8, SETTINGS) == [7, 6, 5, 4, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("start", "steps", "message"),
    [
        (1000, 1, "start must be a timestep from 0 to 999, got 1000"),
        (-1, 1, "start must be a timestep from 0 to 999, got -1"),
        (299, 3, "steps must be a whole number from 1 to 8, got 3"),
        (5, 8, "steps must be a whole number from 1 to 6, got 8"),
    ],
)
def test_a_grid_that_is_not_there_is_refused(start, steps, message):
    with pytest.raises(ValueError, match=message):
        timesteps_from(start, steps, SETTINGS)


def test_a_bundle_that_does_not_tell_its_noise_has_no_warm_start():
    silent = SamplerSettings(**(vars(SETTINGS) | {"num_timesteps": None}))
    with pytest.raises(ValueError, match="bundle must hold num_timesteps to start below T, got none"):
        WarmDetector(Detector(KeepingEngine(), silent))
    silent = SamplerSettings(**(vars(SETTINGS) | {"embedding_scale": None}))
    with pytest.raises(ValueError, match="bundle must hold embedding_scale for a warm start, got none"):
        WarmDetector(Detector(KeepingEngine(), silent))
    with pytest.raises(ValueError, match="bundle must hold embedding_scale to start from people, got none"):
        people_at(BOXES, LOOKS, 299, 0, silent, fresh_share=0.5)


def test_settings_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"fresh_share must be in \[0.3, 1\], got 0.2"):
        WarmSettings(fresh_share=0.2)
    with pytest.raises(ValueError, match="timestep must be from 0 to 998, got 999"):
        WarmDetector(Detector(KeepingEngine(), SETTINGS), WarmSettings(timestep=999))


def test_people_are_expected_where_their_velocity_takes_them():
    tracks = tracked(time_s=0.0)
    tracked([(28, 20, 44, 60)], 0.2, tracks=tracks, seq=1)
    boxes_norm, embeddings = expected(tracks, 0.4, Letterbox(160, 96, 160, 96), 1.0)
    np.testing.assert_allclose(boxes_norm * [160, 96, 160, 96], [[36, 20, 52, 60]], atol=1e-4)
    np.testing.assert_allclose(embeddings, LOOKS[:1], atol=1e-6)


def test_who_left_the_frame_or_was_not_seen_for_long_is_not_expected():
    letterbox = Letterbox(160, 96, 160, 96)
    tracks = tracked([(130, 20, 146, 60)], 0.0)
    tracked([(140, 20, 156, 60)], 0.2, tracks=tracks, seq=1)
    assert len(expected(tracks, 0.4, letterbox, 1.0)[0]) == 1
    assert len(expected(tracks, 0.6, letterbox, 1.0)[0]) == 0
    stands = tracked([(20, 20, 36, 60)], 0.0)
    assert len(expected(stands, 1.0, letterbox, 1.0)[0]) == 1
    assert len(expected(stands, 1.1, letterbox, 1.0)[0]) == 0


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "warm"),
        ({"time_s": 1.0}, "warm"),
        ({"time_s": 1.1}, "nobody"),
        ({"time_s": 1.3}, "gap"),
        ({"time_s": 0.1}, "gap"),
        ({"connection": 1}, "connection"),
        ({"image": picture(width=320, height=192)}, "size"),
        ({"image": picture(seed=1)}, "cut"),
        ({"image": np.zeros((96, 160, 3), np.uint8)}, "cut"),
        ({"image": picture() // 2 + 40}, "warm"),
        ({"camera": "hall"}, "first"),
        ({"tracks": None}, "off"),
        ({"tracks": CameraTracks()}, "nobody"),
    ],
)
def test_a_start_is_cold_for_a_reason(change, kind):
    warm = WarmDetector(Detector(KeepingEngine(), SETTINGS))
    tracks = tracked()
    assert warm.detect([shot(tracks, 0.2)], 1)[0].start == "first"
    arguments = {"tracks": tracks, "time_s": 0.4} | change
    assert warm.detect([shot(**arguments)], 1)[0].start == kind


def test_a_camera_that_was_forgotten_starts_cold():
    warm = WarmDetector(Detector(KeepingEngine(), SETTINGS))
    tracks = tracked()
    warm.detect([shot(tracks)], 1)
    warm.forget("gate")
    assert warm.detect([shot(tracks, 0.4)], 1)[0].start == "first"


def test_people_who_walk_by_are_no_cut_and_another_scene_is():
    def small(image):
        return thumbnail(canvas_of(image, SETTINGS))

    before, after = picture(), picture()
    before[30:90, 20:40] = 250
    after[30:90, 50:70] = 250
    assert correlation(small(before), small(after)) > LEAST_CORRELATION
    assert correlation(small(before), small(picture(seed=3))) < LEAST_CORRELATION


def test_a_batch_of_warm_and_cold_frames_is_what_each_would_be_alone():
    shots = {
        name: [
            shot(tracks, 0.2 * (i + 1), camera=name, seed=10 * i + len(name), image=picture(seed))
            for i in (0, 1)
        ]
        for name, tracks, seed in (
            ("gate", tracked(), 0),
            ("yard", None, 1),
            ("kiosk", tracked([(60, 20, 80, 70), (100, 10, 120, 60)]), 2),
        )
    }
    engine = KeepingEngine()
    settings = WarmSettings(score_thresholds={})
    together = WarmDetector(Detector(engine, SETTINGS), settings)
    together.detect([first for first, _ in shots.values()], 2)
    engine.times.clear()
    found = together.detect([second for _, second in shots.values()], 2)
    assert [each.start for each in found] == ["warm", "off", "warm"]
    assert engine.times == [([299, 999, 299], [36, 124, 36]), ([36, 124, 36], [-1, -1, -1])]
    for (first, second), each in zip(shots.values(), found, strict=True):
        alone = WarmDetector(Detector(KeepingEngine(), SETTINGS), settings)
        alone.detect([first], 2)
        [own] = alone.detect([second], 2)
        assert own.start == each.start
        assert len(own.people) > 0
        np.testing.assert_array_equal(own.people.boxes_xyxy, each.people.boxes_xyxy)
        np.testing.assert_array_equal(own.people.embeddings, each.people.embeddings)


def test_two_frames_of_a_camera_in_one_batch_start_from_the_same_tracks():
    tracks = tracked()
    warm = WarmDetector(Detector(KeepingEngine(), SETTINGS))
    found = warm.detect([shot(tracks, 0.2, seed=1), shot(tracks, 0.4, seed=2)], 2)
    assert [each.start for each in found] == ["first", "warm"]
    [later] = warm.detect([shot(tracks, 0.6, seed=3)], 2)
    assert later.start == "warm"


def test_a_cold_start_is_that_of_the_detector():
    detector = Detector(KeepingEngine(), SETTINGS)
    [plain] = detector.detect([picture()], 4, [5])
    [found] = WarmDetector(detector).detect([shot(tracked())], 4)
    assert found.start == "first"
    np.testing.assert_array_equal(found.people.boxes_xyxy, plain.boxes_xyxy)


def test_a_warm_start_has_a_threshold_of_its_own_where_that_is_above_the_models():
    calibrated = SamplerSettings(**(vars(SETTINGS) | {"score_thresholds": {1: 0.4, 2: 0.5, 4: 0.95}}))
    own = WarmSettings(score_thresholds={2: 0.9})
    assert [warm_threshold(own, calibrated, steps) for steps in (1, 2, 4)] == [0.4, 0.9, 0.95]
    # The engine's scores lie between 0.5 and 0.76.
    for highest, passes in ((0.9, False), (0.4, True)):
        settings = WarmSettings(score_thresholds={2: highest})
        warm = WarmDetector(Detector(KeepingEngine(), SETTINGS), settings)
        tracks = tracked()
        first, second = (warm.detect([shot(tracks, time_s)], 2)[0] for time_s in (0.2, 0.4))
        assert (first.start, second.start) == ("first", "warm")
        assert len(first.people) > 0
        assert (len(second.people) > 0) == passes


def test_nothing_in_is_nothing_out():
    assert WarmDetector(Detector(KeepingEngine(), SETTINGS)).detect([], 1) == []


def test_a_solver_on_the_host_wants_one_grid():
    start = tuple(part[None] for part in seeded_noise(0, 20, 4))
    grid = np.array([[299], [36]])
    with pytest.raises(ValueError, match="grid must be the same for every image"):
        denoise(KeepingEngine(), [], *start, grid, options=SamplerOptions("dpm1"), settings=SETTINGS)


def test_a_grid_of_another_length_is_refused():
    detector = Detector(KeepingEngine(), SETTINGS)
    with pytest.raises(ValueError, match="grid must hold 2 timesteps, one a step, got 1"):
        detector.detect_canvases([canvas_of(picture(), SETTINGS)], 2, grid=[299])


def test_the_shipped_model_takes_a_warm_and_a_cold_frame_in_one_batch(shipped):
    detector = open_detector(shipped, threads=1)
    frames = [np.random.default_rng(i).integers(0, 255, (384, 640, 3), dtype=np.uint8) for i in range(2)]
    canvases = [canvas_of(frame, detector.settings) for frame in frames]
    warm = people_at(BOXES, np.eye(64, dtype=np.float32)[:2], 299, 1, detector.settings, fresh_share=0.5)
    cold = seeded_noise(2, 100, 64)
    grids = [[299, 36], [999, 124]]

    def step(which):
        engine, states = detector.engine, [(warm, cold)[i] for i in which]
        features = engine.backbone(np.stack([canvases[i].image for i in which]))
        boxes_t, emb_t = (np.stack(part) for part in zip(*states, strict=True))
        return denoise(engine, features, boxes_t, emb_t, np.array([grids[i] for i in which]).T)

    together = step([0, 1])
    for i in (0, 1):
        alone = step([i])
        for part, own in zip(together, alone, strict=True):
            np.testing.assert_allclose(part[i], own[0], rtol=1e-3, atol=1e-3)
