import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BLUE, RED, FakeEngine, scene, walk, write_video
from PIL import Image
from psdiff.__main__ import app
from typer.testing import CliRunner


@pytest.fixture
def psdiff(tmp_path, fake_bundle, monkeypatch):
    """Call psdiff run in tmp_path with the fake bundle."""
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments, bundle=fake_bundle):
        return CliRunner().invoke(app, ["run", *map(str, arguments), "--bundle", str(bundle)])

    yield call
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def video(tmp_path):
    return write_video(tmp_path / "gate.mp4", walk(10))


@pytest.fixture
def person(tmp_path):
    Image.fromarray(scene([((20, 20, 40, 70), RED), ((90, 20, 110, 70), BLUE)])).save(tmp_path / "person.png")
    return tmp_path / "person.png"


def fails_with(result, code, message):
    assert result.exit_code == code, result.output
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stdout == ""


def test_a_run_writes_its_files_and_a_table(psdiff, video, tmp_path):
    result = psdiff(video)
    assert result.exit_code == 0, result.output
    assert "gate" in result.stdout
    assert "events.jsonl, summary.json in psdiff-out" in result.stdout
    assert len((tmp_path / "psdiff-out" / "events.jsonl").read_text().splitlines()) == 10


def test_everything_at_once(psdiff, video, person, tmp_path):
    result = psdiff(video, video, "--query", person, "--box", "20,20,40,70", "--steps", 4, "--every", 2,
                    "--out", "found", "--save-video", "--threads", 1, "--seed", 7)  # fmt: skip
    assert result.exit_code == 0, result.output
    written = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert written == ["events.jsonl", "gate-2.mp4", "gate.mp4", "hits.png", "summary.json"]
    assert "query person" in result.stdout


def test_json_goes_to_stdout_alone(psdiff, video):
    result = psdiff(video, "--json")
    summary = json.loads(result.stdout)
    assert summary["steps"] == 2, "the default of the bundle"
    assert summary["sources"][0]["frames_processed"] == 10


def test_several_people_in_the_query_are_a_warning(psdiff, video, person):
    result = psdiff(video, "--query", person)
    assert result.exit_code == 0
    assert "warning: query" in result.stderr
    assert "--box 90,20,110,70" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.mp4"],
            "source must be an existing file or folder, or the URL of a camera, got nowhere.mp4",
        ),
        (["gate.mp4", "nowhere.mp4"], "got nowhere.mp4"),
        (["gate.mp4", "--steps", "0"], "steps must be a whole number from 1 to 4, got 0"),
        (
            ["gate.mp4", "--backend", "magic"],
            "backend must be one of onnxruntime, onnxruntime-int8, openvino, openvino-bf16, tensorrt, got magic",
        ),
        (["gate.mp4", "--box", "1,2,3,4"], "--box must come with --query"),
        (
            ["gate.mp4", "--query", "person.png", "--box", "1,2,3"],
            "--box must be x1,y1,x2,y2 in pixels, got 1,2,3",
        ),
        (["gate.mp4", "--query", "person.png", "--box", "40,20,20,70"], "inside the 160x96 image"),
        (["gate.mp4", "--query", "nobody.png"], "query must be an existing image file, got nobody.png"),
        (["gate.mp4", "--out", "gate.mp4"], "--out must be a folder, got the file gate.mp4"),
        (["gate.mp4", "--out", ".", "--save-video"], "files are not read by this run, got gate.mp4"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(psdiff, video, person, tmp_path, arguments, message):
    before = sorted(tmp_path.iterdir())
    fails_with(psdiff(*arguments), 2, message)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("arguments", [[], ["gate.mp4", "--every", "0"], ["gate.mp4", "--threads", "0"]])
def test_an_argument_out_of_range_is_exit_code_2(psdiff, video, arguments):
    assert psdiff(*arguments).exit_code == 2


def test_an_altered_bundle_is_refused(psdiff, video, fake_bundle, tmp_path):
    (fake_bundle / "backbone.onnx").write_bytes(b"changed")
    fails_with(psdiff(video), 3, "backbone.onnx must have SHA-256")
    fails_with(psdiff(video, bundle=tmp_path / "none"), 3, "bundle must be a folder with manifest.json")


def test_a_folder_that_cannot_be_written_is_exit_code_1(psdiff, video, tmp_path):
    (tmp_path / "file").touch()
    fails_with(psdiff(video, "--out", "file/below"), 1, "file")


def test_a_bug_keeps_its_traceback(psdiff, video, monkeypatch):
    def broken(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(FakeEngine, "backbone", broken)
    assert isinstance(psdiff(video).exception, RuntimeError)


def test_credentials_are_not_printed(psdiff):
    result = psdiff("rtsp://admin:hunter2@127.0.0.1:1/s1?user=admin&password=hunter2")
    fails_with(result, 2, "source must be a camera that answers, got 'connection refused'")
    assert "hunter2" not in result.output


def test_help_teaches():
    result = CliRunner().invoke(app, ["run", "--help"])
    assert result.exit_code == 0
    for text in ("psdiff run entrance.mp4", "--query", "rtsp://", "are replaced", "Ctrl-C"):
        assert text in " ".join(result.output.split())


# As a program ------------------------------------------------------------------------------------------


def start(tmp_path, *arguments):
    # A shell that runs the tests in the background has SIGINT ignored, and a child would inherit that.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command = [sys.executable, "-m", "psdiff", "run", *map(str, arguments)]
    return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_program_runs_a_real_bundle(bundle_folder, video, tmp_path):
    process = start(tmp_path, video, "--bundle", bundle_folder, "--json")
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["sources"][0]["status"] == "ended"


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_program_in_order(bundle_folder, tmp_path, name):
    video = write_video(tmp_path / "long.mp4", walk(60) * 100, options={"preset": "ultrafast"})
    process = start(tmp_path, video, "--bundle", bundle_folder, "--steps", "4", "--save-video", "--json")
    events = tmp_path / "psdiff-out" / "events.jsonl"
    deadline = time.monotonic() + 60
    while not (events.exists() and events.stat().st_size > 5000) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert stderr == "interrupted: what was found so far is kept\n"
    summary = json.loads(stdout)
    assert summary["interrupted"]
    assert 0 < summary["sources"][0]["frames_processed"] < 6000
    assert (tmp_path / "psdiff-out" / "long.mp4").exists()
    assert all(json.loads(line) for line in events.read_text().splitlines())


def test_the_console_script_is_installed(tmp_path):
    script = Path(sys.executable).parent / "psdiff"
    if not script.exists():
        pytest.skip(f"{script} is not installed")
    result = subprocess.run(
        [script, "run", "nowhere.mp4"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.returncode in (2, 3)
    assert result.stderr.startswith("error: ")


def test_running_needs_no_torch(tmp_path):
    parts = "psdiff.__main__, psdiff.runtime.run, psdiff.runtime.console, psdiff.runtime.detector"
    code = f"import sys, {parts}; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.strip() == "False", result.stderr


def test_the_shipped_bundle_runs_without_options(shipped, video, tmp_path):
    process = start(tmp_path, video, "--steps", "1")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors or output
