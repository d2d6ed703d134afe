import json
import os
from datetime import UTC, datetime

import pytest
from conftest import scene
from psdiff.runtime.events import (
    BestView,
    Compute,
    DetectedPerson,
    EventWriter,
    Match,
    TrackData,
    TrackEvent,
    TrackRecord,
    detection_event,
    model_record,
    source_of,
)
from psdiff.runtime.frames import VideoFrame
from ulid import ULID

TIME = datetime(2026, 11, 20, 12, 51, 3, 214_567, UTC)


@pytest.fixture
def event(manifest):
    def make(match=None, camera="gate-1", pts_s=1.23456, site="local"):
        frame = VideoFrame(camera, 42, pts_s, scene(), TIME, "file")
        person = DetectedPerson(id=f"{camera}:42:0", box=(1.04, 2.06, 30.0, 40.96), score=0.93333)
        compute = Compute(steps=2, batch=3, infer_ms=21.04)
        model = model_record(manifest)
        return detection_event(frame, person, match=match, model=model, compute=compute, site=site)

    return make


def test_an_event_is_one_line_of_cloudevents_json(event):
    line = event().line()
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    content = json.loads(line)
    ULID.from_str(content.pop("id"))
    model = content["data"].pop("model")
    assert (model["id"], model["space"], len(model["sha256"])) == ("fake", "fake-colours", 64)
    assert content == {
        "specversion": "1.0",
        "type": "psdiff.detection.v1",
        "source": "/local/gate-1",
        "subject": "gate-1:42:0",
        "time": "2026-11-20T12:51:03.214Z",
        "datacontenttype": "application/json",
        "data": {
            "camera": "gate-1",
            "frame_seq": 42,
            "pts_s": 1.235,
            "ts_source": "file",
            "frame": {"w": 160, "h": 96},
            "det": {"id": "gate-1:42:0", "box": [1.0, 2.1, 30.0, 41.0], "score": 0.9333},
            "compute": {"steps": 2, "batch": 3, "infer_ms": 21.0},
        },
    }


def test_a_track_and_a_warm_start_are_told_where_there_are_any(event):
    made = event()
    made.data.det.track = TrackRecord(id="gate-1:1:7", state="update", votes=3)
    made.data.compute.warm = False
    data = json.loads(made.line())["data"]
    assert data["det"]["track"] == {"id": "gate-1:1:7", "state": "update", "votes": 3}
    assert data["compute"]["warm"] is False


def test_the_end_of_a_track_is_an_event_of_its_own(manifest):
    made = TrackEvent(
        source=source_of("head office", "gate-1"),
        subject="gate-1:1:7",
        time=TIME,
        data=TrackData(
            camera="gate-1",
            track=TrackRecord(id="gate-1:1:7", state="end", votes=3),
            first_seen=TIME,
            last_seen=TIME,
            best=BestView(frame_seq=42, box=(1.04, 2.06, 30.0, 40.96), score=0.93333),
            model=model_record(manifest),
        ),
    )
    content = json.loads(made.line())
    assert (content["type"], content["source"]) == ("psdiff.track.v1", "/head%20office/gate-1")
    assert content["time"] == content["data"]["last_seen"] == "2026-11-20T12:51:03.214Z"
    assert content["data"]["best"] == {"frame_seq": 42, "box": [1.0, 2.1, 30.0, 41.0], "score": 0.9333}


def test_a_match_is_there_when_a_query_was_asked(event):
    content = json.loads(event(match=Match(query="q", cos=0.71234, is_match=True)).line())
    assert content["data"]["match"] == {"query": "q", "cos": 0.7123, "is_match": True}


def test_a_frame_without_timestamp_says_null(event):
    assert json.loads(event(pts_s=None).line())["data"]["pts_s"] is None


def test_the_source_is_a_uri_reference(event):
    assert event(camera="gäte 1", site="a/b").source == "/a%2Fb/g%C3%A4te%201"


def test_the_model_digest_depends_on_the_files_alone(manifest):
    files = {"a": "1", "b": "2"}
    turned = dict(reversed(files.items()))
    one, two = (model_record(manifest.model_copy(update={"files": f})) for f in (files, turned))
    assert one.sha256 == two.sha256
    assert one.sha256 != model_record(manifest).sha256


def test_a_frame_is_written_by_one_call(event, tmp_path, monkeypatch):
    calls = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: calls.append(data) or write(fd, data))
    with EventWriter(tmp_path / "events.jsonl") as writer:
        writer.write([event(), event()])
        assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 2, "readable before the end"
        writer.write([])
    assert len(calls) == 1


def test_a_full_disk_leaves_whole_lines(event, tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.write([event()])
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:50]))
        with pytest.raises(OSError, match="events must fit on the disk, got 50 of"):
            writer.write([event()])
    assert path.read_bytes().endswith(b"}\n")
    assert len(path.read_text().splitlines()) == 1


def test_a_new_run_replaces_the_old_events(event, tmp_path):
    for _ in range(2):
        with EventWriter(tmp_path / "events.jsonl") as writer:
            writer.write([event()])
    writer.close()
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1
