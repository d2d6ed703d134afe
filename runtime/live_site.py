"""The file of a site while a service runs: what is edited there, or changed through the API, takes effect.

The file is the truth. An edit that is refused leaves the service as it was, and says why until the file is mended.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from watchfiles import watch

from .events import utc_text
from .service import Service
from .site_changes import SiteChange
from .site_errors import SiteError
from .site_file import SECRET, Camera, Site, beside, parse_camera, parse_site
from .site_text import with_camera, without_camera, write_atomically
from .source_address import NETWORK

# An editor may write in pieces, and half a file may be a site with half its cameras: wait until it rests.
SETTLE_S = 0.5
LONGEST_SETTLE_S = 10.0

# Notices get lost on network drives and with files that are mounted one by one: look this often at any rate.
LOOK_S = 5.0

# Events and logs may lie in the same folder: a look for several of their lines.
STEP_MS = 200

logger = logging.getLogger(__name__)


class ConflictError(Exception):
    """The file is another one than its reader knows."""


class UnknownCameraError(Exception):
    """The site has no such camera."""


@dataclass(frozen=True)
class _Fault:
    place: str
    reason: str


@dataclass(frozen=True)
class _Seen:
    """The file as it was read."""

    text: str | None
    problem: str = ""
    """Why there is no text."""


class LiveSite:
    """Keeps a service and the file of its site the same."""

    def __init__(
        self,
        path: Path,
        text: str,
        service: Service,
        learn: Callable[[Site], None] = lambda site: None,
    ) -> None:
        """text: what the service's site was read from. learn: told of a site before its cameras are followed."""
        self._path = path
        self._text = text
        self._service = service
        self._learn = learn
        self._refused: _Seen | None = None
        """What was refused last; None while the file is in effect."""
        self._fault: _Fault | None = None
        self._changed_at = datetime.now(UTC)
        self.errors = 0
        """Edits that were refused."""
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="site file", daemon=True)

    def start(self) -> None:
        """Begin to watch the file."""
        # It tells of every change in the folder: of a log that lies there too, for ever.
        logging.getLogger("watchfiles").setLevel(logging.WARNING)
        self._thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Watch no more; False where a change under way takes longer."""
        self._stopping.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def is_valid(self) -> bool:
        """Whether what stands in the file is in effect."""
        return self._fault is None

    @property
    def version(self) -> str:
        """Of the file in effect; other text, other version."""
        return _version(self._text)

    def status(self) -> dict[str, Any]:
        """What is in effect, and what is wrong with the file."""
        fault = self._fault
        return {
            "file": str(self._path),
            "version": self.version,
            "changed_at": utc_text(self._changed_at),
            "cameras": len(self._service.site.cameras),
            "valid": fault is None,
            "error": None if fault is None else {"path": fault.place, "reason": fault.reason},
        }

    def look(self) -> None:
        """Read the file, and do what it says if it is new."""
        with self._lock:
            seen = self._settled()
            if seen.text == self._text:
                self._accept()
            elif seen != self._refused:
                try:
                    if seen.text is None:
                        raise SiteError(f"must be a file that can be read, got {seen.problem}")
                    self._take(seen.text, parse_site(seen.text, self._path))
                except SiteError as error:
                    self._refuse(seen, _Fault(error.place, error.reason))

    def put_camera(self, name: str, content: Mapping[str, Any], version: str | None = None) -> SiteChange:
        """Add a camera, or change one, in the file and at work.

        content: its keys, as in the file. url may be left out where the camera is known. version: that the caller
        has seen, None for any.
        Raises SiteError (place within the camera), ConflictError, and OSError where the file cannot be written.
        """
        with self._lock:
            self._check_version(version)
            known = next((each for each in self._service.site.cameras if each.id == name), None)
            camera = beside(_checked(name, content, known), self._path)
            explicit = camera.model_dump(mode="json", exclude_unset=True, exclude={"id"})
            if known is not None and "url" not in content:
                del explicit["url"]
            others = [each for each in self._service.site.cameras if each.id != name]
            return self._write(with_camera(self._text, name, explicit), [*others, camera])

    def remove_camera(self, name: str, version: str | None = None) -> SiteChange:
        """Take a camera out of the file, and leave it. Raises UnknownCameraError, and what put_camera raises."""
        with self._lock:
            self._check_version(version)
            others = [each for each in self._service.site.cameras if each.id != name]
            if len(others) == len(self._service.site.cameras):
                raise UnknownCameraError(name)
            return self._write(without_camera(self._text, name), others)

    def _write(self, text: str, wanted: list[Camera]) -> SiteChange:
        """Put a text into the file and into effect; the lock is held."""
        site = parse_site(text, self._path)
        # Two libraries read and write it, which differ in words such as on and yes.
        if sorted(site.cameras, key=_id) != sorted(wanted, key=_id):
            raise SiteError("site must be read as it was written, got another; edit the file")
        self._service.check(site)
        if _read(self._path).text != self._text:
            raise ConflictError(f"{self._path} was edited meanwhile; look at it again")
        write_atomically(self._path, text)
        return self._take(text, site)

    def _take(self, text: str, site: Site) -> SiteChange:
        self._learn(site)
        change = self._service.apply(site)
        self._text, self._changed_at = text, datetime.now(UTC)
        self._accept()
        if change:
            told = (f"{what} {', '.join(ids)}" for what, ids in change.as_dict().items() if ids)
            logger.info("the site changed: %s", "; ".join(told))
        return change

    def _accept(self) -> None:
        if self._fault is not None:
            logger.info("%s is in effect again", self._path)
        self._fault = self._refused = None

    def _refuse(self, seen: _Seen, fault: _Fault) -> None:
        self._refused, self._fault = seen, fault
        self.errors += 1
        logger.error(
            "%s is not in effect, what was before goes on: %s",
            self._path,
            f"{fault.place}: {fault.reason}" if fault.place else fault.reason,
        )

    def _check_version(self, version: str | None) -> None:
        if version is not None and version != self.version:
            raise ConflictError(f"version must be {self.version}, the one in effect, got {version}")

    def _settled(self) -> _Seen:
        """The file once it is the same for SETTLE_S, or as it was seen before."""
        seen, before, end_s = _read(self._path), None, time.monotonic() + LONGEST_SETTLE_S
        while seen not in (before, _Seen(self._text), self._refused) and time.monotonic() < end_s:
            if self._stopping.wait(SETTLE_S):
                break
            seen, before = _read(self._path), seen
        return seen

    def _follow(self) -> None:
        while not self._stopping.is_set():
            try:
                self._watch()
            # The folder went away, or the system watches no more files: looking now and then is enough.
            except (OSError, RuntimeError) as error:
                logger.warning("%s cannot be watched: %s", self._path, error, extra={"err_code": "watch"})
                self._look_safely()
                self._stopping.wait(LOOK_S)

    def _watch(self) -> None:
        # The folder, not the file: editors put a new file in the place of the old one.
        folders = {self._path.absolute().parent, self._path.resolve().parent}
        for _ in watch(
            *folders,
            watch_filter=None,
            recursive=False,
            stop_event=self._stopping,
            step=STEP_MS,
            rust_timeout=round(1000 * LOOK_S),
            yield_on_timeout=True,
            raise_interrupt=False,
        ):
            self._look_safely()

    def _look_safely(self) -> None:
        try:
            self.look()
        # Whatever the file holds, the next edit must be seen.
        except Exception:
            logger.exception("%s could not be looked at", self._path, extra={"err_code": "site_file"})


def _checked(name: str, content: Mapping[str, Any], known: Camera | None) -> Camera:
    if content.get("id", name) != name:
        raise _refusal("id", f"must be {name}, as in the address, got another")
    wanted = content.get("url", known.url if known is not None else None)
    if wanted is None:
        raise _refusal("url", "must be given for a new camera")
    url = content.get("url")
    if isinstance(url, str) and url.partition("://")[0].lower() not in NETWORK:
        known_schemes = ", ".join(f"{scheme}://" for scheme in NETWORK)
        reason = (
            f"must begin with one of {known_schemes}; files and devices are named in the file of the site"
        )
        raise _refusal("url", reason)
    # Who may talk to this port would read the service's files and environment, by sending them to a host of theirs.
    if isinstance(url, str) and SECRET.search(url):
        raise _refusal("url", "secrets must be named in the file of the site, got one here")
    return parse_camera({**content, "id": name, "url": wanted})


def _read(path: Path) -> _Seen:
    try:
        return _Seen(path.read_text(encoding="utf-8"))
    except OSError as error:
        return _Seen(None, str(error.strerror))
    except UnicodeDecodeError:
        return _Seen(None, "other bytes than UTF-8")


def _id(camera: Camera) -> str:
    return camera.id


def _refusal(place: str, reason: str) -> SiteError:
    return SiteError(f"{place} {reason}", place=place, reason=reason)


def _version(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
