"""The commands that make and judge a model, through the command line."""

import json
import re

import cv2
import numpy as np
import pytest
from conftest import RED, scene
from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from psdiff.commands import train as train_command
from psdiff.models.person_search import save_checkpoint
from psdiff.training.city.sets import write_set
from psdiff.training.city.writing import Plan
from psdiff.training.dataset import FramePool
from psdiff.training.recipe import load_recipe
from tiny_run import tiny_model
from typer.testing import CliRunner

TINY_RECIPE = """
preset: psdiff_mobile
data: {frames: 3}
num_proposals: 8
loader_workers: 0
stages: [{width: 160, height: 96, batch_size: 2, iterations: 2}]
"""


def psdiff(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.slow
def test_a_model_is_trained_exported_and_judged(tmp_path):
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    trained = psdiff("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    checkpoint = tmp_path / "run" / "model.safetensors"
    assert f"wrote {checkpoint}; next: psdiff export {checkpoint} my-bundle" in trained.stdout
    assert re.search(r"stage 1: [\d.]+ images/s, \d+% of the time spent waiting for images", trained.stdout)
    exported = psdiff("export", checkpoint, tmp_path / "bundle", "--precision", "fp32")
    assert exported.exit_code == 0, exported.output
    names = {path.name for path in (tmp_path / "bundle").iterdir()}
    assert {"backbone.onnx", "e2e_k8.onnx"} <= names
    assert not any(precision in name for name in names for precision in ("fp16", "bf16"))
    judged = psdiff(
        "evaluate",
        tmp_path / "bundle",
        "--streets",
        1,
        "--steps",
        "1,2",
        "--clips",
        tmp_path,
        "--record",
        "--json",
    )
    assert judged.exit_code == 0, judged.output
    scores = json.loads(judged.stdout)["scores"]
    assert [row["steps"] for row in scores] == [1, 2]
    assert all(0 <= row["ap50"] <= 1 and row["queries"] > 0 for row in scores)
    manifest = load_manifest(tmp_path / "bundle")
    assert [row.steps for row in manifest.measurements] == [1, 2]
    assert manifest.training["stages"][0]["iterations"] == 2


@pytest.fixture
def tiny_training(tmp_path):
    """Options of a run of two seconds on frames of the street."""
    (tmp_path / "recipe.yaml").write_text(TINY_RECIPE)
    save_checkpoint(tiny_model(), tmp_path / "start.safetensors", {})
    return ["--recipe", tmp_path / "recipe.yaml", "--init", tmp_path / "start.safetensors", "--device", "cpu"]


def test_a_run_is_resumed_with_the_recipe_it_began_with(tiny_training, tmp_path):
    on = ["--frames", tmp_path / "frames", "--out", tmp_path / "run"]
    first = psdiff("train", *tiny_training, *on)
    assert first.exit_code == 0, first.output
    again = psdiff("train", *tiny_training, *on)
    assert again.exit_code == 2
    assert "out must be a new folder, got" in again.stderr
    resumed = psdiff("train", "--resume", *on)
    assert resumed.exit_code == 0, resumed.output
    assert resumed.stdout.startswith("wrote ")
    (tmp_path / "other.yaml").write_text(TINY_RECIPE.replace("batch_size: 2", "batch_size: 1"))
    refused = psdiff("train", "--resume", "--recipe", tmp_path / "other.yaml", *on)
    assert refused.exit_code == 2
    assert "stages.0.batch_size must be 2 as in the run in" in refused.stderr


def test_options_say_what_is_learnt_from(tiny_training, tmp_path):
    write_set("prw", tmp_path / "city", Plan(images=12, people=4, width=160, height=96))
    data = ["--data", tmp_path / "city", "--embeddings", tmp_path / "city/truth.npz"]
    trained = psdiff("train", *tiny_training, "--format", "prw", *data, "--out", tmp_path / "run")
    assert trained.exit_code == 0, trained.output
    assert f"--format prw --data {tmp_path / 'city'}" in trained.stdout
    kept = load_recipe(tmp_path / "run" / "recipe.yaml").data
    assert (kept.format, kept.root, kept.embeddings) == ("prw", data[1], data[3])


def test_a_loss_that_is_no_number_is_a_failure_and_not_a_mistake_of_the_caller(tiny_training, tmp_path):
    pool = FramePool(tmp_path, seed=0, size=3)
    for index in range(3):
        _, _, embeddings = pool.frame(index)
        path = tmp_path / "frames-0" / f"{index:07d}.npz"
        np.savez(path, **dict(np.load(path)) | {"embeddings": embeddings * np.nan})
    result = psdiff("train", *tiny_training, "--frames", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "loss must be finite, got" in line
    assert str(tmp_path / "run" / "non_finite_batch.pt") in line


def test_help_shows_how_to_train_on_several_gpus_and_how_to_resume():
    shown = " ".join(psdiff("train", "--help").stdout.split())
    for line in (
        "torchrun --nproc-per-node 4 -m psdiff train --recipe training/recipes/prw.yaml",
        "psdiff train --resume --out my-run",
        "psdiff train --backbone-weights imagenet --out my-run",
    ):
        assert line in shown


@pytest.mark.parametrize(("share", "advice"), [(0.04, ""), (0.2, "; loader_workers above 1 in the recipe")])
def test_a_run_that_waits_for_images_is_told_what_helps(share, advice):
    line = train_command._throughput(12.34, share, 1)
    assert line.startswith(f"12.3 images/s, {share:.0%} of the time spent waiting for images{advice}")
    assert ("loader_workers" in line) == bool(advice)


@pytest.fixture
def posetrack_root(tmp_path):
    """Three images, two of which show the person, where the tiny graphs of bundle_folder find everybody."""
    root = tmp_path / "posetrack"
    (root / "images/val").mkdir(parents=True)
    (root / "posetrack_person_search").mkdir()
    people = [((40, 24, 80, 72), RED)]
    for number, shown in enumerate([people, people, []]):
        cv2.imwrite(str(root / f"images/val/{number}.jpg"), scene(shown))
    images = [{"id": number, "file_name": f"images/val/{number}.jpg"} for number in range(3)]
    sightings = [{"image_id": number, "person_id": 5, "bbox": [40, 24, 40, 48]} for number in range(2)]
    halves = {"train": ([], []), "val": (images, sightings), "query": (images[:1], sightings[:1])}
    for half, (shown, annotations) in halves.items():
        content = json.dumps({"images": shown, "annotations": annotations})
        (root / f"posetrack_person_search/{half}.json").write_text(content)
    return root


def test_a_bundle_is_judged_on_a_data_set(bundle_folder, posetrack_root, tmp_path):
    on_set = ["--format", "posetrack21", "--data", posetrack_root, "--steps", "1,2"]
    judged = psdiff("evaluate", bundle_folder, *on_set, "--out", tmp_path / "report", "--json")
    assert judged.exit_code == 0, judged.output
    result = json.loads(judged.stdout)
    assert (result["model"], result["dataset"], result["images"]) == ("bundle", "posetrack21", 3)
    for row in result["scores"]:
        # The dark image gives one doubtful detection, below the two true ones and below the search threshold.
        assert (row["search"]["map"], row["search"]["top1"], row["search"]["queries"]) == (1, 1, 1)
        assert (row["detection"]["ap50"], row["detection"]["recall"], row["detection"]["people"]) == (1, 1, 2)
    written = sorted(path.name for path in (tmp_path / "report").iterdir())
    assert written == ["precision_recall.png", "report.json", "steps.png"]
    assert json.loads((tmp_path / "report/report.json").read_text()) == result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "plots"),
    [
        (
            "cuhk-sysu",
            ["--gallery-size", "50,100"],
            ["gallery_size.png", "precision_recall.png", "steps.png"],
        ),
        ("prw", ["--cross-camera"], ["precision_recall.png", "steps.png"]),
    ],
)
def test_the_other_person_search_sets_are_judged_too(bundle_folder, tmp_path, name, options, plots):
    write_set(name, tmp_path / "city", Plan(160, 40, seed=3, width=160, height=96, workers=1))
    on_set = ["--format", name, "--data", tmp_path / "city", "--steps", "1,2", *options]
    judged = psdiff("evaluate", bundle_folder, *on_set, "--out", tmp_path / "report", "--json")
    assert judged.exit_code == 0, judged.output
    result = json.loads(judged.stdout)
    assert result["dataset"].startswith(name)
    assert all(row["search"]["queries"] > 0 for row in result["scores"])
    assert sorted(path.name for path in (tmp_path / "report").glob("*.png")) == plots


def test_the_search_threshold_and_the_query_mode_reach_the_protocol(bundle_folder, posetrack_root):
    on_set = ["--format", "posetrack21", "--data", posetrack_root, "--steps", 1, "--batch-size", 2]
    judged = psdiff("evaluate", bundle_folder, *on_set, "--query-mode", "iou", "--score-threshold", 0.99)
    assert judged.exit_code == 0, judged.output
    assert "described by the detection that covers its box" in " ".join(judged.stdout.split())
    assert "score >= 0.99" in " ".join(judged.stdout.split())
    [row] = [line.split() for line in judged.stdout.splitlines() if line.split()[:1] == ["1"]]
    assert row[1:6] == ["2", "0.0", "0.0", "0.0", "0.0"]


@pytest.mark.slow
def test_a_checkpoint_is_judged_by_torch(posetrack_root, tmp_path):
    from psdiff.models.config import load_preset
    from psdiff.models.person_search import PSDiff, save_checkpoint

    config = load_preset("psdiff_mobile").model_copy(update={"width": 160, "height": 96, "num_proposals": 8})
    checkpoint = tmp_path / "model.safetensors"
    save_checkpoint(PSDiff(config), checkpoint, {})
    on_set = ["--format", "posetrack21", "--data", posetrack_root, "--steps", 1]
    judged = psdiff("evaluate", checkpoint, *on_set, "--json")
    assert judged.exit_code == 0, judged.output
    assert json.loads(judged.stdout)["model"] == "model.safetensors"
    refused = psdiff("evaluate", checkpoint, "--record", "--clips", tmp_path)
    assert refused.exit_code == 2
    assert "--record must go with a bundle, got the checkpoint" in refused.stderr


def test_synth_writes_clips_with_truth(tmp_path):
    result = psdiff(
        "synth", tmp_path / "street", "--seconds", 0.3, "--people", 2, "--width", 128, "--height", 64
    )
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "street").iterdir())
    assert names == ["camera1.mp4", "camera1.truth.json", "camera2.mp4", "camera2.truth.json"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "--recipe", "nowhere.yaml"], 2, "recipe must be a YAML file, got nowhere.yaml"),
        (
            ["train", "--backbone-weights", "nowhere.pth", "--out", "OUT"],
            2,
            "backbone weights must be imagenet or",
        ),
        (["train", "--init", "nowhere", "--out", "OUT"], 2, "checkpoint must be a .safetensors file, got"),
        (["train", "--resume", "--out", "OUT"], 2, "out must hold a run to resume, got"),
        (
            ["train", "--data", "OUT"],
            2,
            "data.format must be cuhk-sysu, prw or posetrack21 to read root",
        ),
        (["train", "--format", "prw", "--out", "OUT"], 2, "data.root must be given, got nothing; set it in"),
        (["train", "--format", "prw", "--data", "OUT"], 2, "data.embeddings must be given, got nothing;"),
        (
            ["train", "--format", "prw", "--data", "OUT", "--embeddings", "nowhere.npz", "--out", "OUT"],
            2,
            "out must exist, got nothing there",
        ),
        (["export", "nowhere.safetensors", "OUT"], 2, "checkpoint must be a .safetensors file, got nowhere"),
        (["evaluate", "nowhere"], 3, "bundle must be a folder with manifest.json, got nowhere"),
        (["evaluate", "nowhere.safetensors"], 2, "checkpoint must be a .safetensors file, got nowhere"),
        (
            ["evaluate", "--steps", "1,x"],
            2,
            "--steps must be whole numbers with commas between them, got 1,x",
        ),
        (["evaluate", "--out", "OUT"], 2, "--data and --out must go with --format cuhk-sysu, prw or"),
        (["evaluate", "--format", "prw"], 2, "--data must be the folder of the data set with --format prw"),
        (["evaluate", "--format", "prw", "--data", "OUT"], 2, "out must exist, got nothing there"),
        (
            ["evaluate", "--format", "prw", "--data", "OUT", "--record"],
            2,
            "must go with --format clips, got prw",
        ),
        (
            ["evaluate", "--format", "cuhk-sysu", "--data", "OUT", "--cross-camera"],
            2,
            "--cross-camera must go with --format prw, got cuhk-sysu",
        ),
        (
            ["evaluate", "--format", "prw", "--data", "OUT", "--gallery-size", "50"],
            2,
            "--gallery-size must go with --format cuhk-sysu, got prw",
        ),
        (["synth", "OUT", "--width", "65"], 2, "width and height must be even, got 65 x 384"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(tmp_path, arguments, code, message):
    result = psdiff(*(tmp_path / "out" if argument == "OUT" else argument for argument in arguments))
    assert result.exit_code == code
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in result.output
