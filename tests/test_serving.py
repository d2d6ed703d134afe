"""Requests of arrays: what is refused, who shares a batch, and that answers are those of the detector."""

import json

import numpy as np
import pytest
from conftest import GREEN, RED, scene
from psdiff.models.detector import canvas_of
from psdiff.models.preprocess import seeded_noise
from psdiff.runtime.serving import CancelledError, answer, read_request

PEOPLE = [((20, 20, 40, 70), RED), ((90, 10, 110, 60), GREEN)]
IMAGE = scene(PEOPLE)[None]
START = [part[None] for part in seeded_noise(9, 12, 3)]


def read(detector, is_cancelled=lambda: False, parameters=None, **inputs):
    inputs = {"image": IMAGE} | inputs
    return read_request(inputs, parameters or {}, detector.settings, 2, is_cancelled)


def people_of(outputs, image=0):
    num = int(outputs["num"][image, 0])
    return [outputs[name][image, :num] for name in ("boxes_xyxy", "scores", "embeddings")]


@pytest.fixture
def steps_run(detector, monkeypatch):
    """The arguments of every denoising step so far."""
    calls = []
    step = detector.engine.denoise_step
    monkeypatch.setattr(detector.engine, "denoise_step", lambda *args: calls.append(args) or step(*args))
    return calls


def test_an_answer_is_what_the_detector_finds(detector):
    frame = scene(PEOPLE, width=320, height=192)
    canvas = canvas_of(frame, detector.settings)
    size = np.array([[320, 192]], np.int32)
    request = read(detector, parameters={"steps": 4, "seed": 5}, image=canvas.image[None], frame_size=size)
    [wanted] = detector.detect([frame], 4, [5])
    [outputs] = answer(detector, [request])
    assert len(wanted) == 2
    for got, want in zip(people_of(outputs), vars(wanted).values(), strict=True):
        np.testing.assert_array_equal(got, want)


def test_without_a_frame_size_boxes_lie_on_the_canvas(detector):
    [outputs] = answer(detector, [read(detector)])
    np.testing.assert_allclose(people_of(outputs)[0], [box for box, _ in PEOPLE], atol=1)


def test_images_of_a_request_may_hold_different_numbers_of_people(detector):
    images = np.stack([scene([]), scene(PEOPLE), scene(PEOPLE[:1])])
    [outputs] = answer(detector, [read(detector, image=images)])
    assert outputs["num"].tolist() == [[0], [2], [1]]
    assert outputs["boxes_xyxy"].shape == (3, 2, 4)
    assert not outputs["embeddings"][0].any()


def test_nobody_is_a_row_of_zeros(detector):
    [outputs] = answer(detector, [read(detector, image=scene([])[None])])
    assert outputs["num"].tolist() == [[0]]
    assert outputs["scores"].tolist() == [[0.0]]


def test_given_boxes_are_described_in_their_order(detector):
    boxes = np.array([[box for box, _ in reversed(PEOPLE)]], np.float32)
    [outputs] = answer(detector, [read(detector, given_boxes=boxes)])
    np.testing.assert_array_equal(outputs["boxes_xyxy"], boxes)
    np.testing.assert_array_equal(outputs["scores"], [[1, 1]])
    np.testing.assert_array_equal(outputs["embeddings"][0], detector.embed(IMAGE[0], boxes[0], 2))


def test_similarity_is_cosine_times_score(detector):
    query = np.array([[0.6, 0.8, 0.0]], np.float32)
    [outputs] = answer(detector, [read(detector, query=query)])
    wanted = (outputs["embeddings"][0] @ query[0]) * outputs["scores"][0]
    np.testing.assert_allclose(outputs["similarity"][0], wanted, rtol=1e-6)
    [without] = answer(detector, [read(detector)])
    assert "similarity" not in without


def test_requests_of_one_k_share_a_batch_whatever_else_they_ask(detector, engine):
    asked = [({"steps": 1}, {}), ({"steps": 2}, {}), ({"steps": 1, "seed": 3}, {})]
    boxes = np.array([[PEOPLE[0][0]]], np.float32)
    asked.append(({"steps": 1}, {"given_boxes": boxes}))
    requests = [read(detector, parameters=parameters, **inputs) for parameters, inputs in asked]
    together = answer(detector, requests)
    assert sorted(engine.batches) == [1, 1, 2]
    for request, outputs in zip(requests, together, strict=True):
        [alone] = answer(detector, [request])
        for name, array in outputs.items():
            np.testing.assert_array_equal(array, alone[name])


def test_a_start_is_where_the_diffusion_starts(detector, steps_run):
    five = [part[:, :5] + 1 for part in START]
    answer(detector, [read(detector, parameters={"steps": 1}, boxes_t=five[0], emb_t=five[1])])
    for got, want in zip(steps_run[0][1:3], five, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_batch_is_left_between_two_steps_when_nobody_waits(detector, steps_run):
    gone = [read(detector, lambda: len(steps_run) >= 2, {"steps": 4}) for _ in range(2)]
    answers = answer(detector, gone)
    assert [type(each) for each in answers] == [CancelledError] * 2
    assert len(steps_run) == 2


def test_who_waits_is_answered_though_the_others_went(detector, steps_run):
    gone = read(detector, lambda: len(steps_run) >= 1, {"steps": 4})
    first, second = answer(detector, [gone, read(detector, parameters={"steps": 4})])
    assert isinstance(first, CancelledError)
    assert second["num"].tolist() == [[2]]
    assert len(steps_run) == 4


def test_a_request_that_is_gone_already_costs_nothing(detector, engine):
    [each] = answer(detector, [read(detector, lambda: True)])
    assert isinstance(each, CancelledError)
    assert engine.batches == []


def test_a_box_outside_the_frame_is_the_error_of_its_request_alone(detector):
    outside = np.array([[[500, 500, 600, 600]]], np.float32)
    wrong, right = answer(detector, [read(detector, given_boxes=outside), read(detector)])
    assert "boxes_xyxy[0] must be" in str(wrong)
    assert right["num"].tolist() == [[2]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": None}, r"image must be sent, uint8 \(B, 96, 160, 3\), got no such input"),
        ({"image": IMAGE[:, :50]}, r"image must be uint8 \(any, 96, 160, 3\), got uint8 \(1, 50, 160, 3\)"),
        ({"image": IMAGE.astype(np.float32)}, "image must be uint8 .*, got float32"),
        ({"frame_size": np.array([[0, 5]], np.int32)}, "frame_size must be width, height >= 1, got 0, 5"),
        (
            {"frame_size": np.array([[9, 5]] * 2, np.int32)},
            r"frame_size must be int32 \(1, 2\), got int32 \(2, 2\)",
        ),
        ({"boxes_t": START[0]}, r"boxes_t and emb_t must come together, .*, got \(1, 12, 4\) and none"),
        (
            {"boxes_t": START[0], "emb_t": START[1][:, :5]},
            r"for the same proposals, got \(1, 12, 4\) and \(1, 5, 3\)",
        ),
        (
            {"boxes_t": START[0] * np.nan, "emb_t": START[1]},
            "boxes_t must be finite, got 48 values that are not",
        ),
        (
            {"boxes_t": np.zeros((1, 501, 4), np.float32), "emb_t": np.zeros((1, 501, 3), np.float32)},
            "boxes_t must be 1 to 500 an image, got 501",
        ),
        ({"given_boxes": np.zeros((1, 63, 4), np.float32)}, "given_boxes must be 1 to 62 an image, got 63"),
        (
            {"given_boxes": np.zeros((1, 1, 4), np.float32), "boxes_t": START[0], "emb_t": START[1]},
            "given_boxes must come without boxes_t and emb_t",
        ),
        ({"query": np.zeros((1, 4), np.float32)}, r"query must be float32 \(1, 3\), got float32 \(1, 4\)"),
    ],
)
def test_a_wrong_input_is_named(detector, inputs, message):
    with pytest.raises(ValueError, match=message):
        read(detector, **inputs)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ('{"steps": 0}', "steps must be a whole number from 1 to 4, got 0"),
        ('{"steps": 3}', "steps must be a whole number from 1 to 4, got 3"),
        ('{"steps": "2"}', "steps must be a whole number from 1 to 4, got '2'"),
        ('{"steps": true}', "steps must be a whole number from 1 to 4, got True"),
        ('{"seed": -1}', "seed must be a whole number from 0 to 9223372036854775807, got -1"),
        ('{"seed": 0.5}', "seed must be a whole number"),
        ('{"step": 2}', "parameters must be steps and seed, got step"),
    ],
)
def test_a_wrong_parameter_is_named(detector, parameters, message):
    with pytest.raises(ValueError, match=message):
        read(detector, parameters=json.loads(parameters))
