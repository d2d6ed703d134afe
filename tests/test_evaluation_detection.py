"""Detection scores by both conventions, on cases worked out by hand."""

from pathlib import Path

import numpy as np
import pytest
from psdiff.models.detections import Detections
from psdiff.training.datasets.schema import UNLABELLED, LabelledImage
from psdiff.training.evaluation.detection import evaluate_detection, precision_recall
from sklearn.metrics import average_precision_score

A, B, FAR = [0, 0, 40, 100], [100, 0, 140, 100], [300, 0, 340, 100]
# 95 and 60 of the 100 pixels of A's height.
A_95, A_60 = [0, 0, 40, 95], [0, 0, 40, 60]


def shown(*people):
    boxes = np.array([box for box, _ in people], np.float32).reshape(-1, 4)
    scores = np.array([score for _, score in people], np.float32)
    return Detections(boxes, scores, np.ones((len(people), 1), np.float32))


def labelled(*boxes, pids=None, ignored=None):
    return LabelledImage(
        "image",
        Path("image.jpg"),
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(pids or [UNLABELLED] * len(boxes), np.int64),
        ignored_xyxy=None if ignored is None else np.array(ignored, np.float32),
    )


def test_average_precision_times_recall_as_in_the_papers():
    # Ranked: .95 wrong (A belongs to the exact box), .9 right, .5 wrong: AP 1/2, and 1 of 3 people found.
    scores = evaluate_detection(
        [shown((A_95, 0.95), (A, 0.9), (FAR, 0.5)), shown()], [labelled(A, B), labelled(A)]
    )
    assert scores.recall == pytest.approx(1 / 3)
    assert scores.ap_recall == pytest.approx(1 / 6)
    assert scores.num_people == 3


def test_the_best_placed_detection_counts_in_the_papers_and_the_best_scored_in_ap50():
    scores = evaluate_detection([shown((A_60, 0.9), (A, 0.3))], [labelled(A)])
    assert (scores.recall, scores.ap_recall) == (1, 0.5)
    assert (scores.curve.recall, scores.curve.ap) == (1, 1)


def test_a_person_whose_best_detection_is_another_persons_is_missed_in_the_papers():
    # 75 pixels apart of 100: the one detection has IoU .6 with both and takes the first person only.
    scores = evaluate_detection([shown(([0, 25, 40, 125], 0.9))], [labelled(A, [0, 50, 40, 150])])
    assert scores.recall == 0.5
    assert scores.curve.recall == 0.5


def test_ap50_over_101_points():
    # Hit, miss, hit of three people: precision 1 up to recall 1/3, then 2/3 up to recall 2/3, then nothing.
    curve = precision_recall(np.array([0.9, 0.7, 0.8]), np.array([True, True, False]), 3)
    assert curve.recall == pytest.approx(2 / 3)
    assert curve.precision.tolist() == pytest.approx([1] * 34 + [2 / 3] * 33 + [0] * 34)
    assert curve.ap == pytest.approx((34 * 1.0 + 33 * 2 / 3) / 101)


def test_ap50_of_a_perfect_detector_is_one_and_of_a_blind_one_zero():
    assert precision_recall(np.array([0.9, 0.8]), np.array([True, True]), 2).ap == 1
    blind = precision_recall(np.zeros(0), np.zeros(0, bool), 3)
    assert (blind.ap, blind.recall) == (0, 0)


def test_labelled_only_asks_for_people_with_an_identity_and_identity_zero_is_one():
    images = [labelled(A, B, pids=[0, UNLABELLED]), labelled(A)]
    people = [shown((A, 0.9)), shown((FAR, 0.8))]
    scores = evaluate_detection(people, images, labelled_only=True)
    # The second image shows nobody with an identity and is left out, with its detection.
    assert (scores.num_people, scores.recall, scores.ap_recall) == (1, 1, 1)
    assert evaluate_detection(people, images).recall == pytest.approx(1 / 3)


def test_a_detection_in_an_ignored_region_counts_neither_way():
    crowd = [[300, 0, 360, 60]]
    # 60 of the 100 pixels of its height lie in the region; moved down by 20, only 40 do.
    inside, outside = (FAR, 0.95), ([300, 20, 340, 120], 0.95)
    assert evaluate_detection([shown(inside, (A, 0.9))], [labelled(A, ignored=crowd)]).ap_recall == 1
    assert evaluate_detection([shown(outside, (A, 0.9))], [labelled(A, ignored=crowd)]).ap_recall == 0.5
    assert evaluate_detection([shown(inside, (A, 0.9))], [labelled(A)]).curve.ap == 0.5


def test_a_person_found_in_an_ignored_region_still_counts():
    scores = evaluate_detection([shown((FAR, 0.9))], [labelled(FAR, ignored=[[290, 0, 350, 100]])])
    assert (scores.curve.ap, scores.ap_recall) == (1, 1)


def test_detections_below_the_threshold_do_not_count():
    scores = evaluate_detection([shown((FAR, 0.4), (A, 0.5))], [labelled(A)], score_threshold=0.5)
    assert scores.ap_recall == 1
    assert evaluate_detection([shown((A, 0.4))], [labelled(A)], score_threshold=0.5).recall == 0


def test_an_image_without_people_counts_its_detections_as_wrong():
    scores = evaluate_detection([shown((A, 0.8)), shown((FAR, 0.9))], [labelled(A), labelled()])
    assert (scores.curve.ap, scores.ap_recall) == (0.5, 0.5)


def test_nobody_to_find_is_an_error():
    with pytest.raises(ValueError, match="images must show at least one person, got none in 1 images"):
        evaluate_detection([shown((A, 0.9))], [labelled()])
    with pytest.raises(ValueError, match="at least one person with an identity"):
        evaluate_detection([shown((A, 0.9))], [labelled(A)], labelled_only=True)


def published_scores(detections, images):
    """The published loop, with scikit-learn: (recall, AP x recall)."""
    y_true, y_score, num_people, num_found = [], [], 0, 0
    for people, image in zip(detections, images, strict=True):
        truth = image.boxes_xyxy
        num_people += len(truth)
        if len(people) == 0:
            continue
        iou = np.zeros((len(truth), len(people)), np.float32)
        for i, (x1, y1, x2, y2) in enumerate(truth):
            for j, (left, top, right, bottom) in enumerate(people.boxes_xyxy):
                across, down = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
                overlap = max(0, across) * max(0, down)
                iou[i, j] = overlap / ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - overlap)
        paired = iou >= 0.5
        for j in range(len(people)):
            paired[np.arange(len(truth)) != iou[:, j].argmax(), j] = False
        for i in range(len(truth)):
            paired[i, np.arange(len(people)) != iou[i].argmax()] = False
        y_true += paired.any(axis=0).tolist()
        y_score += people.scores.tolist()
        num_found += int(paired.sum())
    recall = num_found / num_people
    return recall, average_precision_score(y_true, y_score) * recall


def test_the_papers_scores_are_those_of_the_published_loop():
    rng = np.random.default_rng(3)
    images, detections = [], []
    for _ in range(20):
        corner = rng.uniform(0, 150, (4, 2))
        truth = np.concatenate([corner, corner + np.array([40, 100])], axis=1)
        near = np.repeat(truth, 3, axis=0) + rng.normal(0, 10, (12, 4))
        images.append(labelled(*truth))
        scores = rng.integers(1, 20, len(near)) / 20  # with ties
        detections.append(shown(*zip(near, scores, strict=True)) if rng.random() < 0.9 else shown())
    scores = evaluate_detection(detections, images)
    assert (scores.recall, scores.ap_recall) == pytest.approx(published_scores(detections, images))
    assert 0.2 < scores.recall < 0.98
