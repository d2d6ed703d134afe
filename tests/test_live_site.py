"""The file of a site while its service runs: edits of every kind, good and bad."""

import json
import logging
import shutil
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import walk, write_video
from psdiff.runtime.service import Service
from psdiff.runtime.site_file import load_site

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("watchfiles", reason="watchfiles is not installed")
pytest.importorskip("ruamel.yaml", reason="ruamel.yaml is not installed")
from psdiff.runtime.live_site import LiveSite
from running_site import NOWHERE, TABLE, call, metric, names, replaced, running, wait_for, write_site


@pytest.fixture(scope="module")
def camera_file(tmp_path_factory):
    options = {"crf": "20", "g": "5", "bf": "0"}
    return write_video(tmp_path_factory.mktemp("cameras") / "gate.mp4", walk(300), fps=15, options=options)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("GATE_USER", "admin")
    monkeypatch.setenv("GATE_PASS", "topsecret")
    return write_site(tmp_path)


@pytest.fixture
def run(file, detector, manifest):
    """Start a service over the file, with its API; gives service and LiveSite."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(running(file, manifest, detector))


def in_place(file, text):
    file.write_text(text)


def by_rename(file, text):
    """As vim, sed -i and configuration tools do."""
    other = file.with_name("new~")
    other.write_text(text)
    other.replace(file)


def by_backup(file, text):
    """As editors that keep the old file under another name; for a while there is none."""
    file.replace(file.with_name("site.yaml.bak"))
    time.sleep(0.3)
    file.write_text(text)


def in_pieces(file, text):
    """Each piece ends a line: some of them are sites, with fewer cameras."""
    with file.open("w") as stream:
        for line in text.splitlines(keepends=True):
            stream.write(line)
            stream.flush()
            time.sleep(0.05)


@pytest.mark.parametrize("save", [in_place, by_rename, by_backup, in_pieces])
def test_an_edit_takes_effect_however_it_is_saved(run, file, save):
    service, live = run()
    changes = []
    apply = service.apply
    service.apply = lambda site: changes.append(apply(site)) or changes[-1]
    save(file, replaced(file, "api:", f"  - {{id: yard, url: '{NOWHERE}'}}\napi:"))
    wait_for(lambda: changes)
    assert names(service) == ["gate", "hall", "yard"]
    assert [change.as_dict() for change in changes] == [{"added": ["yard"], "removed": [], "changed": []}]
    assert live.errors == 0
    # And the next one is seen too.
    save(file, replaced(file, "  transport: tcp\n", "  transport: udp\n"))
    wait_for(lambda: len(changes) == 2)
    assert changes[1].as_dict() == {"added": [], "removed": [], "changed": ["hall"]}
    assert (live.is_valid, live.errors) == (True, 0)


def test_a_link_to_a_file_elsewhere_is_followed(run, file, tmp_path):
    target = tmp_path / "elsewhere" / "real.yaml"
    target.parent.mkdir()
    shutil.move(file, target)
    file.symlink_to(target)
    service, live = run()
    by_rename(target, replaced(target, "id: hall", "id: lobby"))
    wait_for(lambda: names(service) == ["gate", "lobby"])
    live.remove_camera("lobby")
    assert file.is_symlink()
    assert "lobby" not in target.read_text()


@pytest.mark.parametrize(
    ("old", "new", "place", "reason"),
    [
        ("sample_fps: 5", "sample_fps: -5", "defaults.sample_fps", "Input should be greater than 0"),
        ("id: hall", "id: gate", "", "cameras must have different ids"),
        ("cameras:", "cameras: [", "", "must be YAML, got line"),
        ("id: hq", "id: annexe", "site.id", "must stay 'hq' while the service runs, got 'annexe'; restart"),
        (
            "version: 1",
            "model: {threads: 1}",
            "model.threads",
            "must stay None while the service runs, got 1",
        ),
        ("version: 1", "trace: {sample_every: 5}", "trace.sample_every", "must stay None"),
        ("sample_fps: 5", "warm_start: true", "warm_start", "must stay false while the service runs without"),
        ("${GATE_PASS}", "${NOBODY}", "cameras[0].url", "environment must hold NOBODY for camera gate"),
    ],
)
def test_an_edit_that_is_mistaken_is_refused_with_path_and_reason(run, file, caplog, old, new, place, reason):
    service, live = run()
    before, good = service.site, file.read_text()
    with caplog.at_level(logging.ERROR):
        file.write_text(replaced(file, old, new))
        wait_for(lambda: not live.is_valid)
    assert service.site is before
    told = call(before, "GET", "/api/v1/site")[1]
    assert (told["valid"], told["error"]["path"]) == (False, place)
    assert reason in told["error"]["reason"]
    [record] = [record for record in caplog.records if "is not in effect" in record.getMessage()]
    assert place in record.getMessage()
    assert reason in record.getMessage()
    assert "topsecret" not in record.getMessage() + json.dumps(told)
    assert metric(before, "psdiff_config_errors_total") == 1
    assert metric(before, "psdiff_config_valid") == 0
    live.look()  # the same mistake is told once
    assert live.errors == 1
    file.write_text(good)
    wait_for(lambda: live.is_valid)
    assert metric(before, "psdiff_config_valid") == 1
    assert metric(before, "psdiff_config_errors_total") == 1
    assert call(before, "GET", "/api/v1/site")[1]["error"] is None


def test_a_file_that_is_deleted_changes_nothing_and_is_said(run, file):
    service, live = run()
    text = file.read_text()
    file.unlink()
    wait_for(lambda: not live.is_valid)
    assert names(service) == ["gate", "hall"]
    assert "No such file" in live.status()["error"]["reason"]
    file.write_text(replaced_text(text))
    wait_for(lambda: names(service) == ["gate", "lobby"])
    assert live.is_valid


def replaced_text(text):
    return text.replace("id: hall", "id: lobby")


def test_a_folder_that_goes_and_comes_is_survived(run, file):
    service, _ = run()
    text = file.read_text()
    shutil.rmtree(file.parent)
    time.sleep(0.5)
    file.parent.mkdir()
    file.write_text(replaced_text(text))
    wait_for(lambda: names(service) == ["gate", "lobby"])


def events_of(file):
    [path] = (file.parent.parent / "data").glob("events-*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_only_a_camera_that_changed_is_connected_anew(run, file, serve, camera_file):
    url, _ = serve(camera_file)
    text = file.read_text().replace('"rtsp://${GATE_USER}:${GATE_PASS}@127.0.0.1:9/gate"', f"{url}/gate")
    file.write_text(text.replace("'rtsp://127.0.0.1:9/hall'", f"{url}/gate"))
    service, live = run()

    def computed(i):
        return service.cameras()[i]["computed"]

    wait_for(lambda: min(computed(0), computed(1)) >= 3)
    feeds = dict(service._feeds)
    before = service.cameras()
    live.put_camera("hall", {"sample_fps": 3})
    after = service.cameras()
    assert service._feeds["gate"] is feeds["gate"]
    assert service._feeds["hall"] is not feeds["hall"]
    wait_for(lambda: computed(0) > after[0]["computed"] and computed(1) > after[1]["computed"])
    gate, hall = service.cameras()
    assert (gate["reconnects"], hall["reconnects"]) == ({}, {})
    # What a camera counted before goes on; numbers of frames stay unique.
    for name in ("decoded", "offered", "computed", "people"):
        assert hall[name] > before[1][name], name
    ids = [event["data"]["det"]["id"] for event in events_of(file) if "det" in event["data"]]
    assert len(set(ids)) == len(ids)
    # Whoever was followed before the change is somebody new after it.
    wait_for(lambda: [event for event in events_of(file) if event["type"] == "psdiff.track.v1"])
    ended = [event for event in events_of(file) if event["type"] == "psdiff.track.v1"]
    assert {event["data"]["camera"] for event in ended} == {"hall"}
    seen = service.cameras()[1]["people"]
    wait_for(lambda: service.cameras()[1]["people"] > seen)
    later = [
        event for event in events_of(file) if event["subject"].startswith("hall:") and "det" in event["data"]
    ][-1]
    assert later["data"]["det"]["track"]["id"] not in {event["subject"] for event in ended}


def test_a_camera_is_switched_off_and_on(run, file):
    service, live = run()
    assert live.put_camera("hall", {"enabled": False}).changed == ("hall",)
    assert service.cameras()[1] == {"camera": "hall", "state": "disabled"}
    assert live.put_camera("hall", {}).changed == ("hall",)
    assert service.cameras()[1]["state"] != "disabled"
    assert "enabled" not in file.read_text()


def test_two_hundred_changes_leave_no_threads_and_no_files(run, file):
    service, live = run()
    live.put_camera("yard", {"url": NOWHERE})
    live.remove_camera("yard")

    def counted():
        """Threads and files of this process and of the one that follows cameras."""
        processes = [Path(f"/proc/{pid}") for pid in ("self", *service.ingest_workers())]
        return [len(list((process / kind).iterdir())) for process in processes for kind in ("task", "fd")]

    before = counted()
    for i in range(100):
        live.put_camera("yard", {"url": NOWHERE, "sample_fps": i + 1})
        live.remove_camera("yard")
    assert len(before) == 4
    wait_for(lambda: all(now <= then + 4 for now, then in zip(counted(), before, strict=True)))
    assert names(service) == ["gate", "hall"]


def test_a_change_while_the_service_ends_is_refused(file, detector, manifest):
    text = file.read_text()
    service = Service(load_site(file), manifest, detector, TABLE)
    live = LiveSite(file, text, service)
    service.start()
    assert service.stop(10)
    file.write_text(replaced(file, "id: hall", "id: lobby"))
    live.look()
    assert "service must be at work" in live.status()["error"]["reason"]


def test_a_slow_camera_does_not_hold_up_a_change(run, file):
    """It takes connections and says nothing: the old feed is left to its timeout."""
    service, live = run()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        live.put_camera("yard", {"url": f"rtsp://127.0.0.1:{port}/x"})
        wait_for(lambda: service.cameras()[2]["state"] == "connecting")
        time.sleep(0.3)
        began = time.monotonic()
        live.put_camera("yard", {"url": NOWHERE})
        assert time.monotonic() - began < 8
        wait_for(lambda: service.cameras()[2]["reason"] == "refused")


def test_a_folder_in_which_a_lot_is_written_makes_no_noise(run, file, caplog):
    """As where the log of the service lies beside its site: what is logged of changes would be one."""
    with caplog.at_level(logging.INFO):
        service, _ = run()
        for i in range(10):
            (file.parent / "log").write_text("x" * i)
            time.sleep(0.05)
        file.write_text(replaced(file, "id: hall", "id: lobby"))
        wait_for(lambda: names(service) == ["gate", "lobby"])
        wait_for(lambda: any("the site changed" in record.getMessage() for record in caplog.records))
    assert not [record for record in caplog.records if record.name.startswith("watchfiles")]
