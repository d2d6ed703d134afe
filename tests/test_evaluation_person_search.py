"""A whole evaluation: the real Detector over the fake engine, on images that the test draws."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import BLUE, GREEN, RED, YELLOW, scene
from psdiff.training.datasets.schema import (
    UNLABELLED,
    DatasetError,
    LabelledImage,
    PersonSearchSet,
    Query,
)
from psdiff.training.evaluation.person_search import (
    LOWEST_SCORE,
    detect_and_describe,
    evaluate_person_search,
    image_seed,
)
from psdiff.training.evaluation.report import Report, report_as_json, report_table, write_report
from rich.console import Console

LEFT, MIDDLE, RIGHT = (10, 20, 26, 60), (60, 20, 76, 60), (120, 20, 136, 60)
PEOPLE = {
    "query": [(LEFT, RED), (RIGHT, GREEN)],
    "empty": [],
    "both": [(LEFT, GREEN), (MIDDLE, RED)],
    "others": [(LEFT, BLUE), (RIGHT, YELLOW)],
}
PIDS = {RED: 0, GREEN: 1, BLUE: 2, YELLOW: UNLABELLED}


def read_image(image):
    return scene(PEOPLE[image.name])


def drawn(name):
    people = PEOPLE[name]
    boxes = np.array([box for box, _ in people], np.float32).reshape(-1, 4)
    return LabelledImage(name, Path(name), boxes, np.array([PIDS[colour] for _, colour in people], np.int64))


def search_set(names=("query", "empty", "both", "others")):
    """Red and green of the image "query", to be found in "both"."""
    test = [drawn(name) for name in names]
    image, both = names.index("query"), names.index("both")
    gallery = np.array([i for i in range(len(names)) if i != image], np.int64)
    queries = [
        Query(image, test[image].boxes_xyxy[row], row, gallery, {both: test[both].boxes_xyxy[1 - row][None]})
        for row in range(2)
    ]
    return PersonSearchSet("drawn", [], test, queries)


def evaluate(detector, dataset, steps=1, **settings):
    return evaluate_person_search(detector, dataset, steps, read_image=read_image, **settings)


@pytest.mark.parametrize("query_mode", ["gt", "iou"])
def test_people_of_one_colour_are_found_and_told_apart(detector, query_mode):
    seen = []
    scores = evaluate(detector, search_set(), query_mode=query_mode, on_image=lambda: seen.append(1))
    assert (scores.search.map, scores.search.top1, scores.search.num_queries) == (1, 1, 2)
    assert (scores.detection.curve.ap, scores.detection.recall, scores.detection.num_people) == (1, 1, 6)
    assert (scores.steps, scores.query_mode, len(seen)) == (1, query_mode, 4)


def test_a_query_is_described_by_its_box_or_by_the_detection_over_it(detector):
    # The box lies across half of red: too little for the fake engine to see red in it, but enough to be nearest.
    dataset = search_set()
    off = replace(dataset.queries[0], box_xyxy=np.array([18, 20, 34, 60], np.float32))
    dataset = replace(dataset, queries=[off])

    def embedding(query_mode):
        found = detect_and_describe(detector, dataset, 1, read_image=read_image, query_mode=query_mode)
        return found.query_embeddings[0]

    red = np.array(RED, float) - 128
    assert embedding("iou") == pytest.approx(red / np.linalg.norm(red), abs=0.02)
    assert embedding("gt") @ red / np.linalg.norm(red) < 0.9


def test_a_query_in_an_image_where_nothing_is_found_finds_nobody(detector):
    dataset = search_set()
    blind = replace(dataset.queries[0], image=1, gallery=np.array([0, 2, 3]))
    dataset = replace(dataset, queries=[blind, dataset.queries[1]])
    scores = evaluate(detector, dataset, query_mode="iou")
    assert scores.search.ap.tolist() == [0, 1]


def test_order_and_batch_size_change_nothing(detector, engine):
    def found(names, batch_size):
        dataset = search_set(names)
        kept = detect_and_describe(detector, dataset, 2, read_image=read_image, batch_size=batch_size)
        return dict(zip(names, kept.detections, strict=True)), kept.query_embeddings

    names = ("query", "empty", "both", "others")
    people, embeddings = found(names, 1)
    again, again_embeddings = found(names[::-1], 3)
    assert {1, 3} <= set(engine.batches)
    assert again_embeddings.tolist() == embeddings.tolist()
    for name in names:
        assert again[name].boxes_xyxy.tolist() == people[name].boxes_xyxy.tolist()
        assert again[name].embeddings.tolist() == people[name].embeddings.tolist()


def test_the_noise_of_an_image_is_seeded_by_its_name():
    # The check value that CRC-32 is published with.
    assert image_seed(replace(drawn("both"), name="123456789")) == 0xCBF43926


def test_detection_sees_what_the_search_threshold_hides(detector):
    # The fake engine gives its first rectangle 0.95 and the second 0.9; the person searched for is the second.
    dataset = search_set()
    dataset = replace(dataset, queries=dataset.queries[:1])
    scores = evaluate(detector, dataset, score_threshold=0.93)
    assert (scores.search.map, scores.score_threshold) == (0, 0.93)
    assert scores.detection.curve.ap == 1
    assert LOWEST_SCORE == 0.05


def test_the_thresholds_of_the_model_play_no_part(detector):
    strict = replace(detector.settings, score_threshold=0.94, score_thresholds={1: 0.94})
    dataset = search_set()
    assert evaluate(type(detector)(detector.engine, strict), dataset).detection.recall == 1


def test_the_same_queries_are_searched_in_other_galleries(detector):
    dataset = search_set()
    small = [replace(query, gallery=np.array([2])) for query in dataset.queries]
    scores = evaluate(detector, dataset, other_galleries={1: small})
    assert (scores.other_galleries[1].gallery_size, scores.search.gallery_size) == (1, 3)
    with pytest.raises(
        ValueError, match=r"other_galleries\[1\] must hold the queries of drawn in the same order"
    ):
        evaluate(detector, dataset, other_galleries={1: small[::-1]})


def test_bad_arguments_are_named(detector):
    with pytest.raises(ValueError, match="query_mode must be one of gt, iou, got box"):
        evaluate(detector, search_set(), query_mode="box")
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        evaluate(detector, search_set(), batch_size=0)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 4, got 9"):
        evaluate(detector, search_set(), steps=9)
    with pytest.raises(DatasetError, match="drawn must have test images and queries, got 4 and 0"):
        evaluate(detector, replace(search_set(), queries=[]))


@pytest.fixture
def report(detector):
    dataset = search_set()
    small = {1: [replace(query, gallery=np.array([2])) for query in dataset.queries]}
    scores = [evaluate(detector, dataset, steps, other_galleries=small) for steps in (1, 2)]
    return Report("fake", dataset.name, len(dataset.test), scores)


def test_a_report_is_a_json_file_and_a_plot_of_each_comparison(report, tmp_path):
    paths = write_report(report, tmp_path / "out")
    names = ["report.json", "precision_recall.png", "steps.png", "gallery_size.png"]
    assert [path.name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[1:])
    content = json.loads(paths[0].read_text())
    assert content == json.loads(json.dumps(report_as_json(report)))
    assert "described by its given box" in content["protocol"]
    assert "score >= 0.5" in content["protocol"]
    first = content["scores"][0]
    assert first["search"] == {
        "map": 1,
        "top1": 1,
        "top5": 1,
        "top10": 1,
        "queries": 2,
        "queries_left_out": 0,
        "gallery_size": 3,
    }
    assert first["other_galleries"]["1"]["gallery_size"] == 1
    assert first["detection"]["precision_at_101_recalls"] == [1] * 101


def test_one_k_and_one_gallery_need_no_plots_of_their_own(report, tmp_path):
    alone = replace(report, scores=[replace(report.scores[0], other_galleries={})])
    assert [path.name for path in write_report(alone, tmp_path)] == ["report.json", "precision_recall.png"]


def test_a_report_that_fails_leaves_no_half_file(report, tmp_path):
    (tmp_path / "report.json").write_text("old")
    broken = replace(report, model=object())
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_report(broken, tmp_path)
    assert (tmp_path / "report.json").read_text() == "old"


def test_the_table_shows_percent_and_says_what_was_measured(report):
    output = io.StringIO()
    Console(width=80, file=output).print(report_table(report))
    lines = [line.strip() for line in output.getvalue().splitlines()]
    assert lines[0] == "fake on drawn: 4 images, 2 queries"
    rows = [line.split() for line in lines if line.endswith(".0") or line[:1] in ("1", "2")]
    assert rows[0][:9] == ["1", "3", *["100.0"] * 7]
    assert rows[1] == ["1", *["100.0"] * 4]
    assert "AP x R: AP x recall of the person search papers" in " ".join(lines)
