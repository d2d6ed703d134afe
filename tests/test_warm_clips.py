"""How warm starts are judged, on hand-made clips."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed; the benchmarks need it")
from psdiff.benchmarks.warm_clips import ClipSet, Way, queries_of, scores_of, threshold_of, watch
from psdiff.models.detections import Detections
from psdiff.runtime.detector import open_detector
from psdiff.runtime.warm_start import WarmSettings
from psdiff.training.evaluation.clips import LabelledImage

BOX = (10.0, 20.0, 50.0, 120.0)


def clip(camera, present):
    """A frame an entry; somebody, pid 3, is in those that are True."""
    return [
        LabelledImage(
            0,
            camera,
            np.full((192, 320, 3), 90, np.uint8),
            np.array([BOX] * is_there, np.float32).reshape(-1, 4),
            np.array([3] * is_there, np.int64),
            np.ones(int(is_there), np.float32),
        )
        for is_there in present
    ]


SET = ClipSet([*clip(0, [1, 1, 1, 1, 1]), *clip(1, [0, 1, 1, 1, 1])], 5, 5.0)
LOOK = np.eye(2, dtype=np.float32)[:1]


def found(images, score=0.9):
    boxes = [image.boxes_xyxy for image in images]
    return [
        Detections(box, np.full(len(box), score, np.float32), np.repeat(LOOK, len(box), axis=0))
        for box in boxes
    ]


def queries():
    """The person, asked for from the first frame."""

    class Describer:
        def embed(self, image, boxes, steps):
            return LOOK

    return queries_of(SET, Describer())


def test_who_is_found_at_once_scores_full():
    scores = scores_of(SET, found(SET.images), queries(), 0.5)
    assert (scores.map, scores.top1, scores.ap50, scores.precision, scores.recall) == (1, 1, 1, 1, 1)
    # The first clip begins with the person; only into the second one somebody enters.
    assert (scores.entrances, scores.queries) == (1, 1)
    assert scores.entered == {0: 1, 1: 1, 2: 1}


def test_who_is_found_a_frame_late_is_a_newcomer_that_was_missed():
    people = found(SET.images)
    people[6] = Detections(*(part[:0] for part in vars(people[6]).values()))
    scores = scores_of(SET, people, queries(), 0.5)
    assert (scores.entered[0], scores.entered[1]) == (0, 1)
    assert scores.recall == pytest.approx(8 / 9)


def test_only_what_passes_the_threshold_counts_as_found():
    people = found(SET.images)
    people[7] = Detections(people[7].boxes_xyxy, np.array([0.3], np.float32), LOOK)
    assert scores_of(SET, people, queries(), 0.5).entered[1] == 0
    assert scores_of(SET, people, queries(), 0.2).entered[1] == 1


def test_every_way_sees_every_frame_and_the_backbone_runs_once_a_frame(shipped):
    detector = open_detector(shipped, threads=1)
    calls = []
    backbone = detector.engine.backbone
    detector.engine.backbone = lambda images: calls.append(len(images)) or backbone(images)
    ways = {"cold": Way(1), "warm": Way(1, WarmSettings())}
    clips = ClipSet(
        [
            LabelledImage(
                image.street, image.camera, image.image + i, image.boxes_xyxy, image.pids, image.visibility
            )
            for i, image in enumerate(SET.images[:3])
        ],
        3,
        5.0,
    )
    seen = watch(detector, clips, ways)
    assert calls == [1, 1, 1]
    assert [len(each.people) for each in seen.values()] == [3, 3]
    assert seen["cold"].starts == {"cold": 3}
    assert seen["warm"].starts["first"] == 1
    assert threshold_of(ways["warm"], detector) == detector.settings.threshold(1)
