"""The protocol, on cases worked out by hand."""

import numpy as np
import pytest
from psdiff.models.detections import Detections, box_iou
from psdiff.training.evaluation.clips import (
    EvaluationSet,
    LabelledImage,
    Thresholds,
    assigned_pids,
    best_f1_threshold,
    best_views,
    load_evaluation_set,
    render_evaluation_set,
    search_hits,
    with_thresholds,
)


def labelled(boxes, pids, camera=0, visibility=None, street=0):
    return LabelledImage(
        street,
        camera,
        np.zeros((50, 50, 3), np.uint8),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(pids, np.int64),
        np.array(visibility or [1.0] * len(pids), np.float32),
    )


def detections(boxes, scores, embeddings=None):
    embeddings = [[1.0, 0.0]] * len(scores) if embeddings is None else embeddings
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.array(embeddings, np.float32).reshape(len(scores), 2),
    )


def test_iou_of_a_shifted_box():
    a, b = np.array([[0, 0, 10, 10]], np.float32), np.array([[5, 0, 15, 10], [20, 20, 30, 30]], np.float32)
    assert box_iou(a, b)[0].tolist() == pytest.approx([1 / 3, 0])


def test_a_person_belongs_to_the_best_scored_detection_and_counts_once():
    people = labelled([[0, 0, 10, 20]], [7])
    found = detections([[0, 0, 10, 20], [0, 1, 10, 20], [30, 30, 40, 50]], [0.6, 0.9, 0.8])
    assert assigned_pids(found, people).tolist() == [-1, 7, -1]


def test_the_best_threshold_is_the_lowest_value_still_called_true():
    values, is_true = np.array([0.9, 0.3, 0.8, 0.2, 0.7]), np.array([True, False, True, True, False])
    # From 0.8 on: 2 right of 2, 2 of 3 found, F1 0.8. Down to 0.2: 3 right of 5, 3 of 3 found, F1 0.75.
    assert best_f1_threshold(values, is_true, 3) == pytest.approx(0.8)


def test_the_query_is_the_largest_view_among_those_that_show_the_person_well():
    small, large = labelled([[0, 0, 10, 20]], [1]), labelled([[0, 0, 10, 40]], [1])
    hidden = labelled([[0, 0, 10, 45]], [1], visibility=[0.5])
    other_camera = labelled([[0, 0, 10, 48]], [1], camera=1)
    assert best_views([small, large, hidden, other_camera]) == {1: (large, 0)}


def test_the_thresholds_of_the_default_k_hold_for_the_others(manifest):
    found = {1: Thresholds(0.41, 0.6), 2: Thresholds(0.4567, 0.7), 4: Thresholds(0.5, 0.8)}
    updated = with_thresholds(manifest, found)
    assert (updated.score_threshold, updated.match_threshold) == (0.457, 0.7)
    assert updated.score_thresholds == {1: 0.41, 2: 0.457, 4: 0.5}
    assert with_thresholds(manifest, {1: found[1]}).score_threshold == 0.41


class EmbedsByHeight:
    """A detector whose embedding of a box is a direction that its height decides."""

    def embed(self, frame, boxes_xyxy, steps):
        angle = (boxes_xyxy[:, 3] - boxes_xyxy[:, 1]) / 100
        return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_a_search_hit_is_the_right_person_on_top_of_the_whole_gallery():
    images = [
        labelled([[0, 0, 10, 20], [20, 0, 30, 40]], [1, 2]),
        labelled([[0, 0, 10, 20], [20, 0, 30, 40]], [1, 2], camera=1),
        labelled([[0, 0, 10, 30]], [9], camera=1, street=1),
    ]
    direction = EmbedsByHeight().embed
    heights = {
        20: np.array([[0, 0, 1, 20.0]]),
        39: np.array([[0, 0, 1, 39.0]]),
        40: np.array([[0, 0, 1, 40.0]]),
    }
    unit = {height: direction(None, box, 1)[0] for height, box in heights.items()}
    # Person 1 is described right; person 2 a little off, and a stranger of another street is nearer.
    gallery = [
        detections([], [], np.zeros((0, 2))),
        detections(images[1].boxes_xyxy, [0.9, 0.9], [unit[20], unit[39]]),
        detections(images[2].boxes_xyxy, [0.9], [unit[40]]),
    ]
    pids = [np.zeros(0, np.int64), np.array([1, 2]), np.array([9])]
    assert search_hits(EmbedsByHeight(), images, gallery, pids, steps=1) == [True, False]


def test_the_evaluation_set_is_decoded_with_its_labels(tmp_path):
    settings = EvaluationSet(streets=1, people=3, duration_s=1.0, every=4)
    frames = []
    paths = render_evaluation_set(settings, tmp_path, lambda: frames.append(1))
    images = load_evaluation_set(settings, paths)
    assert len(frames) == 20
    assert [(image.street, image.camera) for image in images] == [(0, 0)] * 3 + [(0, 1)] * 3
    assert images[0].image.shape == (384, 640, 3)
    assert render_evaluation_set(settings, tmp_path, lambda: frames.append(1)) == paths
    assert len(frames) == 20, "clips that are there are not drawn again"
