"""The host loop: grids, letterbox, noise, selection, over an engine that answers by rule."""

import itertools

import numpy as np
import pytest
from psdiff.models.detections import Detections, non_maximum_suppression, select_detections
from psdiff.models.detector import Detector
from psdiff.models.preprocess import PAD_VALUE, Letterbox, seeded_noise
from psdiff.models.sampling import (
    SamplerSettings,
    StepOutput,
    denoise,
    denoise_steps,
    sampling_timesteps,
)
from psdiff.models.solvers import (
    SOLVERS,
    Evaluation,
    SamplerOptions,
    Schedule,
    boxes_to_signal,
    ddim,
    fresh_noise,
    join_signal,
)
from psdiff.runtime.detector import open_detector

SETTINGS = SamplerSettings(
    width=64,
    height=32,
    num_proposals=6,
    embedding_dim=4,
    box_scale=2.0,
    timesteps={steps: sampling_timesteps(steps, 1000, 1.0) for steps in range(1, 9)},
    embedding_scale=3.0,
    num_timesteps=1000,
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


class MovingEngine:
    """Finds one box a proposal, elsewhere at every timestep; scores and embeddings follow what it is given."""

    def __init__(self):
        self.calls = []

    def backbone(self, images):
        return [images.astype(np.float32).mean(axis=(1, 2, 3))]

    def denoise_step(self, features, boxes_t, emb_t, t, t_next):
        self.calls.append((boxes_t, emb_t, int(t[0])))
        left = np.broadcast_to((t[:, None] / 1000).astype(np.float32) * 0.8, boxes_t.shape[:2])
        boxes = np.stack([left, left, left + 0.1, left + 0.5], axis=-1)
        embeddings = emb_t + boxes_t + features[0][:, None, None]
        embeddings = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
        scores = 1 / (1 + np.exp(-emb_t[..., 0]))
        return StepOutput(boxes_t * 0.5, emb_t * 0.5 + 1, boxes, scores, embeddings)


def noise_of(seeds):
    noise = [seeded_noise(seed, SETTINGS.num_proposals, SETTINGS.embedding_dim) for seed in seeds]
    return [np.stack(part) for part in zip(*noise, strict=True)]


def states(options, steps=4, seeds=(7, 8), features=None):
    """The inputs of every engine call, (boxes_t, emb_t, t), and the outputs of the steps."""
    engine = MovingEngine()
    features = [np.array(seeds, np.float32)] if features is None else features
    outputs = denoise_steps(
        engine,
        features,
        *noise_of(seeds),
        SETTINGS.timesteps[steps],
        options=options,
        settings=SETTINGS,
        seeds=seeds,
    )
    outputs = list(outputs)
    return engine.calls, outputs


def test_without_options_the_steps_are_those_of_the_graph_to_the_bit():
    engine, features = MovingEngine(), [np.zeros(2, np.float32)]
    boxes_t, emb_t = noise_of([7, 8])
    output = denoise(engine, features, boxes_t, emb_t, [999, 749, 499])
    for t, t_next in ((999, 749), (749, 499), (499, -1)):
        times = np.full(2, t), np.full(2, t_next)
        wanted = MovingEngine().denoise_step(features, boxes_t, emb_t, *times)
        boxes_t, emb_t = wanted.boxes_next, wanted.emb_next
    for got, part in zip(output, wanted, strict=True):
        np.testing.assert_array_equal(got, part)
    assert len(engine.calls) == 3


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_one_step_all_solvers_give_what_the_graph_gives(solver):
    frame = np.full((32, 64, 3), 90, np.uint8)
    [plain] = Detector(MovingEngine(), SETTINGS).detect([frame], steps=1)
    [solved] = Detector(MovingEngine(), SETTINGS).detect([frame], steps=1, options=SamplerOptions(solver))
    for name in ("boxes_xyxy", "scores", "embeddings"):
        np.testing.assert_array_equal(getattr(solved, name), getattr(plain, name))


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver != "ddim"])
def test_solvers_on_the_host_follow_the_predicted_boxes_and_embeddings(solver):
    """A network that is always right: every state is sqrt(abar) x_0 + sqrt(1 - abar) noise; x_0 by hand."""
    boxes = np.array([[0.25, 0.5, 0.75, 1.5], [-0.5, 0.0, 0.5, 0.5]], np.float32)
    # Scale 2, cxcywh: (.5, 1, .5, 1) -> (0, 2, 0, 2); (0, .25, 1, .5) -> (-2, -1, 2, 0).
    x_0 = np.array([[0, 2, 0, 2, 3, 0, 0, 0], [-2, -1, 2, 0, 0, 1.8, 2.4, 0]])
    embeddings = np.array([[1, 0, 0, 0], [0, 0.6, 0.8, 0]], np.float32)
    seen = []

    class PerfectEngine(MovingEngine):
        def denoise_step(self, features, boxes_t, emb_t, t, t_next):
            seen.append((int(t[0]), join_signal(boxes_t, emb_t)[0]))
            nothing = np.full_like(boxes_t, np.nan)
            return StepOutput(nothing, nothing, boxes[None], np.ones((1, 2), np.float32), embeddings[None])

    noise = np.random.default_rng(0).standard_normal((1, 2, 8)).astype(np.float32)
    start = noise[..., :4], noise[..., 4:]
    grid = SETTINGS.timesteps[8]
    output = denoise(PerfectEngine(), [], *start, grid, options=SamplerOptions(solver), settings=SETTINGS)
    assert output.boxes_xyxy[0].tolist() == boxes.tolist()
    for t, state in seen:
        level = Schedule(1000).at(t)
        np.testing.assert_allclose(state, level.signal * x_0 + level.noise * noise[0], atol=2e-4)
    assert len(seen) == (14 if solver == "dpm2s" else 8)


def test_the_host_steps_as_the_graph_of_the_shipped_bundle_does():
    detector = open_detector(threads=1)
    settings = detector.settings
    assert (settings.embedding_scale, settings.num_timesteps) == (3.0, 1000)
    image = np.random.default_rng(0).integers(0, 255, (1, settings.height, settings.width, 3), dtype=np.uint8)
    features = detector.engine.backbone(image)
    start = [part[None] for part in seeded_noise(0, 20, settings.embedding_dim)]
    graph, host = (
        list(
            denoise_steps(
                detector.engine, features, *start, settings.timesteps[3], options=options, settings=settings
            )
        )
        for options in (SamplerOptions(), SamplerOptions("dpm++1"))
    )
    for wanted, got in zip(graph, host, strict=True):
        np.testing.assert_allclose(got.boxes_xyxy, wanted.boxes_xyxy, atol=1e-3)
        np.testing.assert_allclose(got.scores, wanted.scores, atol=1e-3)
        assert (got.embeddings * wanted.embeddings).sum(-1).min() > 0.9999


@pytest.mark.parametrize(
    "options",
    [
        SamplerOptions("dpm2m"),
        SamplerOptions("dpm2s"),
        SamplerOptions(eta=1.0),
        SamplerOptions(renewal=0.6),
        SamplerOptions("dpm++2m", renewal=0.6, ensemble=True),
        SamplerOptions(eta=0.5, renewal=0.6),
        SamplerOptions(refresh=True),
        SamplerOptions(ensemble=True),
    ],
    ids=str,
)
def test_with_any_options_a_frame_is_found_the_same_alone_and_in_a_batch(options):
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (40, 50 + i, 3), dtype=np.uint8) for i in range(3)]
    together = Detector(MovingEngine(), SETTINGS).detect(frames, 3, [7, 8, 9], options=options)
    alone = [
        Detector(MovingEngine(), SETTINGS).detect([frame], 3, [7 + i], options=options)[0]
        for i, frame in enumerate(frames)
    ]
    for one, other in zip(together, alone, strict=True):
        assert len(one) > 0
        for name in ("boxes_xyxy", "scores", "embeddings"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_proposals_at_or_below_the_threshold_begin_again_boxes_and_embeddings_both():
    calls, outputs = states(SamplerOptions(renewal=0.6))
    both = 0
    for step, (output, (boxes, emb, _)) in enumerate(zip(outputs, calls[1:], strict=False), start=1):
        renewed = output.scores <= 0.6
        noise = fresh_noise([7, 8], step, (6, 8)).astype(np.float32)
        np.testing.assert_array_equal(boxes[renewed], noise[renewed][:, :4])
        np.testing.assert_array_equal(emb[renewed], noise[renewed][:, 4:])
        np.testing.assert_array_equal(boxes[~renewed], output.boxes_next[~renewed])
        np.testing.assert_array_equal(emb[~renewed], output.emb_next[~renewed])
        both += bool(renewed.any(axis=1).all())
    assert both, "some step must renew proposals in both images for this test to say anything"


def test_a_score_equal_to_the_threshold_is_renewed_and_nothing_is_after_the_last_step():
    _, plain = states(SamplerOptions(), steps=2)
    threshold = float(plain[0].scores.max())
    calls, _ = states(SamplerOptions(renewal=threshold), steps=2)
    assert len(calls) == 2
    noise = fresh_noise([7, 8], 1, (6, 8)).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate(calls[1][:2], axis=-1), noise)
    _, alone = states(SamplerOptions(renewal=1.0), steps=1)
    np.testing.assert_array_equal(alone[0].scores, plain[0].scores)


@pytest.mark.parametrize("solver", ["dpm2m", "dpm++2m"])
def test_a_renewed_proposal_takes_its_next_step_in_first_order(solver):
    calls, outputs = states(SamplerOptions(solver, renewal=0.6), steps=4)
    schedule, reset, kept = Schedule(1000), 0, 0
    for i in (1, 2):
        x_t = join_signal(*calls[i][:2])
        x_0 = join_signal(boxes_to_signal(outputs[i].boxes_xyxy, 2.0), 3.0 * outputs[i].embeddings)
        levels = (schedule.at(call[2]) for call in calls[i : i + 2])
        first_order = ddim(Evaluation(x_t, x_0, next(levels)), next(levels))
        x_next = join_signal(*calls[i + 1][:2])
        stays = outputs[i].scores > 0.6
        was_renewed = outputs[i - 1].scores <= 0.6
        same = np.isclose(x_next, first_order, rtol=0, atol=1e-5).all(axis=-1)
        assert same[stays & was_renewed].all()
        assert not same[stays & ~was_renewed].any()
        reset, kept = reset + (stays & was_renewed).sum(), kept + (stays & ~was_renewed).sum()
    assert reset > 0
    assert kept > 0


def test_refresh_starts_every_step_from_new_noise_while_t_walks_the_grid():
    calls, outputs = states(SamplerOptions(refresh=True), steps=4)
    assert [t for _, _, t in calls] == [999, 749, 499, 249]
    assert len(outputs) == 4
    for step, (boxes, emb, _) in enumerate(calls[1:], start=1):
        noise = fresh_noise([7, 8], step, (6, 8)).astype(np.float32)
        np.testing.assert_array_equal(np.concatenate([boxes, emb], axis=-1), noise)
    for (one, _, _), (other, _, _) in itertools.combinations(calls, 2):
        assert not np.isin(one, other).any()


def test_eta_mixes_fresh_noise_into_every_step_but_the_last():
    calls, outputs = states(SamplerOptions(eta=1.0), steps=3)
    schedule = Schedule(1000)
    for step, (one, other) in enumerate(itertools.pairwise(calls), start=1):
        output = outputs[step - 1]
        x_0 = join_signal(boxes_to_signal(output.boxes_xyxy, 2.0), 3.0 * output.embeddings)
        current = Evaluation(join_signal(*one[:2]), x_0, schedule.at(one[2]))
        noise = fresh_noise([7, 8], step, (6, 8))
        wanted = ddim(current, schedule.at(other[2]), eta=1.0, noise=noise)
        np.testing.assert_allclose(join_signal(*other[:2]), wanted, atol=1e-6)


def test_the_ensemble_selects_from_every_step_the_last_one_included():
    """The engine puts its box at 0.8 t / 1000 of the canvas: one place a step."""
    frame = np.zeros((32, 64, 3), np.uint8)
    [last] = Detector(MovingEngine(), SETTINGS).detect([frame], steps=4)
    [pooled] = Detector(MovingEngine(), SETTINGS).detect([frame], 4, options=SamplerOptions(ensemble=True))
    places = [0.8 * t / 1000 * 64 for t in (249, 499, 749, 999)]
    assert last.boxes_xyxy[:, 0].tolist() == pytest.approx(places[:1])
    assert sorted(pooled.boxes_xyxy[:, 0].tolist()) == pytest.approx(places)
    row = pooled.boxes_xyxy[:, 0].argmin()
    np.testing.assert_allclose(pooled.embeddings[row], last.embeddings[0], atol=1e-6)
    assert pooled.scores[row] == last.scores[0]


def test_the_ensemble_lays_the_outputs_of_the_steps_side_by_side():
    _, outputs = states(SamplerOptions(), steps=3)
    pooled = denoise(
        MovingEngine(),
        [np.array([7, 8], np.float32)],
        *noise_of([7, 8]),
        SETTINGS.timesteps[3],
        options=SamplerOptions(ensemble=True),
    )
    assert pooled.scores.shape == (2, 18)
    for i, output in enumerate(outputs):
        np.testing.assert_array_equal(pooled.scores[:, 6 * i : 6 * i + 6], output.scores)
        np.testing.assert_array_equal(pooled.embeddings[:, 6 * i : 6 * i + 6], output.embeddings)


@pytest.mark.parametrize(
    "options", [SamplerOptions("dpm2s"), SamplerOptions(eta=1.0), SamplerOptions("dpm2m")]
)
def test_given_boxes_stay_pinned_under_any_solver(options):
    engine, box = MovingEngine(), np.array([[10.0, 4.0, 20.0, 28.0]])
    detector = Detector(engine, SETTINGS)
    frame = np.zeros((32, 64, 3), np.uint8)
    embedding = detector.embed(frame, box, 3, options=options)
    for boxes_t, _, _ in engine.calls:
        np.testing.assert_array_equal(boxes_t, engine.calls[0][0])
    assert len({emb_t.tobytes() for _, emb_t, _ in engine.calls}) == len(engine.calls)
    assert np.linalg.norm(embedding) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_array_equal(embedding, detector.embed(frame, box, 3, options=options))
    assert np.abs(embedding - detector.embed(frame, box, 3)).max() > 1e-3


@pytest.mark.parametrize("options", [{"renewal": 0.5}, {"ensemble": True}, {"refresh": True}])
def test_given_boxes_are_neither_renewed_nor_pooled(options):
    detector = Detector(MovingEngine(), SETTINGS)
    with pytest.raises(ValueError, match="options must be a solver and eta alone where boxes are given"):
        detector.embed(
            np.zeros((32, 64, 3), np.uint8), np.array([[1, 1, 9, 9]]), options=SamplerOptions(**options)
        )


def test_a_bundle_that_does_not_tell_its_scales_refuses_host_solvers_only(detector):
    frame = np.zeros((96, 160, 3), np.uint8)
    for options in (
        SamplerOptions(),
        SamplerOptions(renewal=0.5, ensemble=True),
        SamplerOptions(refresh=True),
    ):
        detector.detect([frame], 2, options=options)
    with pytest.raises(ValueError, match=r"bundle must hold embedding_scale .*got none; export it again"):
        detector.detect([frame], 2, options=SamplerOptions("dpm2m"))


def test_one_seed_for_two_images_is_refused():
    with pytest.raises(ValueError, match=r"seeds must be one per image \(2\), got 1"):
        denoise(MovingEngine(), [np.zeros(2)], *noise_of([7, 8]), [999], seeds=[7])
