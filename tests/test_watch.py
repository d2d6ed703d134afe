"""Cameras from Python: people come out of a real RTSP stream in the caller's thread, and nothing stays behind."""

import threading

import pytest
from conftest import walk, write_video
from psdiff.runtime.elastic_steps import StepRange
from psdiff.runtime.frames import SourceError
from psdiff.runtime.watch import watch
from triton_server import free_ports


def test_people_of_a_camera_as_they_are_seen(serve, detector, tmp_path):
    options = {"crf": "20", "g": "5", "bf": "0"}
    gate = write_video(tmp_path / "gate.mp4", walk(300, start=-500), fps=15, options=options)
    url, _ = serve(gate)
    away = f"rtsp://127.0.0.1:{free_ports(1)[0]}/x"
    before = set(threading.enumerate())
    with watch(
        {"gate": f"{url}/gate", "away": away}, detector, steps=StepRange(1, 2), latency_s=5.0, sample_fps=5
    ) as results:
        seen = [next(results) for _ in range(6)]
    assert {result.frame.camera for result in seen} == {"gate"}
    seqs = [result.frame.seq for result in seen]
    assert seqs == sorted(set(seqs))
    assert {result.steps for result in seen} <= {1, 2}
    times = [result.frame.time.utc_s for result in seen]
    assert times == sorted(times)
    assert set(threading.enumerate()) <= before, "a thread stayed"


def test_a_url_that_is_none_is_refused(detector):
    with pytest.raises(SourceError), watch({"gate": "rtsp://[bad"}, detector):
        pass
