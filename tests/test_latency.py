"""psdiff bench: stages that add up, frames that do not wait, and K -> ms in the manifest."""

import json

import numpy as np
import pytest
from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from psdiff.runtime.latency import closed_loop, open_loop, percentiles
from typer.testing import CliRunner


class Clock:
    """A clock that moves by what is done."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def under_load(service_s, cameras, fps, seconds):
    clock = Clock()
    return open_loop(
        lambda: clock.sleep(service_s),
        steps=2,
        cameras=cameras,
        fps=fps,
        seconds=seconds,
        clock=clock,
        sleep=clock.sleep,
    )


def test_a_free_machine_takes_each_frame_at_once():
    row = under_load(0.01, cameras=4, fps=5, seconds=10)
    assert row.frames == 200
    assert (row.latency.p50, row.latency.p99) == pytest.approx((10, 10))
    assert row.frames_per_s == pytest.approx(200 / (9.95 + 0.01))
    assert row.waiting == 0


def test_an_overload_is_seen_as_latency_that_grows():
    """20 frames a second, 10 served: the last of 200 waits for 100 others."""
    row = under_load(0.1, cameras=4, fps=5, seconds=10)
    assert row.frames_per_s == pytest.approx(10)
    assert row.latency.p50 == pytest.approx(5000, rel=0.05)
    assert row.latency.p99 == pytest.approx(10_000, rel=0.05)
    assert row.waiting == pytest.approx(100, abs=2)


def test_a_short_run_holds_one_frame():
    assert under_load(0.01, cameras=1, fps=1, seconds=0.1).frames == 1


def test_percentiles_are_in_milliseconds():
    row = percentiles(np.linspace(0, 1, 101))
    assert (row.p50, row.p95, row.p99) == pytest.approx((500, 950, 990))


def test_the_stages_add_up_to_the_whole(detector, engine):
    frame = np.zeros((96, 160, 3), np.uint8)
    row = closed_loop(detector, frame, steps=2, batch=3, seconds=0.2)
    assert row.calls > 1
    parts = row.backbone.p50 + row.denoising.p50 + row.host.p50
    assert parts == pytest.approx(row.total.p50, rel=0.3)
    assert set(engine.batches) == {3}
    assert row.peak_memory_mb > 10


def psdiff(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)])


def test_the_command_measures_and_records(bundle_folder):
    result = psdiff(
        bundle_folder, "--steps", "1,2", "--seconds", 0.1, "--frame", "160x96", "--record", "--json"
    )
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["steps"] for row in rows] == [1, 2]
    latencies = load_manifest(bundle_folder).latencies
    assert [(row.steps, row.batch) for row in latencies] == [(1, 1), (2, 1)]
    assert latencies[0].p50_ms == pytest.approx(rows[0]["total"]["p50"], abs=0.01)
    assert latencies[0].backend.startswith("onnxruntime 1.")
    psdiff(bundle_folder, "--steps", "2", "--seconds", 0.1, "--frame", "160x96", "--record")
    assert [row.steps for row in load_manifest(bundle_folder).latencies] == [1, 2], (
        "the newer takes the place"
    )


def test_the_command_shows_a_table(bundle_folder):
    closed = psdiff(bundle_folder, "--steps", "1", "--seconds", 0.1, "--frame", "160x96", "--batch", 2)
    assert closed.exit_code == 0, closed.output
    assert "backbone" in closed.stdout
    loaded = psdiff(bundle_folder, "--steps", "1", "--seconds", 0.3, "--frame", "160x96", "--cameras", "2x10")
    assert loaded.exit_code == 0, loaded.output
    assert "waiting" in loaded.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--frame", "big"], "frame must be WxH, 1920x1080 for example, got big"),
        (["--cameras", "16"], "cameras must be NxFPS, 16x5 for example, got 16"),
        (["--steps", "3"], "steps must be a whole number from 1 to 4, got 3"),
        (["--backend", "magic"], "backend must be one of onnxruntime"),
        (["--record", "--cameras", "2x5"], "--record must stand without --cameras"),
    ],
)
def test_a_mistake_is_told(bundle_folder, arguments, message):
    result = psdiff(bundle_folder, *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
