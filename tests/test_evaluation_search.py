"""The person search metric on cases worked out by hand, and against scikit-learn."""

import numpy as np
import pytest
from psdiff.models.detections import Detections
from psdiff.training.datasets.schema import DatasetError, Query
from psdiff.training.evaluation.search import (
    average_precision,
    first_hit_rank,
    gallery_curve,
    iou_thresholds,
    search,
)
from sklearn.metrics import average_precision_score

# Every query looks along the first axis, so that a detection's first component is its similarity.
LOOKS = np.array([1.0, 0.0])
PERSON = [10, 10, 50, 90]


def shown(*people):
    """Detections of one image: (box, similarity) or (box, similarity, score)."""
    boxes, similarity, scores = [], [], []
    for box, value, *score in people:
        boxes.append(box)
        similarity.append(value)
        scores.append(*score or [0.9])
    values = np.array(similarity, np.float64)
    embeddings = np.stack([values, np.sqrt(1 - values**2)], axis=1).reshape(-1, 2)
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        embeddings.astype(np.float32),
    )


def looking_for(truth, gallery, image=0, pid=0):
    boxes = {g: np.array(box, np.float32).reshape(-1, 4) for g, box in truth.items()}
    return Query(image, np.array(PERSON, np.float32), pid, np.array(gallery, np.int64), boxes)


def scores_of(detections, *queries, **settings):
    """Image 0 is the queries' own; the detections are those of images 1, 2, ..."""
    return search([shown(), *detections], queries, np.stack([LOOKS] * len(queries)), **settings)


FAR = [200, 200, 240, 280]


@pytest.mark.parametrize(
    ("width", "height", "threshold"),
    [
        (10, 10, 0.25),
        (20, 20, 0.4444),
        (15, 45, 0.4909),
        (10, 100, 0.4545),
        (20, 40, 0.5),
        (25, 25, 0.5),
        (60, 120, 0.5),
    ],
)
def test_a_small_person_needs_less_overlap(width, height, threshold):
    box = np.array([[5, 7, 5 + width, 7 + height]], np.float32)
    assert iou_thresholds(box)[0] == pytest.approx(threshold, abs=5e-5)


def test_average_precision_is_scaled_by_the_share_of_images_found():
    # Ranked: .90 wrong, .85 wrong, .80 right; one of two images with the person was found: 1/3 x 1/2.
    found = scores_of(
        [shown((PERSON, 0.8), (FAR, 0.9)), shown((FAR, 0.85)), shown()],
        looking_for({1: PERSON, 3: PERSON}, [1, 2, 3]),
    )
    assert found.map == pytest.approx(1 / 6)
    assert (found.top1, found.top5, found.top10) == (0, 1, 1)


def test_the_most_similar_of_two_overlapping_detections_is_the_hit():
    # The box of 25 x 80 pixels has IoU 25/40 = 0.625 with the person.
    found = scores_of([shown((PERSON, 0.8), ([10, 10, 35, 90], 0.9))], looking_for({1: PERSON}, [1]))
    assert (found.map, found.top1) == (1, 1)


def test_the_less_similar_of_two_overlapping_detections_is_wrong():
    # Another image holds the second hit below it: precision 1 and 2/3 at the two hits.
    found = scores_of(
        [shown((PERSON, 0.8), ([10, 10, 35, 90], 0.9)), shown((PERSON, 0.7))],
        looking_for({1: PERSON, 2: PERSON}, [1, 2]),
    )
    assert found.map == pytest.approx((1 + 2 / 3) / 2)


def test_a_person_of_ten_pixels_is_found_with_an_iou_of_three_tenths():
    found = scores_of([shown(([0, 0, 10, 33], 0.6))], looking_for({1: [0, 0, 10, 10]}, [1]))
    assert found.map == 1


def test_detections_below_the_threshold_are_not_searched():
    # 35 of 80 pixels high: IoU 0.4375.
    people = [shown((PERSON, 0.9, 0.49), ([10, 10, 50, 45], 0.8))]
    assert scores_of(people, looking_for({1: PERSON}, [1])).map == 0
    assert scores_of(people, looking_for({1: PERSON}, [1]), score_threshold=0.49).map == 1


def test_hits_at_ranks_one_and_three_give_five_sixths():
    found = scores_of(
        [shown((PERSON, 0.7), (FAR, 0.6)), shown((PERSON, 0.5), (FAR, 0.4))],
        looking_for({1: PERSON, 2: PERSON}, [1, 2]),
    )
    assert found.map == pytest.approx(5 / 6)


def test_equal_similarities_count_as_one_group():
    assert average_precision(np.array([True, False, False, True]), np.zeros(4)) == 0.5


def test_average_precision_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    for levels in (3, 10, 1000):
        for _ in range(40):
            is_hit = rng.random(50) < 0.3
            is_hit[rng.integers(50)] = True
            values = (rng.integers(levels, size=50) / levels).astype(np.float32)
            assert average_precision(is_hit, values) == pytest.approx(average_precision_score(is_hit, values))


def test_nothing_found_has_average_precision_zero_and_no_rank():
    assert average_precision(np.zeros(3, bool), np.zeros(3)) == 0
    assert first_hit_rank(np.zeros(0, bool), np.zeros(0)) == np.inf


def test_the_rank_of_a_hit_counts_equal_values_that_stand_before_it():
    is_hit, values = np.array([False, True, False, True]), np.array([0.5, 0.5, 0.5, 0.2])
    assert first_hit_rank(is_hit, values) == 1
    assert first_hit_rank(is_hit[::-1], values[::-1]) == 1
    assert first_hit_rank(np.array([False, False, True, False]), np.array([0.9, 0.1, 0.8, 0.9])) == 2


def test_top_k_looks_at_the_whole_gallery_not_at_each_image():
    strangers = [shown((FAR, 0.9), (FAR, 0.91)), shown((FAR, 0.92), (FAR, 0.93), (FAR, 0.94))]
    found = scores_of([shown((PERSON, 0.8)), *strangers], looking_for({1: PERSON}, [1, 2, 3]))
    assert (found.top1, found.top5, found.top10) == (0, 0, 1)


def test_detections_outside_the_gallery_do_not_count():
    # As in CUHK-SYSU, where each query has a gallery of its own among the same images.
    people = [shown((PERSON, 0.8)), shown((FAR, 0.9)), shown((FAR, 0.7))]
    found = scores_of(people, looking_for({1: PERSON}, [1, 3]), looking_for({1: PERSON}, [1, 2]))
    assert found.ap.tolist() == [1, 0.5]
    assert (found.map, found.top1, found.gallery_size) == (0.75, 0.5, 2)


def test_a_larger_gallery_of_the_same_queries_is_harder():
    people = [shown(), shown((PERSON, 0.8)), shown((FAR, 0.9)), shown((FAR, 0.85))]
    sizes = {1: [looking_for({1: PERSON}, [1])], 3: [looking_for({1: PERSON}, [1, 2, 3])]}
    curve = gallery_curve(people, sizes, LOOKS[None])
    assert {size: round(found.map, 4) for size, found in curve.items()} == {1: 1, 3: 0.3333}
    assert {size: found.gallery_size for size, found in curve.items()} == {1: 1, 3: 3}


def test_a_query_whose_person_is_nowhere_is_left_out_and_counted():
    # As in PRW with the frames of other cameras only, where some people were seen by one camera.
    found = scores_of([shown((PERSON, 0.8))], looking_for({}, [1]), looking_for({1: PERSON}, [1]))
    assert (found.num_queries, found.num_without_truth, found.map) == (1, 1, 1)
    assert np.isnan(found.ap[0])


def test_any_of_several_boxes_of_a_person_in_one_image_will_do():
    # As in PoseTrack21: one image counts once, whichever of its boxes is found.
    two = looking_for({1: [PERSON, FAR]}, [1])
    assert scores_of([shown((FAR, 0.8))], two).map == 1
    both = scores_of([shown((PERSON, 0.7), (FAR, 0.8), ([400, 0, 440, 80], 0.75))], two)
    assert both.map == 1


def test_ranking_by_confidence_weighted_similarity_lowers_doubtful_detections():
    people = [shown((PERSON, 0.8, 0.9), (FAR, 0.85, 0.5))]
    assert scores_of(people, looking_for({1: PERSON}, [1])).top1 == 0
    assert scores_of(people, looking_for({1: PERSON}, [1]), rank_by="cws").top1 == 1


def test_a_query_that_could_not_be_described_finds_nothing():
    query = looking_for({1: PERSON}, [1])
    embeddings = np.array([[np.nan, np.nan], [1, 0]], np.float32)
    found = search([shown(), shown((PERSON, 0.8))], [query, query], embeddings)
    assert found.ap.tolist() == [0, 1]
    assert (found.top10, found.num_queries) == (0.5, 2)


def test_images_without_any_detection_are_searched_in_vain():
    found = scores_of([shown(), shown()], looking_for({1: PERSON}, [1, 2]))
    assert (found.map, found.top10) == (0, 0)


def random_problem(rng, num_images=30, num_queries=8):
    detections = []
    for _ in range(num_images):
        n = int(rng.integers(0, 6))
        corner, size = rng.uniform(0, 100, (n, 2)), rng.uniform(20, 80, (n, 2))
        embeddings = rng.standard_normal((n, 4))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        boxes = np.concatenate([corner, corner + size], axis=1)
        parts = (boxes, rng.uniform(0.3, 1, n), embeddings)
        detections.append(Detections(*(part.astype(np.float32) for part in parts)))
    queries = []
    for image in range(num_queries):
        gallery = rng.permutation(np.delete(np.arange(num_images), image))[:20]
        truth = {int(g): detections[g].boxes_xyxy[:1] + 3 for g in gallery[:5] if len(detections[g])}
        queries.append(Query(image, np.array(PERSON, np.float32), image, gallery, truth))
    embeddings = rng.standard_normal((num_queries, 4))
    return detections, queries, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def test_the_order_of_a_gallery_does_not_matter():
    rng = np.random.default_rng(1)
    detections, queries, embeddings = random_problem(rng)
    found = search(detections, queries, embeddings)
    assert 0.05 < found.map < 0.95
    turned = [
        Query(q.image, q.box_xyxy, q.pid, rng.permutation(q.gallery), dict(reversed(q.truth.items())))
        for q in queries
    ]
    again = search(detections, turned, embeddings)
    assert again.ap.tolist() == found.ap.tolist()
    assert (again.top1, again.top5, again.top10) == (found.top1, found.top5, found.top10)


def published_average_precision(detections, query, embedding, score_threshold=0.5):
    """The published loop, image by image and box by box, with scikit-learn."""
    y_true, y_score, num_found = [], [], 0
    for image in query.gallery.tolist():
        people, kept = detections[image], detections[image].scores >= score_threshold
        boxes, similarity = people.boxes_xyxy[kept].astype(float), people.embeddings[kept] @ embedding
        labels = np.zeros(len(boxes), bool)
        if image in query.truth:
            [[x1, y1, x2, y2]] = query.truth[image].astype(float)
            w, h = x2 - x1, y2 - y1
            for i in np.argsort(-similarity):
                left, top, right, bottom = boxes[i]
                across, down = min(x2, right) - max(x1, left), min(y2, bottom) - max(y1, top)
                overlap = max(0, across) * max(0, down)
                iou = overlap / (w * h + (right - left) * (bottom - top) - overlap)
                if iou >= min(0.5, w * h / ((w + 10) * (h + 10))):
                    labels[i] = True
                    num_found += 1
                    break
        y_true += labels.tolist()
        y_score += similarity.tolist()
    return average_precision_score(y_true, y_score) * num_found / len(query.truth) if num_found else 0


def test_the_metric_is_that_of_the_published_loop():
    detections, queries, embeddings = random_problem(np.random.default_rng(2), num_queries=20)
    found = search(detections, queries, embeddings)
    wanted = [
        published_average_precision(detections, *pair) for pair in zip(queries, embeddings, strict=True)
    ]
    assert found.ap == pytest.approx(wanted)
    assert len(set(wanted)) > 10


def test_bad_arguments_are_named():
    query = looking_for({1: PERSON}, [1])
    people = [shown(), shown((PERSON, 0.8))]
    with pytest.raises(ValueError, match=r"query_embeddings must be of shape \(1, E\), got \(2, 2\)"):
        search(people, [query], np.ones((2, 2)))
    with pytest.raises(ValueError, match="rank_by must be one of cosine, cws, got euclid"):
        search(people, [query], LOOKS[None], rank_by="euclid")
    with pytest.raises(DatasetError, match="one query at least must have its person in its gallery"):
        search(people, [looking_for({}, [1])], LOOKS[None])
