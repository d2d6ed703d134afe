"""Serve H.264 files over RTSP with GStreamer's server: a camera for tests and for trying things out.

    /usr/bin/python3 runtime/soak/rtsp_server.py --port 8554 entrance.mp4 hall=lobby.mp4
    psdiff run rtsp://127.0.0.1:8554/entrance rtsp://127.0.0.1:8554/hall

Each file (MP4 or MOV, H.264) is played in real time from its start to every client, at /<file stem> or /<NAME> of
NAME=FILE. Imports nothing of psdiff; needs
Debian's gir1.2-gst-rtsp-server-1.0, python3-gi, gstreamer1.0-plugins-base, gstreamer1.0-plugins-good and
gstreamer1.0-rtsp; runs with the system's Python, because PyGObject is not in a virtual environment.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

MISSING = 3

ELEMENTS = {
    "filesrc": "libgstreamer1.0-0",
    "qtdemux": "gstreamer1.0-plugins-good",
    "rtph264pay": "gstreamer1.0-plugins-good",
    "videotestsrc": "gstreamer1.0-plugins-base",
}


def main() -> None:
    """Serve until stdin is closed or the process is stopped; prints `ready PORT` when clients may come."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="[NAME=]FILE")
    parser.add_argument("--port", type=int, default=8554, help="0: any free port")
    parser.add_argument(
        "--in-band", action="store_true", help="the files hold their parameter sets before every key frame"
    )
    parser.add_argument("--login", metavar="USER:PASSWORD", help="ask clients for it")
    arguments = parser.parse_args()
    rtsp, glib = gstreamer()
    server = rtsp.RTSPServer.new()
    server.set_address("127.0.0.1")
    server.set_service(str(arguments.port))
    if arguments.login:
        server.set_auth(login_check(rtsp, *arguments.login.split(":", 1)))
    for name, file in map(mount_of, arguments.files):
        server.get_mount_points().add_factory(
            f"/{name}", media_factory(rtsp, file, bool(arguments.login), arguments.in_band)
        )
    loop = glib.MainLoop()
    if server.attach(None) == 0:
        sys.exit(f"port must be free, got {arguments.port}")
    # A test that dies takes its server with it: the pipe closes.
    glib.io_add_watch(sys.stdin.fileno(), glib.IOCondition.HUP, lambda *_: loop.quit())
    print(f"ready {server.get_bound_port()}", flush=True)
    loop.run()


def mount_of(text: str) -> tuple[str, Path]:
    """NAME=FILE, or FILE -> its name and path."""
    name, separator, file = text.partition("=")
    if separator and not Path(text).exists():
        return name, Path(file)
    return Path(text).stem, Path(text)


def gstreamer() -> tuple[ModuleType, ModuleType]:
    """Import GStreamer; exit with MISSING and the package's name where a part is absent."""
    try:
        import gi  # pyright: ignore[reportMissingImports]
    except ImportError:
        quit_without("python3-gi")
    try:
        gi.require_version("Gst", "1.0")
        gi.require_version("GstRtspServer", "1.0")
        from gi.repository import (  # pyright: ignore[reportMissingImports]
            GLib,
            Gst,
            GstRtspServer,
        )
    except (ImportError, ValueError):
        quit_without("gir1.2-gst-rtsp-server-1.0")
    Gst.init(None)
    for element, package in ELEMENTS.items():
        if Gst.ElementFactory.find(element) is None:
            quit_without(package)
    return GstRtspServer, GLib


def quit_without(package: str) -> NoReturn:
    """Say which Debian package is missing."""
    print(f"missing {package}", flush=True)
    sys.exit(MISSING)


def media_factory(rtsp: ModuleType, file: Path, login: bool, in_band: bool) -> object:
    """Play the file without decoding it."""
    # The payloader repeats the sets of the file's head, which are wrong after a change of size.
    interval = 0 if in_band else 1
    factory = rtsp.RTSPMediaFactory.new()
    location = str(file.resolve()).replace('"', '\\"')
    factory.set_launch(
        f'( filesrc location="{location}" ! qtdemux ! rtph264pay name=pay0 pt=96 config-interval={interval} )'
    )
    if login:
        roles = rtsp.RTSPPermissions.new()
        for right in ("media.factory.access", "media.factory.construct"):
            roles.add_permission_for_role("viewer", right, True)
        factory.set_permissions(roles)
    return factory


def login_check(rtsp: ModuleType, user: str, password: str) -> object:
    """Ask for a user and a password (HTTP basic)."""
    auth = rtsp.RTSPAuth.new()
    token = rtsp.RTSPToken.new()
    token.set_string("media.factory.role", "viewer")
    auth.add_basic(rtsp.RTSPAuth.make_basic(user, password), token)
    return auth


if __name__ == "__main__":
    main()
