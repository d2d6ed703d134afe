"""The commands that make and judge a model, through the command line."""

import json

import pytest
from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from typer.testing import CliRunner

TINY_RECIPE = """
preset: psdiff_mobile
frames: 3
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
    exported = psdiff("export", tmp_path / "run" / "model.safetensors", tmp_path / "bundle")
    assert exported.exit_code == 0, exported.output
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
        (["export", "nowhere.safetensors", "OUT"], 2, "checkpoint must be a .safetensors file, got nowhere"),
        (["evaluate", "nowhere"], 3, "bundle must be a folder with manifest.json, got nowhere"),
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
