"""Real sockets: GStreamer's RTSP server as a camera, and cameras that are not there or do not answer."""

import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from contextlib import contextmanager

import pytest
from conftest import walk, write_video
from psdiff.runtime.frames import SourceError
from psdiff.runtime.live_source import LiveSource
from psdiff.runtime.run import run
from psdiff.runtime.soak.clips import write_clip
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.sources import open_source
from psdiff.runtime.video import VideoSource


@pytest.fixture
def camera_file(tmp_path):
    """One and a half seconds at 30 fps."""
    return write_video(tmp_path / "gate.mp4", walk(45), fps=30, options={"crf": "20", "g": "5", "bf": "0"})


def test_a_camera_is_read_to_its_end(serve, camera_file):
    url, _ = serve(camera_file)
    with open_source(f"{url}/gate", read_timeout_s=3) as source:
        assert isinstance(source, LiveSource)
        frames = list(source)
    assert source.camera == "127.0.0.1_gate"
    assert len(frames) + source.frames_dropped == source.frames_decoded == 45
    assert {frame.time_source for frame in frames} == {"arrival"}
    assert frames[-1].pts_s == pytest.approx(frames[-1].seq / 30, abs=0.05), "one frame off at most"
    assert frames[0].image.shape == (96, 160, 3)


def test_a_camera_that_is_closed_leaves_nothing_behind(serve, camera_file):
    """Not even until Python looks for cycles: a connection holds megabytes of pictures, and cameras come and go."""
    url, _ = serve(camera_file)
    source = VideoSource(parse_address(f"{url}/{camera_file.stem}"), "gate", read_timeout_s=5)
    for _, _decoded in zip(range(3), source.decoded(), strict=False):
        pass
    gone = weakref.ref(source)
    gc.collect()
    gc.disable()
    try:
        source.close()
        del source, _decoded
        assert gone() is None
    finally:
        gc.enable()


def test_a_slow_camera_is_there_soon(serve, tmp_path):
    """FFmpeg would watch five seconds of five frames a second before it lets go of the first."""
    clip = write_clip(tmp_path / "gate.mp4", seconds=8, fps=5, sizes=[(160, 96)])
    url, _ = serve(clip, options=["--in-band"])
    start = time.monotonic()
    with open_source(f"{url}/gate", read_timeout_s=3) as source:
        next(iter(source))
        assert time.monotonic() - start < 3


def test_a_slow_reader_gets_new_frames_not_old_ones(serve, camera_file):
    url, _ = serve(camera_file)
    with open_source(f"{url}/gate", read_timeout_s=3) as source:
        seqs = []
        for frame in source:
            seqs.append(frame.seq)
            time.sleep(0.25)
    assert source.frames_dropped > 15
    assert max(seqs[1:-1]) - seqs[1] > 5


def test_two_cameras_and_a_file_run_together(serve, camera_file, tmp_path, detector, manifest):
    other = write_video(tmp_path / "lobby.mp4", walk(45), fps=30, options={"g": "5", "bf": "0"})
    url, _ = serve(camera_file, other)
    uris = [f"{url}/gate", f"{url}/lobby", str(camera_file)]
    sources = [open_source(uri, read_timeout_s=3) for uri in uris]
    summary = run(sources, detector, manifest, out=tmp_path / "out", steps=1)
    assert [source.status for source in summary.sources] == ["ended"] * 3
    for source in summary.sources:
        assert source.frames_decoded == 45
        assert source.frames_processed + source.frames_dropped == 45
    assert summary.sources[2].frames_dropped == 0


def test_a_lost_camera_fails_and_the_others_go_on(serve, camera_file, tmp_path, detector, manifest):
    url, process = serve(
        write_video(tmp_path / "long.mp4", walk(45) * 8, fps=30, options={"g": "5", "bf": "0"})
    )
    sources = [open_source(f"{url}/long", read_timeout_s=2), open_source(str(camera_file))]
    threading.Timer(1.0, process.kill).start()
    start = time.monotonic()
    summary = run(sources, detector, manifest, out=tmp_path / "out", steps=1)
    assert time.monotonic() - start < 8
    live, file = summary.sources
    assert 0 < live.frames_decoded < 360
    assert live.status in ("failed", "ended")
    assert (file.status, file.frames_processed) == ("ended", 45)


def test_a_camera_that_falls_silent_fails_in_time(serve, camera_file):
    url, process = serve(camera_file)
    with open_source(f"{url}/gate", read_timeout_s=1) as source:
        frames = iter(source)
        next(frames)
        process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(SourceError, match="source must stay readable to its end, got no answer in time"):
            list(frames)
        # Once the read timeout, not twice, although FFmpeg gives its parser's last picture first.
        assert 0.5 < time.monotonic() - start < 1.9


def test_a_login_is_used_and_never_shown(serve, camera_file):
    url, _ = serve(camera_file, options=["--login", "admin:hunter2"])
    with open_source(url.replace("//", "//admin:hunter2@") + "/gate", read_timeout_s=3) as source:
        assert next(iter(source)).image.size > 0
        assert "hunter2" not in source.camera
    with pytest.raises(SourceError, match="unauthorized") as caught:
        open_source(url.replace("//", "//admin:hunter3@") + "/gate")
    assert "hunter3" not in str(caught.value)


def test_a_wrong_path_is_an_error(serve, camera_file):
    url, _ = serve(camera_file)
    with pytest.raises(SourceError, match=r"source must be a camera that answers, got .*not found"):
        open_source(f"{url}/nowhere")


# Cameras that are not there -----------------------------------------------------------------------------


@contextmanager
def silent_server():
    """Accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_closed_port_is_refused_at_once():
    start = time.monotonic()
    with pytest.raises(SourceError, match=r"'connection refused' from rtsp://127\.0\.0\.1:\d+/s1$") as caught:
        open_source(f"rtsp://admin:hunter2@127.0.0.1:{free_port()}/s1")
    assert time.monotonic() - start < 2
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("open_s", "read_s"), [(0.5, 30), (30, 0.5)], ids=["open", "read"])
def test_a_server_that_never_answers_ends_in_time(open_s, read_s):
    start = time.monotonic()
    with silent_server() as port, pytest.raises(SourceError, match="got no answer in time from"):
        open_source(f"rtsp://127.0.0.1:{port}/s1", open_timeout_s=open_s, read_timeout_s=read_s)
    assert 0.3 < time.monotonic() - start < 5


def test_the_program_says_so_in_one_line(bundle_folder, tmp_path):
    url = f"rtsp://admin:hunter2@127.0.0.1:{free_port()}/s1"
    command = [sys.executable, "-m", "psdiff", "run", url, "--bundle", bundle_folder]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.startswith("error: source must be a camera that answers")
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.stderr + result.stdout


def test_the_program_reads_a_camera(serve, camera_file, bundle_folder, tmp_path):
    url, _ = serve(camera_file, options=["--login", "admin:hunter2"])
    url = url.replace("//", "//admin:hunter2@") + "/gate"
    command = [
        sys.executable,
        "-m",
        "psdiff",
        "run",
        url,
        "--bundle",
        bundle_folder,
        "--json",
        "--save-video",
    ]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["sources"][0]["frames_decoded"] == 45
    written = b"".join(path.read_bytes() for path in (tmp_path / "psdiff-out").iterdir())
    assert b"hunter2" not in written + result.stdout.encode() + result.stderr.encode()
