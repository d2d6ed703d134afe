"""The host loop: grids, letterbox, noise, selection, over an engine that answers by rule."""

import numpy as np
import pytest
from psdiff.models.detections import Detections, non_maximum_suppression, select_detections
from psdiff.models.preprocess import PAD_VALUE, Letterbox, seeded_noise
from psdiff.models.sampling import (
    Detector,
    SamplerSettings,
    StepOutput,
    boxes_to_signal,
    sampling_timesteps,
)

SETTINGS = SamplerSettings(
    width=64,
    height=32,
    num_proposals=6,
    embedding_dim=4,
    box_scale=2.0,
    timesteps={steps: sampling_timesteps(steps, 1000, 1.0) for steps in range(1, 9)},
)


class RecordingEngine:
    """Answers with what it was given, so that a test sees what the loop handed over."""

    def __init__(self):
        self.calls = []

    def backbone(self, images):
        self.images = images
        return [images.astype(np.float32).mean(axis=(1, 2, 3))]

    def denoise_step(self, features, boxes_t, emb_t, t, t_next):
        self.calls.append((boxes_t.copy(), emb_t.copy(), t.tolist(), t_next.tolist()))
        embeddings = emb_t / np.linalg.norm(emb_t, axis=-1, keepdims=True)
        boxes = np.clip((boxes_t / 2 + 1) / 2, 0, 1)
        xyxy = np.concatenate(
            [boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], axis=-1
        )
        scores = np.full(boxes_t.shape[:2], 0.5, np.float32) + features[0][:, None] / 1000
        return StepOutput(boxes_t + 1, emb_t * 0.5, xyxy.astype(np.float32), scores, embeddings)


@pytest.mark.parametrize(
    ("steps", "grid"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 665, 332]),
        (4, [999, 749, 499, 249]),
        (5, [999, 799, 599, 399, 199]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124]),
    ],
)
def test_power_one_is_the_paper_grid(steps, grid):
    assert sampling_timesteps(steps, 1000, 1.0) == grid


def test_a_higher_power_visits_low_noise_and_stays_distinct():
    assert sampling_timesteps(4, 1000, 3.0) == [999, 420, 124, 14]
    for steps in range(1, 30):
        grid = sampling_timesteps(steps, 1000, 4.0)
        assert len(set(grid)) == steps
        assert grid == sorted(grid, reverse=True)
        assert grid[0] == 999
        assert grid[-1] >= 0


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_grid_of_no_or_too_many_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps must be a whole number from 1 to 1000, got {steps}"):
        sampling_timesteps(steps, 1000, 1.0)


def test_the_loop_walks_the_grid_and_ends_clean():
    engine = RecordingEngine()
    Detector(engine, SETTINGS).detect([np.zeros((32, 64, 3), np.uint8)], steps=3)
    assert [(call[2], call[3]) for call in engine.calls] == [
        ([999], [665]),
        ([665], [332]),
        ([332], [-1]),
    ]
    np.testing.assert_array_equal(engine.calls[1][0], engine.calls[0][0] + 1)


def test_a_frame_is_found_the_same_alone_and_in_a_batch():
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (40, 50 + i, 3), dtype=np.uint8) for i in range(3)]
    together = Detector(RecordingEngine(), SETTINGS).detect(frames, steps=2, seeds=[7, 8, 9])
    for i, frame in enumerate(frames):
        alone = Detector(RecordingEngine(), SETTINGS).detect([frame], steps=2, seeds=[7 + i])[0]
        np.testing.assert_array_equal(together[i].boxes_xyxy, alone.boxes_xyxy)
        np.testing.assert_array_equal(together[i].embeddings, alone.embeddings)


def test_embed_pins_the_box_at_every_step_and_averages_unit_vectors():
    engine = RecordingEngine()
    box = np.array([[10.0, 4.0, 20.0, 28.0]])
    embedding = Detector(engine, SETTINGS).embed(np.zeros((32, 64, 3), np.uint8), box, steps=3)
    expected = boxes_to_signal((box / [64, 32, 64, 32]).astype(np.float32), 2.0)
    for boxes_t, _, _, _ in engine.calls:
        np.testing.assert_allclose(boxes_t, np.repeat(expected, 8, axis=0)[None], atol=1e-6)
    assert embedding.shape == (1, 4)
    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-6)


def test_no_frames_and_no_boxes_are_no_work():
    detector = Detector(RecordingEngine(), SETTINGS)
    assert detector.detect([], steps=1) == []
    assert detector.embed(np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4)), steps=1).shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frames": [np.zeros((4, 4), np.uint8)]}, r"frames\[0\] must be a uint8 RGB array"),
        ({"frames": [np.zeros((4, 4, 3), np.float32)]}, r"frames\[0\] must be a uint8 RGB array"),
        ({"frames": [np.zeros((0, 4, 3), np.uint8)]}, r"frames\[0\] must be a uint8 RGB array"),
        (
            {"frames": [np.zeros((4, 4, 3), np.uint8)], "steps": 0},
            "steps must be a whole number from 1 to 8, got 0",
        ),
        ({"frames": [np.zeros((4, 4, 3), np.uint8)], "seeds": [1, 2]}, "seeds must be one per frame"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Detector(RecordingEngine(), SETTINGS).detect(**arguments)


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [9, 5, 5, 9], [70, 5, 90, 9], [-9, 1, -2, 5]])
def test_a_box_without_area_in_the_frame_is_refused(box):
    with pytest.raises(ValueError, match=r"boxes_xyxy\[0\] must be x1,y1,x2,y2"):
        Detector(RecordingEngine(), SETTINGS).embed(np.zeros((32, 64, 3), np.uint8), np.array([box]), steps=1)


@pytest.mark.parametrize("size", [(1920, 1080), (640, 384), (100, 700), (33, 17)])
def test_the_letterbox_brings_boxes_back(size):
    width, height = size
    letterbox = Letterbox(width, height, 640, 384)
    boxes = np.array(
        [[0, 0, width, height], [width * 0.2, height * 0.3, width * 0.5, height * 0.9]], np.float32
    )
    there = letterbox.boxes_to_canvas(boxes)
    assert there.min() >= 0
    assert there.max() <= 1 + 1e-6
    np.testing.assert_allclose(letterbox.boxes_to_frame(there), boxes, rtol=1e-5, atol=1e-3)


def test_the_letterbox_keeps_the_aspect_and_fills_with_grey():
    canvas = Letterbox(100, 100, 64, 32).image(np.full((100, 100, 3), 255, np.uint8))
    assert canvas.shape == (32, 64, 3)
    assert (canvas[:, :32] == 255).all()
    assert (canvas[:, 32:] == PAD_VALUE).all()


def test_noise_is_a_function_of_the_seed():
    first, again, other = seeded_noise(3, 50, 8), seeded_noise(3, 50, 8), seeded_noise(4, 50, 8)
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)
        assert a.dtype == np.float32


def test_suppression_keeps_what_overlaps_by_exactly_the_threshold():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 10, 5]], np.float32)
    scores = np.array([0.9, 0.8, 0.7, 0.95], np.float32)
    assert non_maximum_suppression(boxes, scores, 0.5).tolist() == [3, 0, 2]


def test_boxes_clipped_to_nothing_are_no_detections():
    boxes = np.array([[0, 0, 0, 5], [1, 1, 4, 4]], np.float32)
    found = select_detections(
        boxes, np.array([0.9, 0.4], np.float32), np.eye(2, dtype=np.float32), score_threshold=0.3, nms_iou=0.5
    )
    assert found.scores.tolist() == pytest.approx([0.4])


def test_suppressed_proposals_vote_on_the_embedding_by_score():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]], np.float32)
    scores = np.array([0.9, 0.3, 0.6], np.float32)
    embeddings = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)
    found = select_detections(boxes, scores, embeddings, score_threshold=0.5, nms_iou=0.5)
    wanted = np.array([[0.9, 0.3, 0], [0, 0, 0.6]])
    np.testing.assert_allclose(
        found.embeddings, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6
    )


def test_an_empty_frame_gives_no_detections():
    none = np.zeros(0, np.float32)
    found = select_detections(none.reshape(0, 4), none, none.reshape(0, 4), score_threshold=0.5, nms_iou=0.5)
    assert len(found) == 0


def test_detections_refuse_shapes_that_disagree():
    with pytest.raises(ValueError, match=r"boxes_xyxy must be of shape \(2, 4\), got \(1, 4\)"):
        Detections(np.zeros((1, 4), np.float32), np.zeros(2, np.float32), np.zeros((2, 3), np.float32))
