"""A site in a file, its service with API, and how tests talk to it."""

import json
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

from psdiff.runtime.elastic_steps import CostTable
from psdiff.runtime.live_site import LiveSite
from psdiff.runtime.service import Service
from psdiff.runtime.service_api import HttpServer
from psdiff.runtime.site_file import load_site
from triton_server import free_ports

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


def write_site(folder):
    """The file of SITE in a folder of its own."""
    path = folder / "etc" / "site.yaml"
    path.parent.mkdir()
    path.write_text(SITE.format(data=folder / "data", port=free_ports(1)[0]))
    return path


@contextmanager
def running(file, manifest, detector):
    """A service over a file, with its API; gives service and LiveSite."""
    service = Service(load_site(file), manifest, detector, TABLE)
    live = LiveSite(file, file.read_text(), service)
    http = HttpServer(service, service.site.api.listen, live)
    http.start()
    service.start()
    live.start()
    try:
        yield service, live
    finally:
        live.stop(0)
        has_ended = service.stop(10), live.stop(5)
        http.stop()
    assert has_ended == (True, True)


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
