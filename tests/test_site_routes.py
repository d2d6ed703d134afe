"""Cameras by API: what is written, what is told, and who may not."""

import json
import stat
from contextlib import ExitStack

import pytest
from psdiff.runtime.site_file import load_site

pytest.importorskip("fastapi", reason="fastapi is not installed")
pytest.importorskip("watchfiles", reason="watchfiles is not installed")
pytest.importorskip("ruamel.yaml", reason="ruamel.yaml is not installed")
from running_site import NOWHERE, call, names, replaced, running, write_site


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
        ("yard", {"url": "file:///etc/passwd"}, 422, "url", "must begin with one of rtsp://"),
        ("yard", {"url": "clips/a.mp4"}, 422, "url", "files and devices are named in the file of the site"),
        ("yard", {"url": "v4l2:///dev/video0"}, 422, "url", "files and devices are named in the file"),
        ("yard", {"url": "http://169.254.169.254/x"}, 422, "url", "link-local or metadata address"),
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
