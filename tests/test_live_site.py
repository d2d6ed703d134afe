"""The file of a site while its service runs: edits of every kind, good and bad, and cameras by API."""

import json
import logging
import shutil
import socket
import stat
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import walk, write_video
from psdiff.runtime.elastic_steps import CostTable
from psdiff.runtime.service import Service
from psdiff.runtime.site_file import load_site
from triton_server import free_ports

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("watchfiles", reason="watchfiles is not installed")
pytest.importorskip("ruamel.yaml", reason="ruamel.yaml is not installed")
from psdiff.runtime.live_site import LiveSite
from psdiff.runtime.service_api import HttpServer

TABLE = CostTable({(1, 1): 0.005, (4, 1): 0.01})
# Nobody listens there: the cameras of most tests are away, which is all that they need to be.
NOWHERE = "rtsp://127.0.0.1:9/x"
SITE = """\
# The site of the head office.
version: 1
site: {{id: hq, data_dir: {data}}}   # a local disk
defaults: {{sample_fps: 5}}
cameras:
  # The gate was moved in May.
  - {{id: gate, url: "rtsp://${{GATE_USER}}:${{GATE_PASS}}@127.0.0.1:9/gate"}}
  - id: hall
    url: 'rtsp://127.0.0.1:9/hall'  # recorder, channel 2
    transport: tcp
api: {{listen: "127.0.0.1:{port}"}}
"""


@pytest.fixture(scope="module")
def camera_file(tmp_path_factory):
    options = {"crf": "20", "g": "5", "bf": "0"}
    return write_video(tmp_path_factory.mktemp("cameras") / "gate.mp4", walk(300), fps=15, options=options)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("GATE_USER", "admin")
    monkeypatch.setenv("GATE_PASS", "topsecret")
    folder = tmp_path / "etc"
    folder.mkdir()
    path = folder / "site.yaml"
    path.write_text(SITE.format(data=tmp_path / "data", port=free_ports(1)[0]))
    return path


@pytest.fixture
def run(file, detector, manifest):
    """Start a service over the file, with its API; gives both parts."""
    started = []

    def start():
        text = file.read_text()
        service = Service(load_site(file), manifest, detector, TABLE)
        live = LiveSite(file, text, service)
        http = HttpServer(service, service.site.api.listen, live)
        http.start()
        service.start()
        live.start()
        started.append((service, live, http))
        return service, live

    yield start
    for service, live, http in started:
        live.stop(0)
        assert service.stop(10)
        assert live.stop(5)
        http.stop()


def wait_for(condition, seconds=30.0):
    end_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)


def names(service):
    return [camera["camera"] for camera in service.cameras()]


def replaced(file, old, new):
    text = file.read_text()
    assert text.count(old) == 1
    return text.replace(old, new)


def call(site, method, path, content=None, **headers):
    """(status, body) of a request; headers as keywords, - written as _."""
    request = urllib.request.Request(f"http://{site.api.listen}{path}", method=method)
    if content is not None:
        request.data = content if isinstance(content, bytes) else json.dumps(content).encode()
        request.add_header("content-type", "application/json")
    for name, value in headers.items():
        request.add_header(name.replace("_", "-"), value)
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def metric(site, name):
    with urllib.request.urlopen(f"http://{site.api.listen}/metrics", timeout=10) as reply:
        lines = reply.read().decode().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name} ")]
    return float(line.split()[1])


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
    events = [
        json.loads(line)["data"]["det"]["id"]
        for path in (file.parent.parent / "data").glob("events-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert len(set(events)) == len(events)


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


def test_a_camera_is_put_into_the_file_and_its_comments_stay(run, file):
    service, _ = run()
    site, before = service.site, file.read_text()
    file.chmod(0o640)
    status, told = call(site, "PUT", "/api/v1/cameras/yard", {"url": NOWHERE, "sample_fps": 2.5})
    assert (status, told["added"]) == (201, ["yard"])
    text = file.read_text()
    added = f"  - id: yard\n    url: {NOWHERE}\n    sample_fps: 2.5\n"
    assert text == before.replace("api:", f"{added}api:")
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert [path.name for path in file.parent.iterdir()] == ["site.yaml"]
    assert names(service) == ["gate", "hall", "yard"]
    status, told = call(site, "PUT", "/api/v1/cameras/hall", {"transport": "udp"})
    assert (status, told["changed"]) == (200, ["hall"])
    assert file.read_text() == text.replace("transport: tcp", "transport: udp")
    status, told = call(site, "DELETE", "/api/v1/cameras/yard")
    assert (status, told["removed"]) == (200, ["yard"])
    assert file.read_text() == before.replace("transport: tcp", "transport: udp")
    assert call(site, "DELETE", "/api/v1/cameras/yard")[0] == 404
    assert load_site(file) == service.site


def test_secrets_are_neither_written_nor_told(run, file):
    service, _ = run()
    site = service.site
    assert call(site, "PUT", "/api/v1/cameras/gate", {"queue": "freshest"})[0] == 200
    assert "${GATE_USER}:${GATE_PASS}@" in file.read_text()
    assert "topsecret" not in file.read_text()
    status, gate = call(site, "GET", "/api/v1/cameras/gate")
    assert status == 200
    assert gate["source"] == "rtsp://127.0.0.1:9/gate"
    assert gate["settings"] == {"enabled": True, "queue": "freshest"}
    for path in ("/api/v1/cameras", "/api/v1/cameras/gate", "/api/v1/site"):
        text = json.dumps(call(site, "GET", path))
        assert not any(word in text for word in ("topsecret", "admin", "GATE_PASS")), path
    # What is told can be sent back, and means the same.
    assert call(site, "PUT", "/api/v1/cameras/gate", gate["settings"])[0] == 200
    assert service.site.cameras[0].url == site.cameras[0].url


@pytest.mark.parametrize(
    ("camera", "content", "status", "path", "reason"),
    [
        ("yard", {}, 422, "url", "must be given for a new camera"),
        ("yard", {"url": "file:///etc/passwd"}, 422, "url", "must begin with rtsp://"),
        ("yard", {"url": "rtsp://${GATE_PASS}@evil/x"}, 422, "url", "secrets must be named in the file"),
        (
            "yard",
            {"url": "rtsp://${file:/etc/passwd}@evil/x"},
            422,
            "url",
            "secrets must be named in the file",
        ),
        ("gate", {"url": "rtsp://${GATE_PASS}@evil/x"}, 422, "url", "secrets must be named in the file"),
        ("hall", {"ulr": "x"}, 422, "ulr", "must be a known key; did you mean url?"),
        ("hall", {"sample_fps": -1}, 422, "sample_fps", "greater than 0"),
        ("hall", {"id": "gate"}, 422, "id", "must be hall, as in the address"),
        ("a%20b", {"url": NOWHERE}, 422, "id", "match pattern"),
        ("hall", b"[1]", 400, "", "body must be a JSON object, got list"),
        ("hall", b"{", 400, "", "body must be JSON"),
        ("hall", b'{"sample_fps": Infinity}', 400, "", "body must be JSON"),
        ("hall", b"[" * 60_000, 400, "", "body must be JSON"),
        ("hall", b" " * 70_000, 413, "", "at most 65536 bytes"),
    ],
)
def test_what_is_wrong_is_told_as_json(run, file, camera, content, status, path, reason):
    service, _ = run()
    before = file.read_text()
    got, told = call(service.site, "PUT", f"/api/v1/cameras/{camera}", content)
    assert (got, told["path"]) == (status, path)
    assert reason in told["reason"]
    assert file.read_text() == before
    assert names(service) == ["gate", "hall"]


def test_a_route_that_is_not_there_is_told_as_json(run):
    service, _ = run()
    assert call(service.site, "GET", "/none") == (404, {"path": "", "reason": "Not Found"})
    assert call(service.site, "GET", "/api/v1/cameras/none")[0] == 404
    assert call(service.site, "POST", "/api/v1/cameras/hall", {})[0] == 405


def test_a_bug_is_told_without_its_words(run, monkeypatch):
    service, _ = run()

    def broken():
        raise RuntimeError("rtsp://admin:topsecret@host")

    monkeypatch.setattr(service, "cameras", broken)
    assert call(service.site, "GET", "/api/v1/cameras") == (
        500,
        {"path": "", "reason": "the service failed to answer; its log tells why"},
    )
    monkeypatch.undo()


def test_a_file_that_changed_meanwhile_is_not_overwritten(run, file, monkeypatch):
    service, live = run()
    # The watcher has not seen the edit yet.
    monkeypatch.setattr(live, "look", lambda: None)
    edited = replaced(file, "id: hq", "id: hq ")
    file.write_text(edited)
    status, told = call(service.site, "PUT", "/api/v1/cameras/hall", {"transport": "udp"})
    assert status == 409
    assert "was edited meanwhile" in told["reason"]
    assert file.read_text() == edited
    assert service.site.cameras[1].transport == "tcp"


def test_who_has_seen_an_older_version_is_told(run):
    service, live = run()
    site, seen = service.site, live.version
    assert call(site, "PUT", "/api/v1/cameras/hall", {"depth": 3}, if_match=f'"{seen}"')[0] == 200
    assert live.version != seen
    assert call(site, "PUT", "/api/v1/cameras/hall", {"depth": 4}, if_match=f'"{seen}"')[0] == 409
    assert call(site, "DELETE", "/api/v1/cameras/hall", if_match=seen)[0] == 409
    assert service.site.cameras[1].depth == 3


def test_a_file_that_cannot_be_written_is_told_and_nothing_changes(run, file, monkeypatch):
    service, _ = run()

    def read_only(path, text):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("psdiff.runtime.live_site.write_atomically", read_only)
    status, told = call(service.site, "PUT", "/api/v1/cameras/hall", {"depth": 3})
    assert (status, told["reason"]) == (
        500,
        "the file of the site must be writable, got Read-only file system",
    )
    assert service.site.cameras[1].depth is None


@pytest.mark.parametrize(
    ("headers", "status", "path"),
    [
        ({"host": "evil.example"}, 403, "Host"),
        ({"origin": "https://evil.example"}, 403, "Origin"),
        ({"origin": "null"}, 403, "Origin"),
        ({"sec_fetch_site": "cross-site"}, 403, "Sec-Fetch-Site"),
        ({"sec_fetch_site": "same-site"}, 403, "Sec-Fetch-Site"),
        ({"content_type": "text/plain"}, 415, "Content-Type"),
        ({"content_type": "application/x-www-form-urlencoded"}, 415, "Content-Type"),
    ],
)
def test_pages_of_elsewhere_cannot_change_anything(run, file, headers, status, path):
    service, _ = run()
    before = file.read_text()
    got, told = call(service.site, "PUT", "/api/v1/cameras/hall", {"depth": 3}, **headers)
    assert (got, told["path"]) == (status, path)
    if path != "Content-Type":
        assert call(service.site, "DELETE", "/api/v1/cameras/hall", **headers)[0] == status
    assert file.read_text() == before


def test_a_foreign_name_cannot_read_either_and_a_proxy_may_be_named(run, file):
    file.write_text(file.read_text().replace("api: {", "api: {hosts: [Psdiff.Example], "))
    service, _ = run()
    assert call(service.site, "GET", "/api/v1/cameras", host="evil.example")[0] == 403
    assert call(service.site, "GET", "/api/v1/cameras", host="psdiff.example:443")[0] == 200
    change = {"depth": 3}, {"host": "psdiff.example", "origin": "https://psdiff.example"}
    assert call(service.site, "PUT", "/api/v1/cameras/hall", change[0], **change[1])[0] == 200


def test_a_page_of_this_service_may_change_things(run):
    service, _ = run()
    site = service.site
    origin = f"http://{site.api.listen}"
    told = call(
        site, "PUT", "/api/v1/cameras/hall", {"depth": 3}, origin=origin, sec_fetch_site="same-origin"
    )
    assert told[0] == 200


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
