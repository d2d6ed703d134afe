"""The loop and its recipe: a run from start to checkpoint, what it logs, and what stops it."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from psdiff.models.person_search import load_checkpoint
from psdiff.training import train as training
from psdiff.training.dataset import CanvasFrames, FramePool, frame_batches
from psdiff.training.noising import image_generator
from psdiff.training.objective import denoising_objective
from psdiff.training.progress import RunningAverages, Stopwatch
from psdiff.training.recipe import RECIPES, RecipeError, Stage, load_recipe, save_recipe
from psdiff.training.resume import STATE
from psdiff.training.start import StartError
from psdiff.training.teacher.recipe import load_teacher_recipe
from tiny_run import assert_same, tiny_model, tiny_recipe, tiny_stage, weights, write_tiny_checkpoint


@pytest.fixture
def tiny_checkpoint(tmp_path):
    return write_tiny_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """A folder for the frames that all runs draw."""
    return tmp_path_factory.mktemp("frames")


def state_of(out):
    return torch.load(out / STATE, weights_only=True)


def test_a_run_writes_a_checkpoint_a_log_and_its_notes(tmp_path, tiny_checkpoint):
    seen = []
    stages = [
        {"width": 96, "height": 64, "batch_size": 2, "iterations": 2},
        {"width": 160, "height": 96, "batch_size": 2, "iterations": 2},
    ]
    path = training.train(
        tiny_recipe(stages=stages), tmp_path / "run", init=tiny_checkpoint, on_progress=seen.append
    )
    model, notes = load_checkpoint(path)
    assert (model.config.width, model.config.height, model.config.canonical_size) == (160, 96, 56.0)
    assert notes["made_by"] == "a test"
    assert [stage["iterations"] for stage in notes["stages"]] == [2, 2]
    assert notes["frames"] == 8
    assert [(p.stage, p.iteration, p.share) for p in seen] == [(0, 1, 0.5), (0, 2, 1), (1, 1, 0.5), (1, 2, 1)]
    assert all(p.images_per_s > 0 and 0 < p.loader_share < 1 for p in seen)
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == [0, 1]
    before, _ = load_checkpoint(tiny_checkpoint)
    assert not torch.equal(model.denoiser.heads.logit.weight, before.denoiser.heads.logit.weight)


def test_the_curves_are_in_tensorboard(tmp_path, tiny_checkpoint, frames):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    stages = [tiny_stage(batch_size=1, iterations=1), tiny_stage(width=64, height=32, iterations=22)]
    training.train(
        tiny_recipe(stages=stages),
        tmp_path / "run",
        init=tiny_checkpoint,
        frames_folder=frames,
        on_progress=seen.append,
    )
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"total", "classification", "l1", "giou", "reid", "learning_rate"} <= set(events.Tags()["scalars"])
    # By images: one of the first stage, then two an iteration; points at the iterations 1, 1 and 21.
    losses = [(point.step, point.value) for point in events.Scalars("total")]
    assert losses == [(step, pytest.approx(seen[i].loss)) for step, i in ((1, 0), (3, 1), (43, 21))]


def test_the_same_seed_gives_the_same_weights(tmp_path, tiny_checkpoint, frames):
    runs = [
        training.train(tiny_recipe(seed=seed), tmp_path / name, init=tiny_checkpoint, frames_folder=frames)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, second, other_seed = (weights(path) for path in runs)
    assert_same(first, second)
    assert not torch.equal(first["denoiser.heads.logit.weight"], other_seed["denoiser.heads.logit.weight"])


def test_frozen_stages_do_not_move(tmp_path, tiny_checkpoint, frames):
    recipe = tiny_recipe(frozen_stages=2)
    path = training.train(recipe, tmp_path / "run", init=tiny_checkpoint, frames_folder=frames)
    after, before = (load_checkpoint(p)[0].backbone.stages for p in (path, tiny_checkpoint))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(after, before, strict=True)
    ]
    assert moved == [False, False, True, True]


def gradients(recipe, samples, frames):
    """Gradients of the loss of the images that a run reads as `samples`, one batch."""
    model = tiny_model().train()
    items = CanvasFrames(FramePool(frames, 0, 4), samples, seed=0, width=160, height=96)
    [batch] = frame_batches(items, batch_size=len(samples), workers=0)
    generators = [image_generator(0, sample) for sample in batch.samples]
    features = model.backbone(batch.images)
    denoising_objective(model.denoiser, features, batch.people, recipe, generators).loss.total.backward()
    stages, fpn = model.backbone.stages, model.backbone.fpn
    trained = [*stages[2:].parameters(), *fpn.parameters(), *model.denoiser.parameters()]
    return torch.cat([parameter.grad.flatten() for parameter in trained if parameter.requires_grad])


def test_accumulating_two_images_takes_the_mean_of_their_gradients(tmp_path, tiny_checkpoint, frames):
    stage = tiny_stage(batch_size=1, accumulate=2, iterations=1)
    recipe = tiny_recipe(stages=[stage], max_gradient_norm=1e9)
    training.train(recipe, tmp_path / "run", init=tiny_checkpoint, frames_folder=frames)
    moments = state_of(tmp_path / "run")["optimizer"]["state"].values()
    # Adam's first moment after one step is a tenth of the gradient.
    found = 10 * torch.cat([moment["exp_avg"].flatten() for moment in moments])
    first, second = (gradients(recipe, range(i, i + 1), frames) for i in (0, 1))
    assert (found - (first + second) / 2).norm() < 1e-4 * found.norm()
    assert (first - second).norm() > 0.1 * found.norm()


def test_gradients_are_clipped_and_the_backbone_has_a_rate_of_its_own(tmp_path, tiny_checkpoint, frames):
    stage = tiny_stage(iterations=1, learning_rate=1e-3, warmup_iterations=10)
    recipe = tiny_recipe(stages=[stage], max_gradient_norm=0.5, backbone_learning_rate=0.3)
    training.train(recipe, tmp_path / "run", init=tiny_checkpoint, frames_folder=frames)
    optimizer = state_of(tmp_path / "run")["optimizer"]
    norm = torch.cat([10 * moment["exp_avg"].flatten() for moment in optimizer["state"].values()]).norm()
    assert norm.item() == pytest.approx(0.5, rel=1e-3)
    assert [group["lr"] for group in optimizer["param_groups"]] == pytest.approx([3e-6, 1e-5])


PAPER = Stage(iterations=90_000, warmup_iterations=1000)


@pytest.mark.parametrize(
    ("decay", "iteration", "factor"),
    [
        ("steps", 0, 0.01),
        ("steps", 500, 0.505),
        ("steps", 1000, 1),
        ("steps", 69_999, 1),
        ("steps", 70_000, 0.1),
        ("steps", 83_999, 0.1),
        ("steps", 84_000, 0.01),
        ("cosine", 0, 0.01),
        ("cosine", 45_000, 1),
        ("cosine", 67_500, 0.51),
        ("cosine", 90_000, 0.02),
        ("none", 500, 0.505),
        ("none", 89_999, 1),
    ],
)
def test_the_learning_rate_warms_up_and_decays(decay, iteration, factor):
    stage = PAPER.model_copy(update={"decay": decay})
    found = training.learning_rate_factor(stage, iteration, iteration / 90_000)
    assert found == pytest.approx(factor, rel=1e-9)


def test_a_stage_without_warm_up_starts_at_its_rate():
    stage = Stage(minutes=5, warmup_iterations=0, decay="none")
    assert training.learning_rate_factor(stage, 0, 0.0) == 1


def test_the_average_is_that_of_the_weights_after_each_iteration(tmp_path, tiny_checkpoint, frames):
    out, after = tmp_path / "run", []

    def collect(progress):
        if progress.iteration > 1:
            after.append(state_of(out)["model"])

    stage = tiny_stage(iterations=4, learning_rate=2e-3, warmup_iterations=0)
    recipe = tiny_recipe(stages=[stage], ema_decay=0.75, save_every_minutes=1e-9)
    path = training.train(recipe, out, init=tiny_checkpoint, frames_folder=frames, on_progress=collect)
    after.append(state_of(out)["model"])
    name = "denoiser.heads.logit.weight"
    expected = after[0][name]
    for state in after[1:]:
        expected = 0.75 * expected + 0.25 * state[name]
    averaged = weights(path)
    torch.testing.assert_close(averaged[name], expected, rtol=0, atol=1e-6)
    assert (averaged[name] - after[-1][name]).abs().max() > 3e-4
    kept = state_of(out)["average"]
    assert_same(averaged, {name: kept[f"module.{name}"] for name in averaged})


def test_bfloat16_trains_float32_weights(tmp_path, tiny_checkpoint, frames):
    losses, paths = {}, {}
    for precision in ("float32", "bfloat16"):
        seen = []
        paths[precision] = training.train(
            tiny_recipe(precision=precision, stages=[tiny_stage(iterations=2)]),
            tmp_path / precision,
            init=tiny_checkpoint,
            frames_folder=frames,
            on_progress=seen.append,
        )
        losses[precision] = [progress.loss for progress in seen]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)
    assert losses["bfloat16"] != losses["float32"]
    state = state_of(tmp_path / "bfloat16")["model"]
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path, tiny_checkpoint):
    pool = FramePool(tmp_path, seed=0, size=4)
    _, boxes, embeddings = pool.frame(2)
    stored = dict(np.load(tmp_path / "frames-0" / "0000002.npz"))
    np.savez(tmp_path / "frames-0" / "0000002.npz", **stored | {"embeddings": embeddings * np.nan})
    out = tmp_path / "run"
    recipe = tiny_recipe(stages=[tiny_stage(batch_size=1, iterations=4)], save_every_minutes=1e-9)
    with pytest.raises(training.NonFiniteLossError, match=r"loss must be finite, got .* at iteration 2"):
        training.train(recipe, out, init=tiny_checkpoint, frames_folder=tmp_path)
    kept = torch.load(out / "non_finite_batch.pt", weights_only=True)
    assert kept["samples"] == [2]
    assert kept["images"].shape == (1, 96, 160, 3)
    [(kept_boxes, kept_embeddings)] = kept["people"]
    assert kept_boxes.shape == (len(boxes), 4)
    assert kept_embeddings.isnan().all()
    # What was saved after the iteration before is good.
    assert all(value.isfinite().all() for value in weights(out / training.CHECKPOINT).values())
    assert state_of(out)["iteration"] == 2


def test_a_gradient_that_is_no_number_does_not_reach_the_weights(tmp_path, tiny_checkpoint, monkeypatch):
    def with_overflow(*arguments, **options):
        model = resized(*arguments, **options)
        model.denoiser.heads.logit.weight.register_hook(lambda gradient: gradient * float("inf"))
        return model

    resized = training.resized
    monkeypatch.setattr(training, "resized", with_overflow)
    with pytest.raises(training.NonFiniteLossError, match="norm of the gradient must be finite"):
        training.train(tiny_recipe(), tmp_path / "run", init=tiny_checkpoint)
    assert (tmp_path / "run" / "non_finite_batch.pt").is_file()
    assert not (tmp_path / "run" / training.CHECKPOINT).exists()


def test_what_a_step_draws_does_not_depend_on_the_steps_before(frames):
    model = tiny_model().train()
    # Swin's stochastic depth draws from the global generator, as dropout does.
    model.backbone.stages[3].append(torch.nn.Dropout(0.5))
    step = training._Step(model, tiny_recipe())
    items = CanvasFrames(FramePool(frames, 0, 4), range(2), seed=0, width=160, height=96)
    [batch] = frame_batches(items, batch_size=2, workers=0)
    first, second = step(batch).loss.total, step(batch).loss.total
    assert torch.equal(first, second)
    model.backbone.stages[3][-1].p = 0.4
    assert not torch.equal(first, step(batch).loss.total)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"preset": "psdiff_r51"}, {}, "preset must be one of .*; did you mean psdiff_r50"),
        ({}, {"init": Path("nowhere")}, "checkpoint must be a .safetensors file, got nowhere"),
        ({}, {"backbone_weights": "nowhere.pth"}, "backbone weights must be imagenet or"),
    ],
)
def test_a_wrong_start_is_told_before_anything_is_written(tmp_path, changes, options, message):
    with pytest.raises(StartError, match=message):
        training.train(tiny_recipe(**changes), tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def test_running_averages_weigh_the_new_value_by_a_fiftieth():
    averages = RunningAverages({"total": 10.0})
    averages.add("total", 0.0)
    averages.add("l1", 3.0)
    assert averages.values == {"total": pytest.approx(9.8), "l1": 3.0}


def test_the_stopwatch_tells_waiting_from_working():
    def slow():
        for item in range(3):
            time.sleep(0.02)
            yield item

    watch = Stopwatch()
    for _ in watch.watch(slow()):
        time.sleep(0.04)
    assert 0.06 <= watch.waited < watch.seconds
    assert watch.seconds - watch.waited >= 0.12


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stages: [{width: 320, height: 192, minutes: 1}]\nmaching: simota",
            r"maching must be a known key; did you mean matching\?",
        ),
        ("stages: [{width: 320, height: 190}]", "multiple of 32, got 190"),
        ("stages: [{width: 320, height: 192}]", "stages.0: iterations or minutes must be given"),
        ("stages: [{minutes: 1}]\ndata: {format: pwr}", "data.format: .*'prw'.* got 'pwr'"),
        ("stages: [{minutes: 1}]\ndata: {folder: a}", "data.folder must be a known key"),
        ("stages: []", "at least 1 item"),
        ("stages: [", "recipe must be YAML"),
        ("", "valid dictionary"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_recipe_that_is_saved_is_the_same_recipe(tmp_path):
    data = {"format": "prw", "root": tmp_path, "embeddings": tmp_path / "a.npz"}
    recipe = tiny_recipe(data=data, ema_decay=0.9998, stages=[tiny_stage(), tiny_stage(minutes=2.5)])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_the_shipped_recipes_load():
    teachers = set(RECIPES.glob("teacher_*.yaml"))
    assert {load_teacher_recipe(path).network.backbone for path in teachers} == {"mobilenet_v2"}
    found = {path.stem: load_recipe(path) for path in set(RECIPES.glob("*.yaml")) - teachers}
    assert {name: (recipe.preset, recipe.data.format) for name, recipe in found.items()} == {
        "psdiff_mobile": ("psdiff_mobile", "street"),
        "cuhk_sysu": ("psdiff_r50", "cuhk-sysu"),
        "prw": ("psdiff_r50", "prw"),
    }
    for name in ("cuhk_sysu", "prw"):
        [stage] = found[name].stages
        assert (stage.width, stage.height, stage.iterations) == (1344, 768, 90_000)
        assert stage.batch_size * stage.accumulate == 32
        assert stage.learning_rate == 2.5e-5
