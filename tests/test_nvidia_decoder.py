"""The door to PyNvVideoCodec: the real library, on a driver that is none (nvcuvid_stand_in.c).

What a GPU decodes is not shown here; that packets, times and pictures pass through the library as they should is.
"""

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import av
import pytest
from conftest import walk, write_video

HERE = Path(__file__).parent
DRIVER = ("libcuda", "libnvcuvid", "libnvidia-encode")

pytestmark = [
    pytest.mark.skipif(
        not find_spec("PyNvVideoCodec"), reason="PyNvVideoCodec is not installed (x86_64 Linux)"
    ),
    pytest.mark.skipif(
        not shutil.which("gcc"), reason="gcc is not there; it builds the stand-in of the driver"
    ),
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A folder with the three libraries of NVIDIA's driver that PyNvVideoCodec loads."""
    folder = tmp_path_factory.mktemp("driver")
    for name in DRIVER:
        flags = ["-O1", "-shared", "-fPIC", f"-Wl,-soname,{name}.so.1", "-o", folder / f"{name}.so.1"]
        subprocess.run(
            ["gcc", "-Wall", "-Wextra", "-Werror", *flags, HERE / "nvcuvid_stand_in.c"], check=True
        )
    return folder


@pytest.fixture
def decode(driver, tmp_path):
    def run(mode, video, libraries=DRIVER, **environment):
        folder = tmp_path / "libraries"
        folder.mkdir(exist_ok=True)
        for name in libraries:
            shutil.copy(driver / f"{name}.so.1", folder)
        done = subprocess.run(
            [sys.executable, HERE / "nvidia_on_stand_in.py", mode, video],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}

    return run


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {
        b_frames: write_video(folder / f"{b_frames}.mp4", walk(20), options={"bf": str(b_frames), "g": "10"})
        for b_frames in (0, 2)
    }


def times_of(video):
    with av.open(str(video)) as container:
        return [frame.pts for frame in container.decode(video=0)]


def test_a_gpu_that_decodes_is_found(decode, videos):
    is_usable, reason = decode("door", videos[0])["found"]
    assert is_usable
    assert reason == "the GPU has 3 decoders of H.264"


def test_a_picture_comes_with_its_packet_and_is_the_one_that_was_sent(decode, videos):
    *packets, (_, rest) = decode("door", videos[0])["decoded"]
    assert packets == [[pts, [[pts, i % 10 == 0, True]]] for i, (pts, _) in enumerate(packets)]
    assert [pts for pts, _ in packets] == times_of(videos[0])
    assert rest == []


def test_pictures_with_b_frames_come_in_the_order_of_their_times(decode, videos):
    packets = decode("door", videos[2])["decoded"]
    frames = [frame for _, frames in packets for frame in frames]
    assert [frame[0] for frame in frames] == times_of(videos[2])
    assert all(is_right for _, _, is_right in frames)
    assert packets[-1][1], "the end must hand out what is held back"


def test_pictures_that_are_not_the_cpus_are_not_believed(decode, videos):
    report = decode("stream", videos[0])
    assert report["decoded"] == {"first": "pynvvideocodec", "last": "pyav-cpu", "times": times_of(videos[0])}
    assert "its first picture is" in report["log"]


def test_a_session_that_fails_is_replaced(decode, videos):
    report = decode("stream", videos[0], FAIL_AT="1")
    assert report["decoded"]["last"] == "pyav-cpu"
    assert report["decoded"]["times"] == times_of(videos[0])
    assert "decoder pynvvideocodec failed" in report["log"]


def test_more_than_eight_bits_are_refused(decode, videos):
    assert "must be NV12, got" in decode("door", videos[0], BITS="10")["error"]


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ("libcuda", "libcuda.so.1 is not there; it comes with the driver"),
        ("libnvcuvid", "libnvcuvid.so.1 is not there; it comes with the driver"),
        ("libnvidia-encode", "libnvidia-encode.so.1"),
    ],
)
def test_a_driver_that_lacks_a_library_is_told(decode, videos, missing, reason):
    report = decode("stream", videos[0], libraries=[name for name in DRIVER if name != missing])
    assert report["found"][0] is False
    assert reason in report["found"][1]
    assert "\n" not in report["found"][1]
    assert report["decoded"]["times"] == times_of(videos[0])


def test_without_the_library_the_way_to_it_is_told():
    script = (
        "import sys; sys.modules['PyNvVideoCodec'] = None\n"
        "from psdiff.runtime.nvidia_decoder import find_nvidia\n"
        "print(find_nvidia())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "pip install 'psdiff[nvdec]'" in done.stdout, done.stderr
