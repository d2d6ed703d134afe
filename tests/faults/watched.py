"""The fixture of all tests here: a service over real RTSP servers and the proxy, which ends with its test."""

import logging
import random

import pytest
from psdiff.runtime.soak import clips, fault_list
from psdiff.runtime.soak.servers import ServerMissingError
from psdiff.runtime.soak.watched_service import WatchedService

PLAIN = ("gate", "hall")


FILMS = {}


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Clips of one and a half minutes, written once, whichever module asks first."""
    if not FILMS:
        folder = tmp_path_factory.mktemp("films")
        plain = clips.write_clip(folder / "plain.mp4", seconds=10, repeat=9)
        sizes = ((640, 360), (320, 180))
        FILMS.update(dict.fromkeys(PLAIN, plain))
        FILMS["resizes"] = clips.write_clip(folder / "resizes.mp4", seconds=1, sizes=sizes, repeat=45)
        FILMS["long_groups"] = clips.write_clip(
            folder / "long.mp4", seconds=6, group=30, b_frames=3, repeat=15
        )
    return FILMS


@pytest.fixture
def watch(films, tmp_path, caplog):
    """Start a service over some cameras; at its end every frame is accounted for and no time went back.

    Its cameras are threads, which start soonest.
    """
    started = []
    # What the faults make the service say is no news here.
    caplog.set_level(logging.CRITICAL, "psdiff")

    def start(*names, wait=True, isolation="thread", **options):
        wanted = {name: films[name] for name in names or PLAIN}
        changes = {"ingest": {"isolation": isolation, "workers": 2}}
        try:
            site = WatchedService(tmp_path / "data", wanted, changes=changes, **options)
        except ServerMissingError as error:
            pytest.skip(str(error))
        started.append(site)
        if wait:
            site.wait_for_frames([name for name in site.proxies if name not in options.get("away", ())], 20)
        return site

    yield start
    for site in started:
        assert site.close()
        assert site.unaccounted() == 0
        assert not site.backwards


def survives(number, site, seed=0):
    """Cause a fault as the soak does; skips where it cannot be had."""
    fault = fault_list.fault(number)
    missing = fault.missing(site)
    if missing:
        pytest.skip(missing)
    return fault.run(site, random.Random(seed))
