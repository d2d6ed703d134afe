import json
import subprocess
import sys
from dataclasses import replace

import av
import numpy as np
import pytest
from PIL import Image
from psdiff.demo import (
    CAMERAS,
    DemoError,
    DemoResult,
    JudgedHit,
    Truth,
    Wanted,
    best_hits,
    iou,
    judged,
    pick_wanted,
    run_demo,
    verdict,
)
from psdiff.runtime.events import ModelRecord, RunSummary
from psdiff.runtime.query import Hit
from psdiff.training.synthetic.clips import ClipTruth, FrameTruth, read_truth
from rich.console import Console

LEFT, MIDDLE, SMALL = (10.0, 10.0, 50.0, 90.0), (60.0, 10.0, 100.0, 90.0), (70.0, 20.0, 80.0, 40.0)


def truth(*frames):
    """Each frame: (box, pid, visibility) a person."""
    told = [
        FrameTruth(
            boxes_xyxy=[box for box, _, _ in people],
            pids=[pid for _, pid, _ in people],
            visibility=[seen for _, _, seen in people],
        )
        for people in frames
    ]
    return ClipTruth(seed=0, camera=0, fps=10, width=160, height=96, codes=[], frames=told)


def hit(box=LEFT, seq=0, cos=0.9, camera="camera-2", is_match=True):
    crop = np.zeros((4, 4, 3), np.uint8)
    return Hit(camera, seq, seq / 10, box, 0.8, cos, is_match, crop)


def result_of(*hits):
    model = ModelRecord(id="m", sha256="0", space="s")
    summary = RunSummary(
        model=model,
        steps=2,
        query="query",
        match_threshold=0.7,
        interrupted=False,
        seconds=1.0,
        sources=[],
        files=[],
    )
    return DemoResult(Wanted(3, 0, LEFT), hits, None, summary, (), 1.0)


def check_files(out, num_frames):
    """Whatever the demo promises lies in out, and is whole."""
    assert sorted(path.name for path in out.iterdir()) == [
        "camera-1.mp4", "camera-2.mp4", "clips", "events.jsonl", "hits.png", "query.png", "summary.json",
    ]  # fmt: skip
    for camera in CAMERAS:
        assert len(read_truth(out / "clips" / f"{camera}.truth.json").frames) == num_frames
        for path in (out / f"{camera}.mp4", out / "clips" / f"{camera}.mp4"):
            with av.open(str(path)) as container:
                sizes = [(frame.width, frame.height) for frame in container.decode(video=0)]
            assert sizes == [(960, 576)] * num_frames, path
    for name in ("query.png", "hits.png"):
        Image.open(out / name).load()
    summary = json.loads((out / "summary.json").read_text())
    assert [source["frames_processed"] for source in summary["sources"]] == [num_frames] * 2
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert len(events) == sum(source["detections"] for source in summary["sources"]) > 0
    for data in (event["data"] for event in events):
        assert 0 <= data["frame_seq"] < num_frames
        x1, y1, x2, y2 = data["det"]["box"]
        assert 0 <= x1 <= x2 <= 960
        assert 0 <= y1 <= y2 <= 576
        assert -1 <= data["match"]["cos"] <= 1
        assert data["compute"]["steps"] == summary["steps"]


def test_the_demo_leaves_what_it_promises_and_says_what_it_found(fake_bundle, tmp_path):
    out = tmp_path / "out"
    with (tmp_path / "printed").open("w") as file:
        result = run_demo(out, bundle=fake_bundle, duration_s=0.8, console=Console(file=file, width=100))
    check_files(out, num_frames=8)
    assert all(path.is_file() for path in result.files)
    printed = (tmp_path / "printed").read_text()
    for text in ("query: camera 1 at", "rank", "cosine", "box score", "hits.png", verdict(result)):
        assert text in printed
    assert {found.hit.camera for found in result.hits} <= {"camera-2"}
    for source in result.summary.sources:
        best, told = best_hits(out / "events.jsonl", source.camera)[0], source.best_hit
        assert (best.camera, best.seq, best.cos) == (source.camera, told.frame_seq, told.cos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 to 4, got 0"),
        ({"duration_s": 0.0}, "duration must be at least one frame, 0.1 s, got 0"),
        ({"seed": -1}, "seed must be a whole number >= 0, got -1"),
    ],
)
def test_a_wrong_argument_is_refused_before_anything_is_written(fake_bundle, tmp_path, arguments, message):
    with pytest.raises(DemoError, match=message):
        run_demo(tmp_path / "out", bundle=fake_bundle, console=Console(quiet=True), **arguments)
    assert not (tmp_path / "out").exists()


def test_a_street_without_an_answer_is_refused(fake_bundle, tmp_path):
    with pytest.raises(DemoError, match=r"got nobody with seed 2 in 0\.2 s; take another seed"):
        run_demo(tmp_path / "out", bundle=fake_bundle, duration_s=0.2, console=Console(quiet=True))


def test_the_wanted_person_is_the_largest_whole_one_whom_the_other_camera_shows_too():
    here = truth([(SMALL, 1, 1.0), (LEFT, 2, 1.0)], [(LEFT, 4, 0.9), (MIDDLE, 3, 0.96)])
    both = [[(LEFT, 1, 0.9), (SMALL, 3, 0.85)]] * 5
    assert pick_wanted(here, truth(*both)) == Wanted(3, 1, MIDDLE), "2 is never in the other, 4 is hidden"
    assert pick_wanted(here, truth([(LEFT, 1, 0.9), (SMALL, 3, 0.7)], *both[1:])) == Wanted(1, 0, SMALL)
    assert pick_wanted(truth([]), truth(*both)) is None


def test_a_hit_shows_whom_its_box_overlaps():
    told = truth([(LEFT, 3, 1.0), (MIDDLE, 5, 1.0)], [])
    hits = [hit(LEFT), hit(MIDDLE), hit(SMALL), hit(LEFT, seq=1)]
    assert [found.truth for found in judged(hits, told, 3)] == [
        Truth.RIGHT, Truth.OTHER, Truth.NOBODY, Truth.NOBODY,
    ]  # fmt: skip


def test_iou_of_boxes():
    assert iou(LEFT, LEFT) == 1
    assert iou(LEFT, MIDDLE) == 0
    assert iou((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert iou((1, 1, 1, 1), (1, 1, 1, 1)) == 0


def test_the_verdict_never_hides_a_wrong_answer():
    right, other = JudgedHit(hit(seq=43), Truth.RIGHT), JudgedHit(hit(seq=43), Truth.OTHER)
    found = "found in camera 2 at 00:04.3 with cosine 0.90"
    assert (
        verdict(result_of(right, other)) == f"{found}: right, according to the truth it is the right person."
    )
    assert verdict(result_of(other, right)) == f"{found}: WRONG, according to the truth it is another person."
    assert result_of(right, other).is_right
    assert not result_of(other, right).is_right
    weak = JudgedHit(replace(right.hit, cos=0.41, is_match=False), Truth.RIGHT)
    assert verdict(result_of(weak)).startswith(
        "nearest in camera 2 at 00:04.3 with cosine 0.41, no match (below 0.70): right"
    )
    assert verdict(result_of()).startswith("not found in camera 2")
    assert not result_of().is_right


# As a program ------------------------------------------------------------------------------------------


def run_apart(out, bundle, duration_s):
    """Run the demo in a fresh interpreter; returns what it printed, its last line being whether torch came."""
    code = f"""
import sys
from pathlib import Path
from psdiff.demo import run_demo
from rich.console import Console
run_demo(Path({str(out)!r}), bundle=Path({str(bundle)!r}), duration_s={duration_s}, console=Console(width=100))
print("torch" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=out.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_the_demo_needs_no_torch(bundle_folder, tmp_path):
    *printed, torch_loaded = run_apart(tmp_path / "out", bundle_folder, 0.8)
    assert torch_loaded == "False"
    assert "according to the truth it is" in printed[-1]
    check_files(tmp_path / "out", num_frames=8)


@pytest.mark.slow
def test_the_demo_runs_with_the_shipped_bundle(shipped, tmp_path):
    *printed, torch_loaded = run_apart(tmp_path / "out", shipped, 1.5)
    assert torch_loaded == "False"
    assert "in camera 2" in printed[-1]
    check_files(tmp_path / "out", num_frames=15)
