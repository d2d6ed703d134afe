"""A run that was killed goes on to the same weights, and only from a state of its own."""

import json
import pickle
import random
import signal
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from psdiff.training import train as training
from psdiff.training.progress import Progress
from psdiff.training.recipe import load_recipe, save_recipe
from psdiff.training.resume import RECIPE, STATE, ResumeError, load_state, recipe_key
from tiny_run import assert_same, tiny_recipe, tiny_stage, weights, write_tiny_checkpoint

RUN = tiny_recipe(
    stages=[
        tiny_stage(width=96, height=64, batch_size=1, accumulate=2, iterations=4, decay="none"),
        tiny_stage(batch_size=1, iterations=8, learning_rate=1e-4, warmup_iterations=2, decay="cosine"),
    ],
    # The order of sums, and so the last bits, depend on the number of threads.
    threads=1,
    # After every iteration.
    save_every_minutes=1e-9,
    ema_decay=0.9,
    matching="simota",
    padding="mixed",
    dense_iou=0.5,
    dense_max_timestep=150,
    embedding_dropout=0.5,
    embedding_error=0.7,
)

IN_A_PROCESS = """
import sys
from pathlib import Path
from psdiff.training.recipe import load_recipe
from psdiff.training.train import train

recipe, start, frames, out = map(Path, sys.argv[1:])
tell = lambda progress: print(progress.stage, progress.iteration, flush=True)
train(load_recipe(recipe), out, init=start, frames_folder=frames, on_progress=tell)
"""


class PowerCutError(Exception):
    """In the place of a power cut."""


class Uninterrupted(NamedTuple):
    start: str
    frames: str
    out: str
    seen: list[Progress]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    start, seen = write_tiny_checkpoint(folder), []
    training.train(RUN, folder / "run", init=start, frames_folder=folder, on_progress=seen.append)
    return Uninterrupted(start, folder, folder / "run", seen)


def state_of(out):
    return torch.load(out / STATE, weights_only=True)


def assert_as_if_nothing_had_happened(out, uninterrupted):
    assert_same(weights(out / training.CHECKPOINT), weights(uninterrupted.out / training.CHECKPOINT))
    state, reference = state_of(out), state_of(uninterrupted.out)
    for name in ("model", "average", "optimizer", "averages", "iteration", "samples", "stage"):
        assert_same(state[name], reference[name])
    stages, wanted = (training_notes(folder)["stages"] for folder in (out, uninterrupted.out))
    assert [(s["width"], s["iterations"]) for s in stages] == [(s["width"], s["iterations"]) for s in wanted]


def training_notes(out):
    return training.start(RUN, None, out / training.CHECKPOINT)[1]


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_weights(uninterrupted, tmp_path):
    seed = random.randrange(1000)
    moment = random.Random(seed).randrange(1, 10)
    print(f"killed after step {moment} of 12, seed {seed}")
    save_recipe(RUN, tmp_path / "recipe.yaml")
    arguments = [tmp_path / "recipe.yaml", uninterrupted.start, uninterrupted.frames, tmp_path / "run"]
    command = [sys.executable, "-c", IN_A_PROCESS, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        for _ in range(moment + 1):
            run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL
    assert 1 <= state_of(tmp_path / "run")["samples"] < 16
    training.train(RUN, tmp_path / "run", frames_folder=uninterrupted.frames, resume=True)
    assert_as_if_nothing_had_happened(tmp_path / "run", uninterrupted)


@pytest.mark.parametrize(
    ("stage", "iteration", "saved"),
    [(0, 3, (0, 2)), (1, 1, (0, 4)), (1, 8, (1, 7))],
    ids=["in the first stage", "between the stages", "in the last step"],
)
def test_where_a_run_stopped_does_not_matter(uninterrupted, tmp_path, stage, iteration, saved):
    def stop(progress):
        if (progress.stage, progress.iteration) == (stage, iteration):
            raise PowerCutError

    out, frames = tmp_path / "run", uninterrupted.frames
    with pytest.raises(PowerCutError):
        training.train(RUN, out, init=uninterrupted.start, frames_folder=frames, on_progress=stop)
    assert (state_of(out)["stage"], state_of(out)["iteration"]) == saved
    seen = []
    training.train(RUN, out, frames_folder=frames, resume=True, on_progress=seen.append)
    skipped = saved[0] * 4 + saved[1]
    assert [(p.stage, p.iteration, p.loss) for p in seen] == [
        (p.stage, p.iteration, p.loss) for p in uninterrupted.seen[skipped:]
    ]
    assert_as_if_nothing_had_happened(out, uninterrupted)


def test_resuming_a_run_that_is_over_changes_nothing(uninterrupted, tmp_path):
    seen, before = [], weights(uninterrupted.out / training.CHECKPOINT)
    path = training.train(
        RUN, uninterrupted.out, frames_folder=uninterrupted.frames, resume=True, on_progress=seen.append
    )
    assert seen == []
    assert_same(weights(path), before)
    assert [stage["iterations"] for stage in training_notes(uninterrupted.out)["stages"]] == [4, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"seed must be 0 as in the run in .*, got 1"),
        ({"ema_decay": None}, r"ema_decay must be 0.9 as in the run in .*, got null"),
        ({"data": {"frames": 5}}, r"data.frames must be 4 as in the run in .*, got 5"),
        (
            {"stages": [RUN.stages[0], RUN.stages[1].model_copy(update={"learning_rate": 2e-4})]},
            r"stages.1.learning_rate must be 0.0001 as in the run in .*, got 0.0002",
        ),
        ({"stages": [RUN.stages[0]]}, r"stages.1.width must be 160 as in the run in .*, got null"),
    ],
)
def test_another_recipe_is_refused_and_the_key_is_named(uninterrupted, changes, message):
    other = type(RUN).model_validate(RUN.model_dump() | changes)
    with pytest.raises(ResumeError, match=message):
        training.train(other, uninterrupted.out, frames_folder=uninterrupted.frames, resume=True)


def test_what_does_not_change_the_result_may_change(uninterrupted):
    other = RUN.model_copy(update={"threads": 1, "loader_workers": 3, "save_every_minutes": 9.0})
    assert recipe_key(other) == recipe_key(RUN)
    assert load_state(uninterrupted.out, other, 1).iteration == 8


def test_another_number_of_processes_is_refused(uninterrupted):
    with pytest.raises(ResumeError, match=r"number of processes must be 1 as in the run in .*, got 4"):
        load_state(uninterrupted.out, RUN, 4)


def test_a_run_does_not_overwrite_another(uninterrupted):
    before = weights(uninterrupted.out / training.CHECKPOINT)
    with pytest.raises(ResumeError, match=r"out must be a new folder, got .* with a run in it; add --resume"):
        training.train(RUN, uninterrupted.out, init=uninterrupted.start)
    assert_same(weights(uninterrupted.out / training.CHECKPOINT), before)


def test_there_must_be_a_run_to_resume_and_nothing_is_written_without(tmp_path):
    with pytest.raises(ResumeError, match=r"out must hold a run to resume, got .*nowhere without resume\.pt"):
        training.train(RUN, tmp_path / "nowhere", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 10, 5000, -1])
def test_a_damaged_state_is_refused(uninterrupted, tmp_path, size):
    content = (uninterrupted.out / STATE).read_bytes()
    (tmp_path / STATE).write_bytes(content[:size])
    with pytest.raises(
        ResumeError, match=r"resume\.pt must be written by psdiff train, got a file that cannot"
    ):
        load_state(tmp_path, RUN, 1)


@pytest.mark.parametrize(
    "content", [b"weights", bytes(range(256)), pickle.dumps({"stage": 1}), b"\x80\x02]q."]
)
def test_another_file_in_the_place_of_the_state_is_refused(tmp_path, content):
    (tmp_path / STATE).write_bytes(content)
    with pytest.raises(ResumeError, match=r"resume\.pt must be written by psdiff train"):
        load_state(tmp_path, RUN, 1)


class Exploit:
    """A pickle that makes a file where it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_state_with_code_in_it_is_refused_and_the_code_does_not_run(uninterrupted, tmp_path):
    trap = tmp_path / "it-ran"
    torch.save(state_of(uninterrupted.out) | {"notes": Exploit(trap)}, tmp_path / STATE)
    with pytest.raises(ResumeError, match="UnpicklingError"):
        load_state(tmp_path, RUN, 1)
    assert not trap.exists()


def test_the_state_is_whole_or_not_there(uninterrupted, tmp_path, monkeypatch):
    def break_off(content, path):
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    saved = load_state(uninterrupted.out, RUN, 1)
    training.save_state(saved, tmp_path)
    monkeypatch.setattr(torch, "save", break_off)
    with pytest.raises(OSError, match="no space"):
        training.save_state(saved, tmp_path)
    monkeypatch.undo()
    assert_same(vars(load_state(tmp_path, RUN, 1)), vars(saved))


def test_the_recipe_of_the_run_is_kept_with_it(uninterrupted):
    assert load_recipe(uninterrupted.out / RECIPE) == RUN


def test_the_log_counts_every_iteration_of_the_run_once(uninterrupted):
    lines = [json.loads(line) for line in (uninterrupted.out / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["iteration"]) for line in lines]
    assert sorted(set(steps)) == [(0, i) for i in range(1, 5)] + [(1, i) for i in range(1, 9)]
    assert all(line["total"] > 0 for line in lines)
