"""A service over cameras of our own, each behind a proxy, and everything that its detector's thread gave out."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...bundle import Manifest
from ...models.detector import PersonDetector
from ..batch_loop import FrameResult
from ..elastic_steps import CostTable
from ..service import Service
from ..site_file import Site
from .clips import is_in_place
from .servers import RtspServer
from .stub_detector import StubDetector, stub_manifest
from .tcp_proxy import TcpProxy

# Of each camera so many results are remembered.
REMEMBERED = 1500

# A camera that nothing happens to gives at least this share of its frames; a busy machine costs some.
UNDISTURBED_SHARE = 0.5

POLL_S = 0.02

# Cameras that some faults need: one changes its size, one has B-frames and key frames five seconds apart.
SPECIAL = ("resizes", "long_groups")


class FaultError(Exception):
    """The service did not do what it must; the text says what."""


@dataclass(frozen=True)
class Seen:
    """One frame that the detector is done with."""

    at_s: float
    """When it was done, of the monotonic clock."""
    seq: int
    connection: int
    """Counted up, from 1 again where the camera's settings change."""
    utc_s: float
    source: str
    uncertainty_s: float
    size: tuple[int, int]
    """width, height"""
    people: int
    """Found where a person can be."""
    misplaced: int
    """Found elsewhere."""
    steps: int
    batch: int
    queue_s: float
    since_arrival_s: float
    since_capture_s: float
    late_s: float


class WatchedService:
    """A site that runs until it is closed."""

    def __init__(
        self,
        folder: Path,
        clips: Mapping[str, Path],
        *,
        fps: float = 10,
        away: Collection[str] = (),
        model: tuple[Manifest, PersonDetector, CostTable | Callable[[Site], CostTable]] | None = None,
        changes: Mapping[str, Any] | None = None,
        proxied: bool = True,
    ) -> None:
        """folder: for events. clips: camera -> what it plays. away: cameras that are not there at first.

        model: a real one; by default a stub. changes: keys of the site. proxied: False leads
        cameras past their proxies, which then cost nothing. Raises ServerMissingError.
        """
        self.fps = fps
        self.folder = folder
        self.stub = StubDetector(0.002, 0.004)
        self.server = RtspServer(clips)
        self.proxies = {name: TcpProxy(self.server.port) for name in clips}
        for name in away:
            self.proxies[name].refuse()
        self._proxied = proxied
        self.backwards: Counter[str] = Counter()
        """Frames whose time was not after that of the frame before, by camera."""
        self._lock = threading.Lock()
        self._seen: dict[str, deque[Seen]] = {name: deque(maxlen=REMEMBERED) for name in clips}
        self._last_utc_s: dict[str, float] = {}
        self._times_may_go_back = False
        self.site = Site.model_validate(self.content() | dict(changes or {}))
        manifest, detector, table = model or (stub_manifest(), self.stub, self.stub.table())
        table = table if isinstance(table, CostTable) else table(self.site)
        self.service = Service(self.site, manifest, detector, table)
        observe_results(self.service, self._see)
        self.service.start()

    @property
    def plain(self) -> list[str]:
        """Cameras of which nothing is special: those that faults happen to."""
        return [name for name in self.proxies if name not in SPECIAL]

    def content(self) -> dict[str, Any]:
        """The site file."""
        return {
            "site": {"id": "soak", "data_dir": str(self.folder)},
            "promise": {"latency_ms": 500, "steps": {"min": 1, "max": 4}, "min_fps": 1},
            "cameras": [{"id": name, "url": self.url(name)} for name in self.proxies],
        }

    def url(self, name: str) -> str:
        """Where a camera is."""
        port = self.proxies[name].port if self._proxied else self.server.port
        return f"rtsp://127.0.0.1:{port}/{name}"

    def camera(self, name: str) -> dict[str, Any]:
        """Its state and account."""
        return next(each for each in self.service.cameras() if each["camera"] == name)

    def seen(self, name: str, since_s: float = 0.0, *, connection: int = 0) -> list[Seen]:
        """What was seen of a camera since then, over this or a later connection."""
        with self._lock:
            return [
                each for each in self._seen[name] if each.at_s >= since_s and each.connection >= connection
            ]

    def next_connection(self, name: str) -> int:
        """The one after that whose frames are seen. Some of these are on their way when it has ended."""
        return self.seen(name)[-1].connection + 1

    @contextmanager
    def times_may_go_back(self) -> Iterator[None]:
        """Within the block our own clock is set."""
        self._times_may_go_back = True
        try:
            yield
        finally:
            with self._lock:
                self._last_utc_s.clear()
                self._times_may_go_back = False

    def wait(self, condition: Callable[[], object], within_s: float, what: str) -> float:
        """Seconds until it holds. Raises FaultError with `what` where it does not in time."""
        began_s = time.monotonic()
        while not condition():
            if time.monotonic() - began_s > within_s:
                raise FaultError(f"{what} within {within_s:g} s")
            time.sleep(POLL_S)
        return time.monotonic() - began_s

    def wait_for_frames(
        self, names: Iterable[str], within_s: float, count: int = 3, *, connection: int = 0
    ) -> float:
        """Seconds until each of the cameras has given so many frames from now on, over this connection or a later."""
        since_s, missing = time.monotonic(), set(names)

        def is_done() -> bool:
            came = [n for n in missing if len(self.seen(n, since_s, connection=connection)) >= count]
            missing.difference_update(came)
            return not missing

        try:
            return self.wait(is_done, within_s, "")
        except FaultError:
            raise FaultError(
                f"frames of {', '.join(sorted(missing))} must come within {within_s:g} s"
            ) from None

    def streaming(self) -> list[str]:
        """The cameras that stream."""
        return [each["camera"] for each in self.service.cameras() if each["state"] == "streaming"]

    @contextmanager
    def others_undisturbed(self, *touched: str) -> Iterator[None]:
        """Within the block the other cameras, as far as they stream, go on, and the service is ready."""
        names, began_s = [name for name in self.streaming() if name not in touched], time.monotonic()
        yield
        lasted_s = time.monotonic() - began_s
        # What was seen at the end belongs to frames that were offered a little earlier.
        wanted = UNDISTURBED_SHARE * self.fps * max(0.0, lasted_s - 1.0)
        for name in names:
            found = len(self.seen(name, began_s))
            if found < wanted:
                raise FaultError(f"{name} must go on, got {found} frames in {lasted_s:.1f} s")
        if not self.service.is_ready:
            raise FaultError("the service must stay ready, got that it is not")

    def unaccounted(self) -> int:
        """Frames that were decoded and are neither offered nor skipped, or offered and not told what became of.

        Exact after close; before, frames on their way count.
        """
        total = 0
        for each in self.service.cameras():
            if "decoded" in each:
                total += abs(each["decoded"] - each["offered"] - sum(each["skipped"].values()))
                after = each["computed"] + sum(each["dropped"].values()) + each["waiting"]
                total += abs(each["offered"] - after)
        return total

    def close(self, timeout_s: float = 10.0) -> bool:
        """Stop everything; False where the service did not end in time."""
        ended = self.service.stop(timeout_s)
        for proxy in self.proxies.values():
            proxy.close()
        self.server.kill()
        return ended

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _see(self, result: FrameResult) -> None:
        frame, now_s = result.frame, time.monotonic()
        height, width = frame.image.shape[:2]
        placed = [is_in_place(tuple(box), width, height) for box in result.people.boxes_xyxy.tolist()]
        with self._lock:
            if not self._times_may_go_back and frame.time.utc_s <= self._last_utc_s.get(frame.camera, 0.0):
                self.backwards[frame.camera] += 1
            self._last_utc_s[frame.camera] = frame.time.utc_s
            self._seen[frame.camera].append(
                Seen(
                    at_s=now_s,
                    seq=frame.seq,
                    connection=frame.connection,
                    utc_s=frame.time.utc_s,
                    source=frame.time.source,
                    uncertainty_s=frame.time.uncertainty_s,
                    size=(width, height),
                    people=sum(placed),
                    misplaced=len(placed) - sum(placed),
                    steps=result.steps,
                    batch=result.batch,
                    queue_s=result.queue_s,
                    since_arrival_s=result.queue_s + result.infer_s,
                    since_capture_s=time.time() - frame.time.utc_s,
                    late_s=result.late_s,
                )
            )


def observe_results(service: Service, see: Callable[[FrameResult], None]) -> None:
    """Have `see` called after each frame is done, by the detector's thread; before the service starts."""
    loop = service._loop
    publish = loop._on_result

    def both(result: FrameResult) -> None:
        publish(result)
        see(result)

    loop._on_result = both
