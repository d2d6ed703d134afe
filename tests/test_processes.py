"""Two processes on half a batch each are one process on the whole batch."""

import json
import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from psdiff.training import train as training
from psdiff.training.recipe import save_recipe
from psdiff.training.resume import STATE
from tiny_run import tiny_recipe, tiny_stage, weights, write_tiny_checkpoint

SETTINGS = {
    # Pairs differ in number from image to image: each process must divide by the mean over both.
    "matching": "simota",
    "padding": "mixed",
    "dense_iou": 0.5,
    "dense_max_timestep": 150,
    "embedding_dropout": 0.5,
    "embedding_error": 0.7,
    "threads": 1,
    # A line in the log for every iteration.
    "save_every_minutes": 1e-9,
}


def recipe(**stage):
    return tiny_recipe(
        stages=[tiny_stage(learning_rate=1e-4, warmup_iterations=10, decay="none", **stage)], **SETTINGS
    )


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    return subprocess.run(
        [*command, "-m", "psdiff", "train", *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


class Whole(NamedTuple):
    weights: torch.Tensor
    moment: torch.Tensor


def whole(out):
    """All weights of a run, and all first moments of its optimizer."""
    moments = torch.load(out / STATE, weights_only=True)["optimizer"]["state"].values()
    return Whole(
        torch.cat([value.flatten() for value in weights(out / training.CHECKPOINT).values()]),
        torch.cat([moment["exp_avg"].flatten() for moment in moments]),
    )


def log(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {line["iteration"]: line for line in lines}


@pytest.mark.slow
def test_two_processes_train_as_one_does_on_their_common_batch(tmp_path):
    start, frames = write_tiny_checkpoint(tmp_path), tmp_path / "frames"
    training.train(recipe(batch_size=2, accumulate=2), tmp_path / "alone", init=start, frames_folder=frames)
    save_recipe(recipe(batch_size=1, accumulate=2), tmp_path / "recipe.yaml")
    on = ["--init", start, "--frames", frames, "--device", "cpu"]
    ran = torchrun("--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "two", *on)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("wrote ") == 1
    assert "destroy_process_group" not in ran.stderr
    for iteration, line in log(tmp_path / "alone").items():
        two = log(tmp_path / "two")[iteration]
        for name in ("total", "classification", "l1", "giou", "reid"):
            assert two[name] == pytest.approx(line[name], rel=1e-5), (iteration, name)
    first, second = (whole(out) for out in (tmp_path / "alone", tmp_path / "two"))
    before = torch.cat([value.flatten() for value in weights(start).values()])
    assert (first.weights - second.weights).abs().max() < 1e-5
    assert (first.weights - second.weights).norm() < 0.01 * (first.weights - before).norm()
    # Adam's first moment is a sum of the gradients; the weights move by about the sign of it.
    assert (first.moment - second.moment).norm() < 2e-3 * first.moment.norm()
