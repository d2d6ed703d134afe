"""Detection of frames that lie on the canvas already, with a start and an end of the caller's own."""

from functools import partial

import numpy as np
import pytest
from conftest import GREEN, RED, scene
from psdiff.models.detector import Start, canvas_of
from psdiff.models.preprocess import seeded_noise

PEOPLE = [((20, 20, 40, 70), RED), ((90, 10, 110, 60), GREEN)]


class StopHereError(Exception):
    pass


def test_a_canvas_is_found_as_its_frame_is(detector):
    frame = scene(PEOPLE, width=320, height=192)
    [from_frame] = detector.detect([frame], 2, [5])
    [from_canvas] = detector.detect_canvases([canvas_of(frame, detector.settings)], 2, [5])
    assert len(from_frame) == 2
    np.testing.assert_array_equal(from_canvas.boxes_xyxy, from_frame.boxes_xyxy)
    np.testing.assert_array_equal(from_canvas.embeddings, from_frame.embeddings)


def test_a_start_takes_the_place_of_the_noise(detector, monkeypatch):
    seen = []
    step = detector.engine.denoise_step
    monkeypatch.setattr(detector.engine, "denoise_step", lambda *args: seen.append(args[1:3]) or step(*args))
    canvas = canvas_of(scene(PEOPLE), detector.settings)
    noise = [part[None] for part in seeded_noise(9, 12, 3)]
    detector.detect_canvases([canvas], 1, [9])
    detector.detect_canvases([canvas], 1, [9], start=Start(*(part + 1 for part in noise)))
    for drawn, given, expected in zip(*seen, noise, strict=True):
        np.testing.assert_array_equal(drawn, expected)
        np.testing.assert_array_equal(given, expected + 1)


@pytest.mark.parametrize("given", [False, True])
def test_the_loop_ends_where_the_caller_says_so(detector, monkeypatch, given):
    calls = []
    step = detector.engine.denoise_step
    monkeypatch.setattr(detector.engine, "denoise_step", lambda *args: calls.append(args) or step(*args))

    def after_second(_):
        if len(calls) == 2:
            raise StopHereError

    canvas = canvas_of(scene(PEOPLE), detector.settings)
    boxes = np.array([[20, 20, 40, 70]])
    ask = (
        partial(detector.embed_canvas, canvas, boxes)
        if given
        else partial(detector.detect_canvases, [canvas])
    )
    with pytest.raises(StopHereError):
        ask(4, after_step=after_second)
    assert len(calls) == 2
