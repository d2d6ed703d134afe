import io
import json
import re
import signal

import av
import numpy as np
import pytest
from conftest import BLUE, GREEN, RED, scene, walk, write_video
from PIL import Image
from psdiff.models.preprocess import seeded_noise
from psdiff.runtime import run as run_module
from psdiff.runtime.console import result_table
from psdiff.runtime.detector import open_detector
from psdiff.runtime.frames import SourceError
from psdiff.runtime.query import Query, load_query
from psdiff.runtime.run import frame_seed, output_paths, run
from psdiff.runtime.sources import open_source
from rich.console import Console


@pytest.fixture
def pipeline(detector, manifest, tmp_path):
    """Run over named videos, given as {camera: frames}, into tmp_path/out."""

    def start(videos, **options):
        every = options.pop("every", 1)
        uris = [write_video(tmp_path / f"{name}.mp4", frames) for name, frames in videos.items()]
        sources = [open_source(str(uri), every=every) for uri in uris]
        options = {"steps": 2, **options}
        return run(sources, detector, manifest, out=tmp_path / "out", **options)

    return start


@pytest.fixture
def red_query(detector, tmp_path):
    Image.fromarray(scene([((20, 20, 40, 70), RED)])).save(tmp_path / "red.png")
    return load_query(detector, tmp_path / "red.png", steps=2)


def events_of(out):
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_every_person_of_every_frame_is_an_event(pipeline, tmp_path):
    summary = pipeline({"gate": walk(12)})
    events = events_of(tmp_path / "out")
    assert [event["data"]["frame_seq"] for event in events] == list(range(12))
    assert events[5]["data"]["det"]["box"] == pytest.approx([20, 20, 36, 60], abs=1.5)
    assert events[5]["data"]["pts_s"] == 0.5
    assert len({event["id"] for event in events}) == 12
    assert summary.model_dump(mode="json") == json.loads((tmp_path / "out" / "summary.json").read_text())
    [source] = summary.sources
    assert (source.status, source.frames_decoded, source.frames_processed, source.detections) == (
        "ended",
        12,
        12,
        12,
    )
    assert summary.files == ["events.jsonl", "summary.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == summary.files


def test_sources_take_turns_and_share_batches(pipeline, engine, tmp_path):
    summary = pipeline({"a": walk(5), "b": walk(3, BLUE), "c": walk(2, GREEN)})
    assert engine.batches == [3, 3, 2, 1, 1]
    cameras = [event["data"]["camera"] for event in events_of(tmp_path / "out")]
    assert cameras == list("abcabcabaa")
    assert [event["data"]["compute"]["batch"] for event in events_of(tmp_path / "out")][-1] == 1
    assert [source.frames_processed for source in summary.sources] == [5, 3, 2]


def test_a_frames_noise_depends_on_camera_and_frame_alone(pipeline, detector, monkeypatch):
    used = []
    detect = detector.detect
    monkeypatch.setattr(
        detector, "detect", lambda frames, steps, seeds=(): used.extend(seeds) or detect(frames, steps, seeds)
    )
    pipeline({"a": walk(3), "b": walk(2)})
    together = {"a": [used[0], used[2], used[4]], "b": [used[1], used[3]]}
    used.clear()
    pipeline({"b": walk(2)})
    assert used == together["b"]
    assert together["a"] == [frame_seed("a", i) for i in range(3)]
    assert len({*together["a"], *together["b"]}) == 5
    assert frame_seed("a", 0) == 0xB52496D0, "stable for ever: CRC-32 of a:0"
    assert frame_seed("a", 0, 1) != frame_seed("a", 0)
    seeded_noise(frame_seed("a", 0), 2, 2)


def test_a_query_gives_matches_hits_and_a_sheet(pipeline, red_query, tmp_path):
    summary = pipeline({"a": walk(30), "b": walk(30, BLUE)}, query=red_query)
    events = events_of(tmp_path / "out")
    by_camera = {
        camera: [e["data"]["match"] for e in events if e["data"]["camera"] == camera] for camera in "ab"
    }
    assert all(match["is_match"] and match["cos"] > 0.95 for match in by_camera["a"])
    assert not any(match["is_match"] for match in by_camera["b"])
    a, b = summary.sources
    assert (a.matches, b.matches) == (30, 0)
    assert a.best_hit.cos > 0.95 > b.best_hit.cos
    with Image.open(tmp_path / "out" / "hits.png") as sheet:
        assert sheet.width > 400


def test_a_query_without_hits_still_has_its_sheet(pipeline, red_query, tmp_path):
    summary = pipeline({"a": [scene()] * 3}, query=red_query)
    assert summary.sources[0].best_hit is None
    assert (tmp_path / "out" / "hits.png").exists()
    assert (tmp_path / "out" / "events.jsonl").read_text() == ""


def test_every_processes_fewer_frames_and_counts_all(pipeline, engine, tmp_path):
    [source] = pipeline({"a": walk(10)}, every=4, save_video=True).sources
    assert (source.frames_decoded, source.frames_processed) == (10, 3)
    assert [event["data"]["frame_seq"] for event in events_of(tmp_path / "out")] == [0, 4, 8]
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx([0, 0.4, 0.8], abs=1e-3)


def test_annotated_videos_have_all_frames_and_their_boxes(pipeline, tmp_path):
    summary = pipeline({"a": walk(8), "b": walk(4)}, save_video=True)
    assert summary.files == ["events.jsonl", "summary.json", "a.mp4", "b.mp4"]
    with av.open(str(tmp_path / "out" / "a.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8
    assert np.abs(frames[0].astype(int) - frames[0][0, 0]).max() > 100


class BreakingSource:
    """A source that fails after some frames, as a lost camera does."""

    def __init__(self, inner, after, error):
        self.inner, self.after, self.error = inner, after, error

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __iter__(self):
        for i, frame in enumerate(self.inner):
            if i == self.after:
                raise self.error
            yield frame


@pytest.fixture
def two_sources(tmp_path):
    def make(after, error):
        uris = [write_video(tmp_path / f"{name}.mp4", walk(6)) for name in "ab"]
        a, b = (open_source(str(uri)) for uri in uris)
        return [BreakingSource(a, after, error), b]

    return make


def test_a_source_that_fails_does_not_stop_the_others(two_sources, detector, manifest, tmp_path):
    sources = two_sources(2, SourceError("source must stay readable to its end, got nothing"))
    summary = run(sources, detector, manifest, out=tmp_path / "out", steps=1, save_video=True)
    a, b = summary.sources
    assert (a.status, a.frames_processed) == ("failed", 2)
    assert a.error.startswith("source must stay readable")
    assert (b.status, b.frames_processed) == ("ended", 6)
    assert (tmp_path / "out" / "a.mp4").exists(), "what it gave is kept"


def test_an_interrupt_ends_the_run_in_order(two_sources, detector, manifest, tmp_path):
    sources = two_sources(3, KeyboardInterrupt())
    summary = run(sources, detector, manifest, out=tmp_path / "out", steps=1, save_video=True)
    assert summary.interrupted
    assert {source.status for source in summary.sources} == {"interrupted"}
    assert len(events_of(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "summary.json").exists()
    with av.open(str(tmp_path / "out" / "b.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_waits_until_the_batch_is_written(
    two_sources, detector, manifest, tmp_path, monkeypatch, name
):
    """In the midst of it a library would turn the interrupt into an error of its own."""
    number, make, sent = getattr(signal, name), run_module.detection_event, []

    def interrupted(*arguments, **options):
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return make(*arguments, **options)

    monkeypatch.setattr(run_module, "detection_event", interrupted)
    before = signal.signal(number, signal.default_int_handler)
    try:
        summary = run(two_sources(9, None), detector, manifest, out=tmp_path / "out", steps=1)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    assert summary.interrupted
    assert [source.frames_processed for source in summary.sources] == [1, 1]
    assert len(events_of(tmp_path / "out")) == 2


def test_a_crash_leaves_whole_events_and_no_half_video(two_sources, detector, manifest, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        run(
            two_sources(3, RuntimeError("a bug")),
            detector,
            manifest,
            out=tmp_path / "out",
            steps=1,
            save_video=True,
        )
    assert len(events_of(tmp_path / "out")) == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["events.jsonl"]


def test_a_full_disk_at_the_end_leaves_nothing_partial(
    two_sources, detector, manifest, tmp_path, monkeypatch
):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(run_module, "contact_sheet", full)
    query = Query("q", np.eye(3, dtype=np.float32)[0], scene(), (0, 0, 9, 9))
    sources = two_sources(9, None)
    with pytest.raises(OSError, match="disk full"):
        run(sources, detector, manifest, out=tmp_path / "out", steps=1, query=query, save_video=True)
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_file_that_is_cut_off_is_told(detector, manifest, tmp_path):
    noise = np.random.default_rng(1).integers(0, 255, (30, 96, 160, 3), np.uint8)
    video = write_video(tmp_path / "a.mp4", list(noise), container_options={"movflags": "faststart"})
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    summary = run([open_source(str(video))], detector, manifest, out=tmp_path / "out", steps=1)
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(result_table(summary))
    assert re.search(r"ended early, at frame \d+ of 30", console.export_text())


def test_wrong_arguments_are_refused_before_anything_is_written(two_sources, detector, manifest, tmp_path):
    sources = two_sources(9, None)
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 4, got 0"):
        run(sources, detector, manifest, out=tmp_path / "out", steps=0)
    with pytest.raises(ValueError, match="cameras must have different names, got b, b"):
        run([sources[1], sources[1]], detector, manifest, out=tmp_path / "out", steps=1)
    assert not (tmp_path / "out").exists()


def test_an_earlier_runs_files_are_replaced_and_others_kept(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    for name in ("events.jsonl", "summary.json", "notes.txt"):
        (tmp_path / "out" / name).write_text("old\n" * 500)
    pipeline({"a": walk(2)})
    assert len(events_of(tmp_path / "out")) == 2
    assert (tmp_path / "out" / "notes.txt").read_text().startswith("old")


def test_progress_is_told_after_each_frame_and_at_the_end(pipeline):
    told = []
    pipeline({"a": walk(3), "b": walk(1)}, on_progress=lambda s: told.append((s.camera, s.frames_processed)))
    assert told == [("a", 1), ("b", 1), ("b", 1), ("a", 2), ("a", 3), ("a", 3)]


def test_output_paths_name_what_a_run_writes(tmp_path):
    paths = output_paths(tmp_path, ["a"], query=True, save_video=True)
    assert [path.name for path in paths] == ["events.jsonl", "summary.json", "hits.png", "a.mp4"]


def test_images_in_a_folder_run_like_a_video(detector, manifest, red_query, tmp_path):
    (tmp_path / "photos").mkdir()
    for i, image in enumerate(walk(3)):
        Image.fromarray(image).save(tmp_path / "photos" / f"{i}.png")
    source = open_source(str(tmp_path / "photos"))
    summary = run(
        [source], detector, manifest, out=tmp_path / "out", steps=1, query=red_query, save_video=True
    )
    assert summary.sources[0].frames_processed == 3
    assert summary.sources[0].best_hit.moment_s is None


# The onnxruntime engine, over tiny real graphs ----------------------------------------------------------


def test_a_bundle_runs_in_onnxruntime(bundle_folder, manifest, tmp_path):
    detector = open_detector(bundle_folder, threads=1)
    frames = [scene([((20, 20, 40, 70), (255, 255, 255))]), scene(width=320, height=192)]
    bright, dark = detector.detect(frames, steps=4, seeds=[1, 2])
    assert bright.boxes_xyxy.tolist() == [[40, 24, 80, 72]]
    assert len(dark) == 0
    embeddings = detector.embed(frames[0], np.array([[20, 20, 40, 70], [1, 2, 30, 40]], np.float32), steps=2)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx([1, 1])
    again = open_detector(str(bundle_folder)).detect(frames[:1], steps=4, seeds=[1])
    assert (again[0].embeddings == bright.embeddings).all()


def test_the_shipped_bundle_finds_someone_in_real_footage(shipped, footage, tmp_path):
    with open_source(str(footage("video-intel/one-by-one-person-detection.mp4")), every=25) as source:
        frames = [frame for _, frame in zip(range(12), source, strict=False)]
    detector = open_detector(shipped)
    assert sum(len(found) for found in detector.detect([frame.image for frame in frames], steps=1)) > 0
