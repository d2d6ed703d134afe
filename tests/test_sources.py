import logging
from datetime import UTC, datetime

import av
import numpy as np
import pytest
from conftest import RED, scene, walk, write_video
from PIL import Image
from psdiff.runtime import frames as frames_module
from psdiff.runtime.frames import SourceError
from psdiff.runtime.source_address import parse_address
from psdiff.runtime.sources import camera_name, camera_names, open_source


def read(uri, **options):
    with open_source(str(uri), **options) as source:
        return list(source), source


# What decodes -------------------------------------------------------------------------------------------


def test_an_mp4_gives_every_frame_with_its_time(tmp_path):
    frames, source = read(write_video(tmp_path / "gate.mp4", walk(25), fps=10))
    assert [frame.seq for frame in frames] == list(range(25))
    assert [frame.pts_s for frame in frames] == pytest.approx([i / 10 for i in range(25)])
    assert {frame.camera for frame in frames} == {"gate"}
    assert (source.num_frames_hint, source.fps_hint, source.corrupt_packets) == (25, 10, 0)
    assert frames[3].image.dtype == np.uint8
    assert np.abs(frames[3].image[40, 24].astype(int) - RED).max() < 30, "RGB, not BGR"


def test_delayed_frames_come_out_at_the_end(tmp_path):
    frames = walk(31)
    video = write_video(tmp_path / "b.mp4", frames, options={"bf": "4", "g": "30", "crf": "20"})
    got, _ = read(video)
    assert len(got) == 31
    # The last frame shows the last position of the walk: order survived the B-frames.
    assert got[-1].image[40, 78].max() > 170
    assert got[-1].pts_s == pytest.approx(3.0)


def test_raw_h264_without_timestamps_goes_to_the_last_frame(tmp_path):
    frames, source = read(write_video(tmp_path / "raw.264", walk(20)))
    assert len(frames) == 20
    assert {frame.pts_s for frame in frames} == {None}
    assert source.num_frames_hint is None


def test_hevc_goes_to_the_last_frame(tmp_path):
    quiet = {"x265-params": "log-level=none"}
    video = write_video(tmp_path / "h.mp4", walk(20), codec="libx265", options=quiet)
    assert len(read(video)[0]) == 20


def test_every_skips_frames_but_seq_counts_them(tmp_path):
    frames, source = read(write_video(tmp_path / "a.mp4", walk(10)), every=3)
    assert [frame.seq for frame in frames] == [0, 3, 6, 9]
    assert source.frames_decoded == 10


def test_a_creation_time_dates_the_frames(tmp_path):
    created = {"creation_time": "2026-03-01T10:00:00.000000Z"}
    frames, _ = read(write_video(tmp_path / "a.mp4", walk(5), metadata=created))
    assert {frame.time_source for frame in frames} == {"file"}
    assert frames[4].time == datetime(2026, 3, 1, 10, 0, 0, 400_000, UTC)


def test_without_a_creation_time_the_clock_dates_the_frames(tmp_path):
    frames, _ = read(write_video(tmp_path / "a.mp4", walk(2)))
    assert frames[0].time_source == "arrival"
    assert abs((datetime.now(UTC) - frames[0].time).total_seconds()) < 30


def test_the_zero_of_a_clock_is_no_creation_time(tmp_path):
    unset = {"creation_time": "1970-01-01T00:00:00Z"}
    frames, _ = read(write_video(tmp_path / "a.mp4", walk(2), metadata=unset))
    assert frames[0].time_source == "arrival"


def test_a_phone_video_is_turned_upright(tmp_path):
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        if not hasattr(stream, "set_display_rotation"):
            pytest.skip("this PyAV cannot write a rotation")
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        # Upright, the mark is at the top left of a 96x160 picture; the file holds it turned clockwise.
        upright = scene([((0, 0, 40, 40), RED)], 96, 160)
        stream.set_display_rotation(90)
        stored = np.ascontiguousarray(np.rot90(upright, -1))
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(stored, format="rgb24")))
        container.mux(stream.encode(None))
    frames, _ = read(path)
    assert frames[0].image.shape == (160, 96, 3)
    assert frames[0].image[10, 10].max() > 170


def test_an_animated_gif_is_a_video(tmp_path):
    pictures = [Image.fromarray(frame) for frame in walk(6)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100)
    assert len(read(tmp_path / "a.gif")[0]) == 6


def test_a_folder_is_read_in_natural_order(tmp_path):
    for number, x in [(1, 10), (2, 40), (10, 80)]:
        Image.fromarray(scene([((x, 20, x + 10, 60), RED)])).save(tmp_path / f"img{number}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    frames, source = read(tmp_path)
    assert [int(np.argmax(frame.image[40, :, 0])) for frame in frames] == [10, 40, 80]
    assert source.num_frames_hint == 3
    assert frames[0].camera == tmp_path.name.strip("._-")


def test_a_single_image_is_one_upright_frame(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    Image.fromarray(scene()).save(tmp_path / "one.jpg", exif=exif)
    frames, _ = read(tmp_path / "one.jpg")
    assert [frame.image.shape for frame in frames] == [(160, 96, 3)]


def test_a_name_with_a_colon_is_a_file(tmp_path, monkeypatch):
    write_video(tmp_path / "cam.mp4", walk(3)).rename(tmp_path / "cam:1.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(read("cam:1.mp4")[0]) == 3


# What does not ------------------------------------------------------------------------------------------


def test_a_missing_file_is_named():
    with pytest.raises(SourceError, match=r"source must be an existing file.*nowhere\.mp4"):
        open_source("nowhere.mp4")


def test_text_is_not_a_video(tmp_path):
    (tmp_path / "notes.mp4").write_text("these are notes\n" * 100)
    (tmp_path / "notes.txt").write_text("these are notes\n" * 100)
    for name in ("notes.mp4", "notes.txt"):
        with pytest.raises(SourceError, match=rf"source must be a video, got .*{name}"):
            open_source(str(tmp_path / name))


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(SourceError, match="got an empty file"):
        open_source(str(tmp_path / "a.mp4"))


def test_sound_alone_is_refused(tmp_path):
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(SourceError, match="source must hold video"):
        open_source(str(tmp_path / "a.wav"))


def test_a_truncated_mp4_without_index_is_refused(tmp_path):
    video = write_video(tmp_path / "a.mp4", walk(30))
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(SourceError, match="source must be a video, got 'invalid data"):
        open_source(str(video))


def test_a_truncated_mp4_with_its_index_in_front_is_read_as_far_as_it_goes(tmp_path):
    noise = np.random.default_rng(1)
    frames = [noise.integers(0, 255, (96, 160, 3), np.uint8) for _ in range(30)]
    video = write_video(tmp_path / "a.mp4", frames, container_options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    got, source = read(video)
    assert 5 < len(got) < 30
    assert source.num_frames_hint == 30


def test_a_damaged_middle_is_counted_and_passed(tmp_path):
    noise = np.random.default_rng(1)
    frames = [noise.integers(0, 255, (96, 160, 3), np.uint8) for _ in range(40)]
    video = write_video(tmp_path / "a.mp4", frames)
    content = bytearray(video.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 20_000] = noise.integers(0, 255, 20_000, np.uint8).tobytes()
    video.write_bytes(content)
    got, source = read(video)
    assert source.corrupt_packets > 0
    assert 20 < len(got) <= 40
    assert got[-1].pts_s == pytest.approx(3.9), "the frames after the damage are there"


def test_a_video_of_damage_only_is_refused(tmp_path):
    video = write_video(tmp_path / "a.mp4", walk(10), container_options={"movflags": "faststart"})
    content = bytearray(video.read_bytes())
    start = content.index(b"mdat") + 4
    content[start:] = bytes(len(content) - start)
    video.write_bytes(content)
    with pytest.raises(SourceError, match=r"source must hold a frame that can be decoded, got \d+ corrupt"):
        open_source(str(video))


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(SourceError, match="must be a folder with images"):
        open_source(str(tmp_path))


def test_a_damaged_image_is_skipped_counted_and_named(tmp_path, caplog):
    for i in range(3):
        Image.fromarray(scene()).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:40])
    with caplog.at_level(logging.WARNING, "psdiff"):
        frames, source = read(tmp_path)
    assert [frame.seq for frame in frames] == [0, 1]
    assert source.corrupt_packets == 1
    assert "1.png" in caplog.text


def test_a_folder_of_damaged_images_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nonsense")
    with pytest.raises(SourceError, match="source must hold an image that can be read, got 1 damaged"):
        open_source(str(tmp_path))


def test_a_huge_image_is_refused_unread(tmp_path, monkeypatch, caplog):
    Image.fromarray(scene()).save(tmp_path / "a.png")
    monkeypatch.setattr(frames_module, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SourceError):
        open_source(str(tmp_path / "a.png"))
    assert "at most" in caplog.text


def test_every_below_one_is_a_mistake_of_the_caller():
    with pytest.raises(ValueError, match="every must be a whole number >= 1, got 0"):
        open_source("a.mp4", every=0)


# Names --------------------------------------------------------------------------------------------------


def test_cameras_are_named_by_file_folder_or_host(tmp_path):
    (tmp_path / "photos").mkdir()
    assert camera_name("videos/front gate.mp4") == "front_gate"
    assert camera_name(str(tmp_path / "photos")) == "photos"
    assert camera_name("rtsp://u:p@10.0.0.11:8554/s1/main") == "10.0.0.11_s1_main"


def test_names_are_made_unique():
    assert camera_names(["a/x.mp4", "b/x.mp4", "x-2.mp4", "c/x.mp4"]) == ["x", "x-2", "x-2-2", "x-3"]


@pytest.mark.parametrize(
    "url",
    [
        "rtsp://admin:hunter2@cam:554/s1",
        "rtsp://cam/live?user=admin&password=hunter2&channel=1",
        "rtsp://cam/user=admin&password=hunter2&channel=1.sdp",
        "rtsp://admin:hunter2@[::1]:554/s1",
    ],
)
def test_credentials_are_in_no_name(url):
    for shown in (camera_name(url), parse_address(url).shown):
        assert "hunter2" not in shown
        assert "admin" not in shown


@pytest.mark.parametrize(
    "url", ["ftp://u:hunter2@h/v.mp4", "rtsp://u:hunter2@h:port/", "rtsp://u:hunter2@/x"]
)
def test_other_urls_are_refused_without_showing_them(url):
    with pytest.raises(SourceError, match="got a URL") as caught:
        open_source(url)
    assert "hunter2" not in str(caught.value)


# Real footage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("video-intel/people-detection.264", 596),
        ("video-intel/one-by-one-person-detection.mp4", 1394),
        ("video-intel/store-aisle-detection.gif", 67),
        ("multiviewx-demo/Image_subsets/C1", 10),
        pytest.param("video-nvidia-retail/Retail02_short.mp4", 603, marks=pytest.mark.slow),
    ],
)
def test_real_footage_is_read_to_its_last_frame(footage, name, count):
    # every: the conversion to RGB is not what is tested here.
    _, source = read(footage(name), every=50)
    assert source.frames_decoded == count
    assert source.corrupt_packets == 0
