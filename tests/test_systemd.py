"""sd_notify over a real socket, and the unit in deploy/."""

import configparser
import os
import shutil
import socket
import subprocess
from pathlib import Path

import psdiff
import pytest
from psdiff.runtime.systemd import ServiceNotifier

UNIT = Path(psdiff.__file__).resolve().parent / "deploy" / "systemd" / "psdiff.service"


@pytest.fixture
def systemd(tmp_path):
    """The socket of systemd: its address, and what it is told next."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(10)
        yield str(tmp_path / "notify"), lambda: listening.recv(100).decode()


def test_systemd_hears_of_start_life_and_end(systemd):
    address, next_word = systemd
    notifier = ServiceNotifier(lambda: True, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "40000"})
    notifier.ready()
    assert next_word() == "READY=1"
    assert next_word() == "WATCHDOG=1"
    assert next_word() == "WATCHDOG=1"
    notifier.stopping()
    words = [next_word()]
    while words[-1] == "WATCHDOG=1":
        words.append(next_word())
    assert words[-1] == "STOPPING=1"
    notifier.close()


def test_a_service_that_is_not_well_gives_no_sign_of_life(systemd):
    address, next_word = systemd
    asked = []

    def is_well():
        asked.append(len(asked))
        return len(asked) % 3 == 0

    notifier = ServiceNotifier(is_well, {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "20000"})
    notifier.ready()
    assert [next_word(), next_word()] == ["READY=1", "WATCHDOG=1"]
    assert len(asked) >= 3
    notifier.close()


def test_an_abstract_socket_is_reached():
    name = f"psdiff-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0{name}")
        listening.settimeout(10)
        ServiceNotifier(lambda: True, {"NOTIFY_SOCKET": f"@{name}"}).ready()
        assert listening.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environment", [{}, {"NOTIFY_SOCKET": "/nowhere/notify"}, {"WATCHDOG_USEC": "1000"}], ids=str
)
def test_without_systemd_nothing_happens(environment):
    notifier = ServiceNotifier(lambda: True, environment)
    notifier.ready()
    notifier.stopping()
    notifier.close()


def unit():
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def test_the_unit_is_valid(tmp_path):
    """systemd-analyze wants programs that exist."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = UNIT.read_text().replace("/opt/psdiff/bin/psdiff", "/bin/true")
    path = tmp_path / "psdiff.service"
    path.write_text(text)
    result = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "psdiff" not in result.stderr


def test_the_unit_waits_for_the_end_that_the_service_takes():
    from psdiff.commands.serve import DRAIN_S

    service = unit()["Service"]
    assert service["Type"] == "notify"
    assert int(service["TimeoutStopSec"]) > DRAIN_S
    assert int(service["WatchdogSec"]) >= 30
    assert service["Restart"] == "on-failure"
    assert "serve -c /etc/psdiff/site.yaml" in service["ExecStart"]


def test_the_unit_may_write_what_the_service_writes_and_nothing_else():
    service = unit()["Service"]
    assert service["ProtectSystem"] == "strict"
    assert service["StateDirectory"] == "psdiff"
    assert service["ConfigurationDirectory"] == "psdiff"
    # The API writes the file of the site.
    assert "/etc/psdiff" in service["ReadWritePaths"]
    assert service["NoNewPrivileges"] == "yes"
    # sd_notify is a Unix socket, cameras and the API are on the network.
    assert set(service["RestrictAddressFamilies"].split()) == {"AF_UNIX", "AF_INET", "AF_INET6"}
