"""Cameras for programs: people as they are seen, in this process, in the caller's thread.

    with watch({"gate": "rtsp://10.0.0.11/stream1"}) as results:
        for result in results:
            print(result.frame.camera, result.frame.time.utc_s, result.people.boxes_xyxy)

psdiff serve is the same with processes, events, metrics and a file of settings around it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from ..models.detections import Detections
from ..models.detector import PersonDetector
from .batch_loop import LONGEST_SLEEP_S, BatchLoop, FrameResult
from .camera_feed import CameraFeed, CameraFrame, FeedSettings
from .connection import HostLimit
from .detector import open_detector
from .elastic_steps import CostTable, StepChooser, StepRange
from .frame_queues import WINDOW_S, FrameQueues, QueuePolicy
from .run import frame_seed
from .step_costs import measured_costs

# A camera's thread ends within its read timeout.
END_S = 10.0


@contextmanager
def watch(
    cameras: Mapping[str, str],
    detector: PersonDetector | None = None,
    *,
    steps: StepRange | None = None,
    latency_s: float = 0.5,
    sample_fps: float | None = None,
    max_batch: int = 8,
) -> Iterator[Iterator[FrameResult]]:
    """Follow cameras; within the block, an iterator that waits for the next frame that was looked at, and never ends.

    cameras: name -> URL. detector: default the shipped bundle. steps: how many are allowed, default 1 to 4; chosen
    for each batch by the time that is left of latency_s, counted from capture. Frames that cannot keep it are
    dropped. sample_fps: frames a second and camera that are looked at; None for all.
    Cameras that are away are waited for. Raises ValueError on a bad argument, SourceError for a URL that is none.
    """
    detector = detector or open_detector()
    allowed = steps or StepRange()
    queues: FrameQueues[CameraFrame] = FrameQueues(max_batch, WINDOW_S)
    costs = CostTable(measured_costs(detector, allowed, max_batch))
    results: deque[FrameResult] = deque()
    loop = BatchLoop(queues, _detect_by(detector), StepChooser(costs, allowed), results.append)

    def take_in(frame: CameraFrame, now_s: float, deadline_s: float) -> str | None:
        is_in = queues.offer(frame.camera, frame, now_s=now_s, deadline_s=deadline_s)
        return None if is_in else "removed"

    limit = HostLimit()
    feeds = [
        CameraFeed(FeedSettings(camera, url, latency_s, sample_fps), take_in, limit)
        for camera, url in cameras.items()
    ]
    try:
        for feed in feeds:
            queues.add(feed.camera, QueuePolicy(), time.monotonic())
            feed.start()
        yield _results(loop, queues, results)
    finally:
        for feed in feeds:
            feed.stop()
        for feed in feeds:
            feed.join(END_S)


def _detect_by(detector: PersonDetector):  # noqa: ANN202 - a Detect
    def detect(frames: Sequence[CameraFrame], steps: int) -> list[Detections]:
        seeds = [frame_seed(frame.camera, frame.seq) for frame in frames]
        return detector.detect([frame.image for frame in frames], steps, seeds)

    return detect


def _results(
    loop: BatchLoop, queues: FrameQueues[CameraFrame], results: deque[FrameResult]
) -> Iterator[FrameResult]:
    while True:
        idle_s = loop.work(time.monotonic())
        while results:
            yield results.popleft()
        if idle_s > 0:
            queues.wait(min(idle_s, LONGEST_SLEEP_S))
