"""What a camera may be, and what is refused before anything is opened."""

import socket
from pathlib import Path

import pytest
from psdiff.runtime.containers import CameraError, open_camera
from psdiff.runtime.frames import SourceError
from psdiff.runtime.source_address import parse_address, refuse_host


@pytest.mark.parametrize(
    ("text", "kind", "url", "shown"),
    [
        ("rtsp://u:p@cam:554/s1", "rtsp", "rtsp://u:p@cam:554/s1", "rtsp://cam:554/s1"),
        ("rtsps://cam/s1", "rtsp", "rtsps://cam/s1", "rtsps://cam/s1"),
        (
            "http://cam/video.mjpg?user=a&pwd=b",
            "http",
            "http://cam/video.mjpg?user=a&pwd=b",
            "http://cam/video.mjpg",
        ),
        ("https://cam/a.mp4?sig=c0ffee", "http", "https://cam/a.mp4?sig=c0ffee", "https://cam/a.mp4"),
        ("rtsp://nvr/s?channel=2", "rtsp", "rtsp://nvr/s?channel=2", "rtsp://nvr/s?channel=2"),
        ("HTTPS://cam/live.m3u8", "http", "HTTPS://cam/live.m3u8", "https://cam/live.m3u8"),
        ("http://127.0.0.1:1984/go", "http", "http://127.0.0.1:1984/go", "http://127.0.0.1:1984/go"),
        ("v4l2:///dev/video0", "v4l2", "/dev/video0", "v4l2:///dev/video0"),
        ("v4l2:///dev/v4l/by-id/usb-Cam_1-index0", "v4l2", "/dev/v4l/by-id/usb-Cam_1-index0", None),
        ("file:///clips/front%20gate.mp4", "path", "file:/clips/front gate.mp4", "/clips/front gate.mp4"),
        ("/clips/a.mp4", "path", "file:/clips/a.mp4", "/clips/a.mp4"),
        ("clips/a.mp4", "path", "file:/site/clips/a.mp4", "/site/clips/a.mp4"),
        ("./cam:1.mp4", "path", "file:/site/cam:1.mp4", "/site/cam:1.mp4"),
    ],
)
def test_what_a_camera_may_be(text, kind, url, shown):
    address = parse_address(text, Path("/site"))
    assert (address.kind, address.url, address.shown) == (kind, url, shown or text)


@pytest.mark.parametrize(
    "text",
    [
        "concat:/etc/passwd|/etc/group",
        "subfile:,,start,0,end,9,,:/etc/passwd",
        "data:video/mp4;base64,AAAA",
        "ftp://u:hunter2@host/a.mp4",
        "tcp://hunter2:80",
        "udp://@239.0.0.1:5000",
        "file://host/hunter2.mp4",
        "v4l2:///etc/passwd",
        "v4l2:///dev/../etc/passwd",
        "v4l2:///dev/v4l/by-id/../../../etc/passwd",
        "rtsp://",
        "http:///x",
        "rtsp://u:hunter2@h:port/",
    ],
)
def test_what_is_not_on_the_list_is_refused_and_not_shown(text):
    with pytest.raises(SourceError, match=r"source must be rtsp://.* got a URL") as caught:
        parse_address(text)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.3.4",
        "[fe80::1]",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "100.100.100.200",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "rtsp"])
def test_link_local_and_metadata_addresses_are_refused_with_the_reason(scheme, host):
    with pytest.raises(SourceError, match=r"must not be a link-local or metadata address.*credentials"):
        parse_address(f"{scheme}://u:p@{host}:80/latest/meta-data")


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "10.1.2.3", "192.168.1.5", "cam.example"]
)
def test_loopback_and_private_addresses_are_cameras(host):
    assert parse_address(f"rtsp://{host}/s1").kind == "rtsp"


def test_a_name_or_a_number_that_stands_for_such_an_address_is_refused_when_it_is_opened():
    # 169.254.169.254 as one number, which resolvers take.
    address = parse_address("http://2852039166/latest")
    with pytest.raises(SourceError, match="link-local or metadata address, got 169"):
        open_camera(address, 1.0, 1.0)


def test_a_name_that_nobody_knows_is_left_to_who_opens_it():
    refuse_host("no-such-host.invalid")
    with pytest.raises(CameraError):
        open_camera(parse_address("http://no-such-host.invalid/"), 2.0, 2.0)


def test_a_device_that_is_not_there_is_an_error_of_one_line():
    with pytest.raises(CameraError, match="'no such file or directory' from v4l2:///dev/video97"):
        open_camera(parse_address("v4l2:///dev/video97"), 1.0, 1.0)


def test_a_resolver_finds_loopback_harmless():
    assert socket.getaddrinfo("localhost", None)
    refuse_host("localhost")
