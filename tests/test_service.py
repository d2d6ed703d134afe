"""A site at work over real RTSP cameras: events, metrics, faults of one camera, and an end in order."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import yaml
from conftest import GREEN, fake_detector_of, fake_manifest, walk, write_video
from PIL import Image
from psdiff.bundle import Latency
from psdiff.runtime.detector import backend_version
from psdiff.runtime.elastic_steps import CostTable
from psdiff.runtime.service import Service
from psdiff.runtime.site_file import Site
from psdiff.runtime.step_costs import cost_table
from psdiff.runtime.verified import machine
from triton_server import free_ports

pytest.importorskip("fastapi", reason="fastapi is not installed")
from psdiff.runtime.service_api import HttpServer

TABLE = CostTable({(1, 1): 0.005, (4, 1): 0.01})


def site_of(tmp_path, urls, **changes):
    cameras = [{"id": name, "url": url} for name, url in urls.items()]
    content = {
        "site": {"id": "hq", "data_dir": str(tmp_path / "data")},
        "promise": {"latency_ms": 1500, "steps": {"min": 1, "max": 2}},
        "defaults": {"sample_fps": 5, "max_staleness_ms": 3000},
        "cameras": cameras,
        "api": {"listen": f"127.0.0.1:{free_ports(1)[0]}"},
    }
    return Site.model_validate(content | changes)


def get(site, path):
    with urllib.request.urlopen(f"http://{site.api.listen}{path}", timeout=5) as reply:
        return reply.read().decode()


def wait_for(condition, seconds=20.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def events_of(tmp_path):
    [path] = (tmp_path / "data").glob("events-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_people_of_two_cameras_become_events_with_their_time(serve, camera_files, run, tmp_path, isolation):
    url, _ = serve(*camera_files)
    cameras = {"gate": f"{url}/gate", "hall": f"{url}/hall"}
    service = run(site_of(tmp_path, cameras, ingest={"isolation": isolation}))
    assert len(service.ingest_workers()) == (isolation == "process")
    wait_for(lambda: min(service.totals.people[camera] for camera in ("gate", "hall")) >= 5)
    events = events_of(tmp_path)
    assert {event["source"] for event in events} == {"/hq/gate", "/hq/hall"}
    for event in events:
        data = event["data"]
        assert data["ts_source"] in ("arrival", "rtcp_sr")
        assert data["ts_uncertainty_ms"] > 0
        assert data["compute"]["steps"] in (1, 2)
        assert data["compute"]["queue_ms"] >= 0
        assert len(data["det"]["box"]) == 4
    ids = [event["data"]["det"]["id"] for event in events]
    assert len(set(ids)) == len(ids)


def test_a_service_that_starts_again_repeats_no_id(serve, camera_files, detector, manifest, tmp_path):
    """Its frames are numbered from 0 again, and whoever keeps events by their id must not lose any."""
    url, _ = serve(*camera_files)
    for people in (3, 6):
        service = Service(site_of(tmp_path, {"gate": f"{url}/gate"}), manifest, detector, TABLE)
        service.start()
        wait_for(lambda service=service: service.totals.people["gate"] >= 3)
        assert service.stop(10)
        ids = [data["det"]["id"] for data in found_of(tmp_path)]
        assert len(set(ids)) == len(ids) >= people


def ended_of(tmp_path):
    return [event for event in events_of(tmp_path) if event["type"] == "psdiff.track.v1"]


def found_of(tmp_path):
    return [event["data"] for event in events_of(tmp_path) if event["type"] == "psdiff.detection.v1"]


def test_a_person_is_one_track_from_its_first_frame_to_its_end(
    serve, camera_files, detector, manifest, tmp_path
):
    url, _ = serve(*camera_files)
    site = site_of(tmp_path, {"gate": f"{url}/gate", "hall": f"{url}/hall"})
    service = Service(site, manifest, detector, TABLE)
    service.start()
    wait_for(lambda: min(service.totals.people[camera] for camera in ("gate", "hall")) >= 5)
    assert service.stop(10)
    found, ended = found_of(tmp_path), ended_of(tmp_path)
    for camera in ("gate", "hall"):
        tracks = [data["det"]["track"] for data in found if data["camera"] == camera]
        for name in {track["id"] for track in tracks}:
            own = [track for track in tracks if track["id"] == name]
            assert name.startswith(f"{camera}:")
            assert [track["votes"] for track in own] == list(range(1, len(own) + 1))
            assert [track["state"] for track in own] == ["new"] + ["update"] * (len(own) - 1)
        # The video starts again from time to time, and the person with it; most frames follow one another.
        assert len({track["id"] for track in tracks}) < len(tracks)
    # Everybody's end is told once, those who were there when the service stopped included.
    assert sorted(event["subject"] for event in ended) == sorted(
        {data["det"]["track"]["id"] for data in found}
    )
    for event in ended:
        record = event["data"]["track"]
        assert (record["id"], record["state"]) == (event["subject"], "end")
        votes = [data for data in found if data["det"]["track"]["id"] == record["id"]]
        assert record["votes"] == len(votes)
        assert event["data"]["first_seen"] <= event["data"]["last_seen"] == event["time"]
        best = max(votes, key=lambda data: data["det"]["score"])["det"]["score"]
        assert event["data"]["best"]["score"] <= best
        assert "warm" not in votes[0]["compute"]


def test_cameras_that_want_it_start_warm_and_others_do_not(serve, camera_files, engine, manifest, tmp_path):
    url, _ = serve(*camera_files)
    known = manifest.model_copy(update={"model": {"num_timesteps": 1000, "embedding_scale": 3.0}})
    cameras = [
        {"id": "gate", "url": f"{url}/gate", "warm_start": True},
        {"id": "hall", "url": f"{url}/hall"},
    ]
    site = site_of(tmp_path, {}, cameras=cameras)
    service = Service(site, known, fake_detector_of(engine, known), TABLE)
    service.start()
    wait_for(lambda: min(service.totals.people[camera] for camera in ("gate", "hall")) >= 6)
    assert service.stop(10)
    found = found_of(tmp_path)
    starts = [data["compute"]["warm"] for data in found if data["camera"] == "gate"]
    assert starts[0] is False
    assert True in starts
    assert all("warm" not in data["compute"] for data in found if data["camera"] == "hall")


def test_a_warm_start_needs_a_bundle_that_tells_its_noise(detector, manifest, tmp_path):
    site = site_of(tmp_path, {}, cameras=[{"id": "gate", "url": "rtsp://127.0.0.1/x", "warm_start": True}])
    with pytest.raises(ValueError, match="bundle must hold num_timesteps to start below T, got none"):
        Service(site, manifest, detector, TABLE)


def test_what_the_api_tells_adds_up(serve, camera_files, run, tmp_path):
    url, _ = serve(*camera_files)
    cameras = {"gate": f"{url}/gate", "away": f"rtsp://admin:topsecret@127.0.0.1:{free_ports(1)[0]}/x"}
    site = site_of(tmp_path, cameras)
    service = run(site)
    wait_for(lambda: service.totals.frames["gate"] >= 5)
    assert get(site, "/healthz") == '{"status":"ok"}'
    assert json.loads(get(site, "/readyz"))["status"] == "ready"
    text = get(site, "/api/v1/cameras")
    assert "topsecret" not in text
    gate, away = json.loads(text)
    assert gate["state"] == "streaming"
    # The counters are read one after the other while a frame may be on its way from one to the next.
    assert abs(gate["decoded"] - gate["offered"] - sum(gate["skipped"].values())) <= 1
    assert (away["state"], away["reason"]) == ("backoff", "refused")
    metrics = get(site, "/metrics")
    assert 'psdiff_camera_state{camera="gate",state="streaming"} 1.0' in metrics
    assert 'psdiff_camera_state{camera="away",state="backoff"} 1.0' in metrics
    assert 'psdiff_camera_reconnects_total{camera="away",reason="refused"}' in metrics
    assert "topsecret" not in metrics


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_a_file_and_a_folder_are_cameras_until_they_end(camera_files, run, tmp_path, isolation):
    """Flat out: every frame is looked at, however long that takes."""
    made = {"creation_time": "2026-03-01T10:00:00.000000Z"}
    video = write_video(tmp_path / "clip.mp4", walk(40), fps=10, metadata=made)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, image in enumerate(walk(5, colour=GREEN)):
        Image.fromarray(image).save(folder / f"{i}.png")
    site = site_of(
        tmp_path,
        {"clip": str(video), "pictures": str(folder)},
        defaults={"pace": "flat_out"},
        ingest={"isolation": isolation},
    )
    service = run(site)
    wait_for(lambda: [each["state"] for each in service.cameras()] == ["ended", "ended"])
    wait_for(lambda: [each["computed"] for each in service.cameras()] == [40, 5])
    assert service.is_ready
    wait_for(lambda: [service.totals.frames[name] for name in ("clip", "pictures")] == [40, 5])
    assert service.faults() == []  # an end is none
    # Captured long ago: that is no latency.
    assert 'psdiff_frame_latency_seconds_count{stage="publish"}' in get(site, "/metrics")
    assert 'psdiff_camera_time_source_info{camera="clip",source="file"} 1.0' in get(site, "/metrics")
    clip = [
        event
        for event in events_of(tmp_path)
        if event["source"] == "/hq/clip" and event["type"] == "psdiff.detection.v1"
    ]
    assert len(clip) >= 39, "one for each frame; the last may still be on its way to the disk"
    assert {event["data"]["ts_source"] for event in clip} == {"file"}
    assert {event["time"][:18] for event in clip} == {"2026-03-01T10:00:0"}
    assert 'psdiff_camera_state{camera="clip",state="ended"} 1.0' in get(site, "/metrics")
    assert [each["decoder"] for each in service.cameras()] == ["pyav-cpu", "pillow"]


def test_a_detector_that_hangs_or_ends_makes_the_service_unhealthy(run, tmp_path, monkeypatch):
    site = site_of(tmp_path, {})
    service = run(site)
    assert json.loads(get(site, "/healthz")) == {"status": "ok"}
    monkeypatch.setattr("psdiff.runtime.service.STUCK_BATCH_S", -1.0)
    with pytest.raises(urllib.error.HTTPError, match="503") as caught:
        get(site, "/healthz")
    assert "the detector must be done with a batch" in caught.value.read().decode()
    monkeypatch.undo()
    assert service.faults() == []
    service._loop.stop(5)
    assert len(service.faults()) == 1


def test_a_camera_whose_thread_ends_makes_the_service_unhealthy_and_one_that_is_away_does_not(
    run, tmp_path, monkeypatch
):
    site = site_of(tmp_path, {"away": "rtsp://127.0.0.1:9/x"}, ingest={"isolation": "thread"})
    service = run(site)
    wait_for(lambda: service.cameras()[0]["state"] == "backoff")
    assert service.faults() == []
    feed = service._feeds["away"]
    feed.stop()
    assert feed.join(5)
    assert "camera away must be followed" in service.faults()[0]


def test_ready_means_that_events_can_be_kept(run, tmp_path):
    site = site_of(tmp_path, {})
    service = run(site)
    assert service.is_ready
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "data").write_text("a file in the place of the folder")
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(site, "/readyz")
    assert json.loads(get(site, "/startupz"))["status"] == "started"
    (tmp_path / "data").unlink()
    assert service.is_ready


def test_the_end_is_told_at_once_and_the_batch_under_way_is_finished(
    serve, camera_files, detector, manifest, tmp_path
):
    url, _ = serve(camera_files[0])
    site = site_of(tmp_path, {"gate": f"{url}/gate"})
    service = Service(site, manifest, detector, TABLE)
    http = HttpServer(service, site.api.listen)
    http.start()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(site, "/startupz")
    detect, begun, go_on = service._loop._detect, threading.Event(), threading.Event()

    def held(frames, steps):
        begun.set()
        assert go_on.wait(20)
        return detect(frames, steps)

    service._loop._detect = held
    service.start()
    assert get(site, "/readyz")
    assert begun.wait(20)
    ended = []
    stopping = threading.Thread(target=lambda: ended.append(service.stop(10)))
    stopping.start()
    wait_for(lambda: not service.is_ready)
    with pytest.raises(urllib.error.HTTPError, match="503"):
        get(site, "/readyz")
    assert get(site, "/startupz")
    assert get(site, "/healthz")  # an end is no fault
    go_on.set()
    stopping.join(12)
    http.stop()
    assert ended == [True]
    assert service.totals.frames["gate"] >= 1
    assert events_of(tmp_path)


def test_a_camera_that_dies_does_not_touch_the_other(serve, camera_files, run, tmp_path):
    stays, _ = serve(camera_files[0])
    goes, process = serve(camera_files[1])
    service = run(site_of(tmp_path, {"gate": f"{stays}/gate", "hall": f"{goes}/hall"}))
    wait_for(lambda: min(service.totals.frames[camera] for camera in ("gate", "hall")) >= 2)
    process.kill()
    wait_for(lambda: service.cameras()[1]["state"] == "backoff")
    before = service.totals.frames["gate"]
    wait_for(lambda: service.totals.frames["gate"] >= before + 3)
    assert service.is_ready
    assert service.cameras()[1]["offline_s"] > 0


def test_a_disk_that_is_full_does_not_end_detection(serve, camera_files, run, tmp_path, monkeypatch):
    url, _ = serve(camera_files[0])
    service = run(site_of(tmp_path, {"gate": f"{url}/gate"}))

    def full(events):
        raise OSError("no space")

    monkeypatch.setattr(service._log, "write", full)
    wait_for(lambda: service.totals.failed_writes >= 2)
    assert service.is_ready


def test_a_service_that_was_stopped_is_not_ready(detector, manifest, tmp_path):
    service = Service(site_of(tmp_path, {}), manifest, detector, TABLE)
    assert not service.is_ready
    service.start()
    assert service.is_ready
    assert service.stop(5)
    assert not service.is_ready


def test_a_camera_that_waits_for_room_does_not_hold_up_the_end(
    serve, camera_files, detector, manifest, tmp_path
):
    """Its queue is full for good: nothing is computed, since the loop is held."""
    url, _ = serve(camera_files[0])
    defaults = {"queue": "every_frame", "depth": 1}
    service = Service(
        site_of(tmp_path, {"gate": f"{url}/gate"}, defaults=defaults), manifest, detector, TABLE
    )
    held = threading.Event()
    service._loop._detect = lambda frames, steps: held.wait(20) and []
    service.start()
    wait_for(lambda: service.cameras()[0].get("waiting") == 1)
    time.sleep(0.3)
    held.set()
    assert service.stop(8)
    gate = service.cameras()[0]
    assert gate["decoded"] == gate["offered"] + sum(gate["skipped"].values())
    assert gate["offered"] == gate["computed"] + sum(gate["dropped"].values())


def test_a_port_that_is_taken_is_an_error(detector, manifest, tmp_path):
    site = site_of(tmp_path, {})
    service = Service(site, manifest, detector, TABLE)
    first = HttpServer(service, site.api.listen)
    first.start()
    with pytest.raises(OSError, match=r"api.listen must be an address that is free, got 127.0.0.1"):
        HttpServer(service, site.api.listen).start()
    first.stop()


def test_costs_come_from_the_manifest_or_are_measured(detector, tmp_path, engine):
    site = site_of(tmp_path, {})
    told = [
        Latency(
            steps=k,
            batch=1,
            backend=backend_version("onnxruntime"),
            machine=machine(),
            p50_ms=100.0 * k,
            p95_ms=0,
            p99_ms=0,
        )
        for k in (1, 2)
    ]
    manifest = fake_manifest().model_copy(update={"latencies": told})
    assert cost_table(site, manifest, detector).seconds(4, 1) == pytest.approx(0.4)
    assert engine.batches == []
    measured = cost_table(site, fake_manifest(), detector)
    assert set(engine.batches) == {1, site.model.max_batch}
    assert 0 < measured.seconds(1, 1) < 1


def test_steps_that_the_model_does_not_have_are_refused(detector, manifest, tmp_path):
    site = site_of(tmp_path, {}, promise={"steps": {"min": 9, "max": 9}})
    with pytest.raises(ValueError, match=r"promise.steps.min must be at most 4, the model's, got 9"):
        Service(site, manifest, detector, TABLE)


def test_the_program_serves_and_ends_in_order(serve, camera_files, tmp_path, shipped):
    url, _ = serve(camera_files[0])
    site = site_of(tmp_path, {"gate": f"{url}/gate"})
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(site.model_dump(mode="json")))
    with (tmp_path / "log").open("w") as log:
        program = subprocess.Popen(
            [sys.executable, "-m", "psdiff", "serve", "-c", str(path)], cwd=tmp_path, stdout=log, stderr=log
        )
    try:

        def is_streaming():
            assert program.poll() is None, (tmp_path / "log").read_text()
            try:
                return json.loads(get(site, "/api/v1/cameras"))[0].get("computed", 0) > 2
            except (urllib.error.URLError, ConnectionError):
                return False

        wait_for(is_streaming, 60)
        program.send_signal(signal.SIGTERM)
        began = time.monotonic()
        assert program.wait(15) == 0, (tmp_path / "log").read_text()
        assert time.monotonic() - began < 10
    finally:
        program.kill()
        program.wait()
    text = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[-1]["event"] == "stopping"
    assert "Traceback" not in text
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_program_tells_systemd_and_ends_in_time_before_a_camera_that_does_not_answer(tmp_path, shipped):
    """A camera that takes connections and says nothing holds its thread for longer than the end may take."""
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd,
    ):
        cameras = {
            "silent": f"rtsp://admin:topsecret@127.0.0.1:{silent.getsockname()[1]}/x",
            "away": "rtsp://admin:topsecret@127.0.0.1:9/topsecret",
        }
        site = site_of(tmp_path, cameras)
        path = tmp_path / "site.yaml"
        path.write_text(yaml.safe_dump(site.model_dump(mode="json")))
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        environment = os.environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with (tmp_path / "log").open("w") as log:
            command = [sys.executable, "-m", "psdiff", "serve", "-c", str(path)]
            program = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, env=environment)
        try:
            assert systemd.recv(100) == b"READY=1"
            assert json.loads(get(site, "/readyz"))["status"] == "ready"
            states = [("connecting", None), ("backoff", "refused")]

            def are_away():
                told = json.loads(get(site, "/api/v1/cameras"))
                return [(each["state"], each["reason"]) for each in told] == states

            wait_for(are_away)
            program.send_signal(signal.SIGTERM)
            began = time.monotonic()
            assert systemd.recv(100) == b"STOPPING=1"
            assert program.wait(15) == 0, (tmp_path / "log").read_text()
            assert time.monotonic() - began < 10
        finally:
            program.kill()
            program.wait()
    text = (tmp_path / "log").read_text()
    assert "topsecret" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    # Said by the process that follows cameras.
    [away] = [line for line in lines if line.get("camera") == "away"]
    assert (away["err_code"], away["level"]) == ("refused", "warning")
    assert "rtsp://127.0.0.1:9/***" in away["event"]
