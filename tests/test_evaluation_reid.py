"""CMC and mAP over crops, on cases worked out by hand, and against scikit-learn."""

import tracemalloc

import numpy as np
import pytest
from psdiff.training.datasets.schema import NO_CAMERA, UNLABELLED
from psdiff.training.evaluation import reid
from psdiff.training.evaluation.reid import DescribedCrops, evaluate_reid
from sklearn.metrics import average_precision_score


def crops(angles, pids, cameras):
    """Unit vectors at angles in degrees: the nearer the angles, the nearer the crops."""
    radians = np.deg2rad(np.array(angles, np.float32))
    embeddings = np.stack([np.cos(radians), np.sin(radians)], axis=1)
    return DescribedCrops(embeddings, np.array(pids, np.int64), np.array(cameras, np.int64))


def test_the_same_person_in_the_same_camera_is_left_out():
    query = crops([0], [7], [1])
    # Nearest first: 7 in camera 1 (left out), 3 (wrong), 7 in camera 2, 5 (wrong), 7 in camera 3.
    gallery = crops([1, 2, 3, 4, 5], [7, 3, 7, 5, 7], [1, 1, 2, 1, 3])
    scores = evaluate_reid(query, gallery)
    assert scores.map == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert scores.cmc[:3].tolist() == [0, 1, 1]
    assert (scores.top(1), scores.top(5)) == (0, 1)


def test_crops_without_cameras_keep_their_matches():
    query = crops([0, 10], [7, 8], [NO_CAMERA] * 2)
    gallery = crops([1, 11, 15], [7, 8, 8], [NO_CAMERA] * 3)
    scores = evaluate_reid(query, gallery)
    assert (scores.map, scores.top(1), scores.num_without_match) == (1, 1, 0)


def test_a_query_without_a_match_is_left_out_and_counted():
    query = crops([0, 0, 0], [7, 8, 7], [1, 1, 1])
    gallery = crops([1, 2], [7, 8], [2, 1])
    scores = evaluate_reid(query, gallery)
    assert (scores.num_queries, scores.num_without_match) == (2, 1)
    assert np.isnan(scores.ap).tolist() == [False, True, False]


def test_distractors_stay_in_the_gallery_and_match_nobody():
    query = crops([0, 0], [7, UNLABELLED], [1, 1])
    gallery = crops([1, 2, 3], [UNLABELLED, 0, 7], [2, 1, 2])
    scores = evaluate_reid(query, gallery)
    assert scores.map == pytest.approx(1 / 3)
    assert (scores.num_queries, scores.num_without_match) == (1, 1)


def test_distance_is_euclidean_for_rows_that_are_no_unit_vectors():
    # From (1, 0): (1.5, 0) is 0.5 away, (10, 0) is 9 away although its dot product is larger.
    query = DescribedCrops(np.array([[1, 0]], np.float32), np.array([7]), np.array([1]))
    gallery = DescribedCrops(np.array([[10, 0], [1.5, 0]], np.float32), np.array([3, 7]), np.array([2, 2]))
    assert evaluate_reid(query, gallery).top(1) == 1


def random_crops(rng, n):
    embeddings = rng.standard_normal((n, 8)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return DescribedCrops(embeddings, rng.integers(0, 12, n), rng.integers(0, 3, n))


def test_chunks_and_gallery_order_change_nothing_and_scikit_learn_agrees(monkeypatch):
    rng = np.random.default_rng(4)
    query, gallery = random_crops(rng, 21), random_crops(rng, 300)
    scores = evaluate_reid(query, gallery)
    order = rng.permutation(300)
    shuffled = DescribedCrops(gallery.embeddings[order], gallery.pids[order], gallery.cameras[order])
    monkeypatch.setattr(reid, "MAX_SIMILARITIES", 4 * 300)
    again = evaluate_reid(query, shuffled)
    assert again.ap == pytest.approx(scores.ap)
    assert again.cmc.tolist() == scores.cmc.tolist()
    for i in range(21):
        distance = ((query.embeddings[i] - gallery.embeddings) ** 2).sum(axis=1)
        same = gallery.pids == query.pids[i]
        kept = ~(same & (gallery.cameras == query.cameras[i]))
        assert scores.ap[i] == pytest.approx(average_precision_score(same[kept], -distance[kept]))


def test_similarities_are_held_in_chunks(monkeypatch):
    # All at once they take 200 x 30,000 x 4 bytes = 24 MB; a chunk of a million takes 4 MB.
    rng = np.random.default_rng(5)
    query, gallery = random_crops(rng, 200), random_crops(rng, 30_000)
    monkeypatch.setattr(reid, "MAX_SIMILARITIES", 1 << 20)
    tracemalloc.start()
    assert evaluate_reid(query, gallery).num_queries == 200
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"pids must be of shape \(2,\), got \(1,\)"):
        crops([0, 1], [7], [1, 1])
    with pytest.raises(ValueError, match="one embedding dimension, got 2 and 8"):
        evaluate_reid(crops([0], [7], [1]), random_crops(np.random.default_rng(0), 3))
    with pytest.raises(ValueError, match="at least one crop with a match"):
        evaluate_reid(crops([0], [7], [1]), crops([0], [7], [1]))
