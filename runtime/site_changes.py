"""What differs between two sites: cameras that come, go or change, and keys that hold until the next start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .frame_queues import QueuePolicy
from .playback import Playback
from .site_errors import SiteError
from .site_file import CameraDefaults, Site, resolved_url

# What may change while a service runs. Everything else was read by parts that were built from it.
LIVE = frozenset({"cameras", "defaults"})


@dataclass(frozen=True)
class WantedCamera:
    """A camera that is to be followed, and all that its feed depends on."""

    id: str
    url: str = field(repr=False)
    """With its secrets."""
    settings: CameraDefaults
    policy: QueuePolicy
    playback: Playback


@dataclass(frozen=True)
class SiteChange:
    """What became of the cameras of a site, by id."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def as_dict(self) -> dict[str, list[str]]:
        """For JSON."""
        return {name: list(ids) for name, ids in asdict(self).items()}


def wanted_cameras(site: Site) -> dict[str, WantedCamera]:
    """The enabled cameras by id. Raises SiteError where a secret is not there."""
    wanted = {}
    for i, camera in enumerate(site.cameras):
        if not camera.enabled:
            continue
        try:
            url = resolved_url(camera)
        except SiteError as error:
            raise SiteError(str(error), place=f"cameras[{i}].url") from None
        wanted[camera.id] = WantedCamera(
            camera.id, url, site.settings(camera), site.queue_policy(camera), site.playback(camera)
        )
    return wanted


def change_between(old: Site, new: Site, running: Mapping[str, WantedCamera]) -> SiteChange:
    """What a service that runs the cameras `running` of `old` has to do for `new`.

    A camera that is switched on or off is changed, not added or removed. Raises SiteError where another key than
    those of LIVE differs, or a secret is not there.
    """
    _check_live(old, new)
    wanted = wanted_cameras(new)
    before, after = ({camera.id for camera in site.cameras} for site in (old, new))
    order = [camera.id for camera in new.cameras]
    return SiteChange(
        added=tuple(name for name in order if name not in before),
        removed=tuple(camera.id for camera in old.cameras if camera.id not in after),
        changed=tuple(name for name in order if name in before and running.get(name) != wanted.get(name)),
    )


def _check_live(old: Site, new: Site) -> None:
    was, wanted = (site.model_dump(mode="json", exclude=set(LIVE)) for site in (old, new))
    for place, before, after in _differences(was, wanted):
        reason = f"must stay {before!r} while the service runs, got {after!r}; restart the service"
        raise SiteError(f"{place} {reason}", place=place, reason=reason)


def _differences(old: object, new: object, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(place, old value, new value) of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            yield from _differences(old.get(name), new.get(name), f"{place}.{name}" if place else name)
    elif old != new:
        yield place, old, new
