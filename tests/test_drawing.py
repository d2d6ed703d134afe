import av
import numpy as np
import pytest
from conftest import BLUE, GREEN, RED, scene, walk
from PIL import Image
from psdiff.models.detections import Detections
from psdiff.runtime.drawing import (
    MATCH_COLOUR,
    PERSON_COLOUR,
    VideoWriter,
    contact_sheet,
    draw_detections,
    moment_text,
    save_png,
)
from psdiff.runtime.query import Hit, Query


def people(*boxes):
    count = len(boxes)
    embeddings = np.tile(np.eye(3, dtype=np.float32)[0], (count, 1))
    scores = np.linspace(0.9, 0.5, count).astype(np.float32)
    return Detections(np.array(boxes, np.float32).reshape(count, 4), scores, embeddings)


def count_of(image, colour):
    return int((np.abs(image.astype(int) - colour).max(axis=2) < 12).sum())


@pytest.mark.parametrize(("width", "height"), [(640, 384), (1920, 1080), (64, 48)])
def test_boxes_are_drawn_on_a_copy(width, height):
    image = scene(width=width, height=height)
    drawn = draw_detections(image, people((width // 4, height // 4, width // 2, height - 2)))
    assert count_of(drawn, PERSON_COLOUR) > width // 4
    assert count_of(drawn, MATCH_COLOUR) == 0
    assert image.max() == 30


def test_a_match_has_its_own_colour():
    found = people((100, 100, 200, 300), (300, 100, 400, 300))
    drawn = draw_detections(scene(width=640, height=384), found, [0.9, 0.1], match_threshold=0.7)
    assert count_of(drawn[:, :250], MATCH_COLOUR) > 200
    assert count_of(drawn[:, 250:], MATCH_COLOUR) == 0
    assert count_of(drawn[:, 250:], PERSON_COLOUR) > 200


def test_labels_at_the_edges_stay_in_the_frame():
    image = scene(width=640, height=384)
    drawn = draw_detections(image, people((0, 0, 30, 40), (600, 2, 640, 384)), [0.5, 0.5])
    assert drawn.shape == image.shape
    assert count_of(drawn[:20, 540:], PERSON_COLOUR) > 400


def test_nobody_is_drawn_in_an_empty_frame():
    assert (draw_detections(scene(), people()) == scene()).all()


# Video --------------------------------------------------------------------------------------------------


def read(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [
            (float(frame.pts * stream.time_base), frame.to_ndarray(format="rgb24"))
            for frame in container.decode(stream)
        ]
        return frames, stream.average_rate, stream.codec_context.pix_fmt


def test_a_video_keeps_frames_times_and_rate(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    for i, image in enumerate(walk(12)):
        writer.write(image, i / 10)
    assert not (tmp_path / "a.mp4").exists(), "no name before it is whole"
    writer.close()
    frames, rate, pixels = read(tmp_path / "a.mp4")
    assert [time for time, _ in frames] == pytest.approx([i / 10 for i in range(12)], abs=1e-3)
    assert float(rate) == pytest.approx(10, rel=0.1)
    assert pixels == "yuv420p"
    assert np.abs(frames[0][1][40, 18].astype(int) - RED).max() < 40
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_video_without_times_runs_at_its_rate(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 12.5)
    for image in walk(5):
        writer.write(image, None)
    writer.close()
    times = [time for time, _ in read(tmp_path / "a.mp4")[0]]
    assert np.diff(times) == pytest.approx([0.08] * 4, abs=1e-3)


def test_times_that_repeat_or_go_back_are_mended(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", None)
    for time in (0.0, 0.0, 0.2, 0.1, 0.4):
        writer.write(scene(), time)
    writer.close()
    times = [time for time, _ in read(tmp_path / "a.mp4")[0]]
    assert len(times) == 5
    assert (np.diff(times) > 0).all()


def test_odd_sizes_are_padded_and_a_change_of_size_is_fitted(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    for width, height in [(161, 97), (161, 97), (320, 200)]:
        writer.write(scene(width=width, height=height), None)
    writer.close()
    assert {image.shape for _, image in read(tmp_path / "a.mp4")[0]} == {(98, 162, 3)}


def test_a_discarded_video_leaves_nothing(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.write(scene(), None)
    writer.discard()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_video_without_frames_is_no_file(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    writer.close()
    writer.discard()
    assert list(tmp_path.iterdir()) == []


# Contact sheet ------------------------------------------------------------------------------------------


def hits(count):
    crop = scene([((4, 4, 20, 40), GREEN)], 30, 60)
    return [
        Hit("a-camera-with-a-very-long-name", i, 61.0 + i, (0, 0, 9, 9), 0.9, 0.9 - 0.1 * i, i < 2, crop)
        for i in range(count)
    ]


QUERY = Query("person", np.eye(3, dtype=np.float32)[0], scene([((20, 10, 50, 90), BLUE)]), (20, 10, 50, 90))


@pytest.mark.parametrize("count", [0, 1, 5, 6, 10])
def test_a_contact_sheet_shows_the_query_and_every_hit(count):
    sheet = np.asarray(contact_sheet(QUERY, hits(count)))
    assert count_of(sheet, BLUE) > 5000
    green = count_of(sheet, GREEN)
    assert (green > 2000 * count) if count else green == 0


def test_negative_cosines_and_thin_crops_have_a_card():
    hit = Hit("a", 0, None, (0, 0, 1, 1), 0.5, -1.0, False, scene(width=1, height=1))
    assert contact_sheet(QUERY, [hit]).width > 400


@pytest.mark.parametrize(
    ("moment_s", "text"),
    [(0.0, "00:00.0"), (4.84, "00:04.8"), (59.96, "01:00.0"), (3725.5, "62:05.5"), (None, "frame 7")],
)
def test_a_moment_is_minutes_and_seconds(moment_s, text):
    hit = Hit("a", 7, moment_s, (0, 0, 1, 1), 0.5, 0.5, False, scene())
    assert moment_text(hit) == text


def test_a_picture_is_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    save_png(Image.new("RGB", (4, 4)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def broken(self, file, *_):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
