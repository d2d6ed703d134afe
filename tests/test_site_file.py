"""The file of a site: strict, helpful, and tight-lipped about secrets."""

import json
from pathlib import Path

import psdiff
import pytest
import yaml
from psdiff.__main__ import app
from psdiff.runtime.elastic_steps import StepRange
from psdiff.runtime.frame_queues import QueuePolicy
from psdiff.runtime.playback import Playback
from psdiff.runtime.site_errors import SiteError
from psdiff.runtime.site_file import Camera, Site, load_site, resolved_url, shown
from typer.testing import CliRunner

EXAMPLE = """
version: 1
site: {id: hq, data_dir: /var/lib/psdiff}
model: {backend: openvino, max_batch: 4}
promise: {latency_ms: 250, steps: {min: 1, max: 2}, min_fps: 2}
defaults: {queue: bounded, max_staleness_ms: 400, sample_fps: 5}
cameras:
  - {id: gate-1, url: "rtsp://${GATE_USER}:${GATE_PASS}@10.0.0.11/s1"}
  - {id: hall, url: "rtsp://admin:topsecret@10.0.0.12/s1", queue: freshest, trust_clock: never}
  - {id: old, url: "rtsp://10.0.0.13/s1", queue: every_frame, depth: 2, enabled: false}
"""


@pytest.fixture
def write(tmp_path):
    def to(text):
        path = tmp_path / "site.yaml"
        path.write_text(text)
        return path

    return to


def test_a_site_is_read_with_its_defaults(write):
    site = load_site(write(EXAMPLE))
    assert (site.site.id, site.model.backend, site.model.max_batch) == ("hq", "openvino", 4)
    assert site.promise.steps.range() == StepRange(1, 2)
    gate, hall, old = site.cameras
    assert site.queue_policy(gate) == QueuePolicy("bounded", 8, 0.4, 2)
    assert site.queue_policy(hall) == QueuePolicy("freshest", 8, 0.4, 2)
    assert site.queue_policy(old) == QueuePolicy("every_frame", 2, 0.4, 2)
    assert (site.settings(gate).trust_clock, site.settings(hall).trust_clock) == ("auto", "never")
    assert site.settings(hall).sample_fps == 5
    assert site.api.listen == "127.0.0.1:8420"


def test_an_empty_site_is_a_site(write):
    assert load_site(write("version: 1\n")) == Site()


def test_a_warm_start_is_wanted_camera_by_camera_and_off_by_default(write):
    cameras = "cameras: [{id: a, url: 'rtsp://x', warm_start: true}, {id: b, url: 'rtsp://y'}]"
    site = load_site(write(cameras))
    assert [site.settings(camera).warm_start for camera in site.cameras] == [True, False]
    site = load_site(write(f"defaults: {{warm_start: true}}\n{cameras}"))
    assert [site.settings(camera).warm_start for camera in site.cameras] == [True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "cameras: [{id: a, url: 'rtsp://x', ulr: x}]",
            r"cameras\[0\]\.ulr must be a known key; did you mean url\?",
        ),
        ("promis: {}", r"promis must be a known key; did you mean promise\?"),
        ("promise: {latency: 5}", r"promise\.latency must be a known key; did you mean latency_ms\?"),
        ("promise: {steps: {mim: 5}}", r"promise\.steps\.mim must be a known key; did you mean min\?"),
        ("promise: {steps: {min: 5, max: 2}}", r"promise\.steps: min must be <= max, got 5 and 2"),
        ("promise: {latency_ms: -1}", r"promise\.latency_ms: Input should be greater than 0, got -1"),
        (
            "model: {backend: openvin}",
            r"model\.backend: must be one of .*; did you mean openvino\?, got 'openvin'",
        ),
        ("cameras: [{id: a b, url: 'rtsp://x'}]", r"cameras\[0\]\.id: String should match pattern"),
        (
            "cameras: [{id: a, url: 'rtsp://x'}, {id: a, url: 'rtsp://y'}]",
            "cameras must have different ids, got a more than once",
        ),
        (
            "cameras: [{id: a, url: 'concat:a.mp4|b.mp4'}]",
            r"cameras\[0\]\.url: must be rtsp://.* got a URL concat:\.\.\.; a file of that name is \./concat:",
        ),
        (
            "cameras: [{id: a, url: 'http://169.254.169.254/'}]",
            r"cameras\[0\]\.url: must not be a link-local or metadata address, got 169\.254\.169\.254",
        ),
        (
            "cameras: [{id: a, url: 'a.mp4', pace: fast}]",
            r"cameras\[0\]\.pace: Input should be 'real_time' or",
        ),
        (
            "defaults: {decoder: gpu}",
            r"defaults\.decoder: Input should be 'auto', 'cpu', 'pynvvideocodec', 'nvv4l2', 'cuda' or 'vaapi'",
        ),
        ("api: {listen: here}", r"api\.listen: String should match pattern"),
        ("site: {id: '${NAME}'}", r"site\.id: secrets must stand in the url of a camera, got one here"),
        (
            "api: {listen: '0.0.0.0:80'}",
            r"api\.listen: must be an address of this machine .*, got '0.0.0.0:80'",
        ),
        (
            "model: {backend: triton}\ndefaults: {warm_start: true}",
            "warm_start must be false with backend triton, got true for defaults",
        ),
        (
            "model: {backend: triton}\ncameras: [{id: a, url: 'rtsp://x', warm_start: true}]",
            "warm_start must be false with backend triton, got true for a",
        ),
        ("version: 2", "version: Input should be 1, got 2"),
        ("- a", "must hold keys and values, got list"),
        ("a: [", "must be YAML, got"),
    ],
)
def test_a_mistake_is_named_with_its_place(write, text, message):
    with pytest.raises(SiteError, match=message) as caught:
        load_site(write(text))
    assert str(caught.value).startswith(str(write(text)))


def test_a_relative_path_begins_at_the_file_of_the_site(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    text = "cameras: [{id: a, url: clips/a.mp4}, {id: b, url: /clips}, {id: c, url: 'file:///clips/c.mp4'}]"
    site = load_site(write(text))
    assert [camera.url for camera in site.cameras] == [
        str(tmp_path / "clips/a.mp4"),
        "/clips",
        "file:///clips/c.mp4",
    ]
    assert shown(site)["cameras"][0]["url"] == str(tmp_path / "clips/a.mp4")


def test_how_a_camera_is_played(write):
    site = load_site(
        write(
            "defaults: {decoder: cpu, image_fps: 2}\n"
            "cameras: [{id: a, url: a.mp4, pace: flat_out, loop: true}, "
            "{id: b, url: 'rtsp://b', pace: flat_out, transport: udp, decoder: cuda}]"
        )
    )
    file, live = site.cameras
    assert site.playback(file) == Playback("flat_out", True, 2.0, "cpu", "tcp")
    assert site.playback(live) == Playback("flat_out", False, 2.0, "cuda", "udp")
    # Whoever plays flat out waits for the detector; a live camera cannot.
    assert site.queue_policy(file).mode == "every_frame"
    assert site.queue_policy(live).mode == "bounded"


def test_a_secret_may_stand_anywhere_and_what_comes_out_is_looked_at(write):
    site = load_site(write("cameras: [{id: a, url: 'rtsp://${HOST}:${PORT}/${PATH_}'}]"))
    [camera] = site.cameras
    assert resolved_url(camera, {"HOST": "cam", "PORT": "554", "PATH_": "s1"}) == "rtsp://cam:554/s1"
    with pytest.raises(
        SiteError, match=r"url of camera a must be rtsp://.* got a URL rtsp://\.\.\."
    ) as caught:
        resolved_url(camera, {"HOST": "cam", "PORT": "topsecret", "PATH_": "s1"})
    assert "topsecret" not in str(caught.value)
    with pytest.raises(SiteError, match="url of camera a must not be a link-local or metadata address"):
        resolved_url(camera, {"HOST": "169.254.169.254", "PORT": "80", "PATH_": "s1"})


def test_a_file_that_is_not_there_is_an_error_of_one_line(tmp_path):
    with pytest.raises(SiteError, match=r"site must be a YAML file, got .*none.yaml"):
        load_site(tmp_path / "none.yaml")


def test_secrets_come_from_the_environment_or_a_file_and_cannot_break_the_url(tmp_path):
    secret = tmp_path / "password"
    secret.write_text("p@ss/w:rd\n")
    camera = Camera(id="a", url=f"rtsp://${{USER}}:${{file:{secret}}}@host/s1")
    assert resolved_url(camera, {"USER": "ad min"}) == "rtsp://ad%20min:p%40ss%2Fw%3Ard@host/s1"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("rtsp://${NOBODY}@host", "environment must hold NOBODY for camera a, got no such variable"),
        ("rtsp://${file:/none}@host", "secret of camera a must be a text file, got .*No such file"),
    ],
)
def test_a_secret_that_is_missing_is_named(url, message):
    with pytest.raises(SiteError, match=message):
        resolved_url(Camera(id="a", url=url), {})


def test_a_wrong_camera_does_not_give_its_url_away(write):
    with pytest.raises(SiteError) as caught:
        load_site(write("cameras: [{id: a, url: ['rtsp://admin:topsecret@host']}]"))
    assert "topsecret" not in str(caught.value)


def test_what_is_shown_holds_no_login(write):
    text = yaml.safe_dump(shown(load_site(write(EXAMPLE))))
    assert "topsecret" not in text
    assert "admin" not in text
    assert "GATE_PASS" not in text
    assert "rtsp://10.0.0.12/s1" in text
    assert "max_staleness_ms: 400.0" in text


def run(*arguments):
    return CliRunner().invoke(app, ["config", *map(str, arguments)])


def test_the_command_checks_secrets_too(write, monkeypatch):
    path = write(EXAMPLE)
    monkeypatch.delenv("GATE_PASS", raising=False)
    monkeypatch.setenv("GATE_USER", "x")
    result = run("check", path)
    assert result.exit_code == 2
    assert "environment must hold GATE_PASS for camera gate-1" in result.stderr
    monkeypatch.setenv("GATE_PASS", "y")
    result = run("check", path)
    assert result.exit_code == 0, result.output
    assert "is a site with 3 cameras, 2 of them enabled" in result.output


def test_what_show_prints_is_a_site_again(write, tmp_path):
    result = run("show", write(EXAMPLE))
    assert result.exit_code == 0
    again = load_site(write(result.stdout))
    assert again.promise == load_site(write(EXAMPLE)).promise


def test_the_published_schema_is_the_one_of_the_code():
    path = Path(psdiff.__file__).parent / "docs" / "site.schema.json"
    published = json.loads(path.read_text())
    assert published == Site.model_json_schema(), f"run psdiff config schema > {path}"


def test_the_schema_is_that_of_the_file():
    schema = json.loads(run("schema").stdout)
    assert set(schema["properties"]) == set(Site.model_fields)
    assert schema["additionalProperties"] is False
