"""The pipeline of psdiff run: a frame of each source -> one batch -> detections -> events, hits, videos."""

from __future__ import annotations

import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..bundle import Manifest
from ..models.detections import Detections
from ..models.detector import PersonDetector
from .drawing import VideoWriter, contact_sheet, draw_detections, save_png
from .events import (
    BestHit,
    Compute,
    DetectedPerson,
    EventWriter,
    Match,
    RunSummary,
    SourceSummary,
    Status,
    detection_event,
    model_record,
)
from .frames import Source, SourceError, VideoFrame
from .query import BestHits, Hit, Query, as_box, crop_person

EVENTS, SUMMARY, HITS = "events.jsonl", "summary.json", "hits.png"

# The contact sheet shows two rows of five.
HITS_SHOWN = 10

# How long to wait before asking live cameras for a new frame again; far below a frame interval.
POLL_S = 0.004


OnProgress = Callable[[SourceSummary], None]


def run(
    sources: Sequence[Source],
    detector: PersonDetector,
    manifest: Manifest,
    *,
    out: Path,
    steps: int,
    query: Query | None = None,
    save_video: bool = False,
    seed: int = 0,
    site: str = "local",
    on_progress: OnProgress | None = None,
) -> RunSummary:
    """Detect people in all sources until the last one ends; write events, summary, hits and videos to out.

    sources: open, with different camera names; closed at the end. on_progress: called after each frame
    and when a source ends.
    A source that fails is reported in the summary and does not stop the others. KeyboardInterrupt ends the
    run early, in order. Raises ValueError on a bad argument before anything is written, OSError when out
    cannot be written.
    """
    detector.detect([], steps)
    cameras = [source.camera for source in sources]
    if len(set(cameras)) != len(cameras):
        raise ValueError(f"cameras must have different names, got {', '.join(cameras)}")
    out.mkdir(parents=True, exist_ok=True)
    pipeline = Pipeline(
        sources,
        detector,
        manifest,
        out=out,
        steps=steps,
        query=query,
        save_video=save_video,
        seed=seed,
        site=site,
        on_progress=on_progress or _tell_nobody,
    )
    try:
        return pipeline.finish(interrupted=_work_off(pipeline))
    except BaseException:
        pipeline.abandon()
        raise


def _work_off(pipeline: Pipeline) -> bool:
    """Process every batch. Returns whether it was interrupted."""
    try:
        while (batch := pipeline.next_batch()) is not None:
            with _held_interrupts():
                pipeline.process(batch)
    except KeyboardInterrupt:
        return True
    return False


@contextmanager
def _held_interrupts() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM wait for the end of the block, in which a library may turn them into its own errors."""
    came: list[int] = []
    held = []
    if threading.current_thread() is threading.main_thread():
        numbers = (signal.SIGINT, signal.SIGTERM)
        held = [each for each in numbers if signal.getsignal(each) is signal.default_int_handler]
    for number in held:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number in held:
            signal.signal(number, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def frame_seed(camera: str, seq: int, seed: int = 0) -> int:
    """Return the seed of a frame's noise: it depends on camera, frame and run seed, never on the batch."""
    return zlib.crc32(f"{camera}:{seq}".encode(), seed)


def output_paths(out: Path, cameras: Sequence[str], *, query: bool, save_video: bool) -> list[Path]:
    """Return the files that a run writes, replacing those of an earlier run."""
    videos = [f"{camera}.mp4" for camera in cameras] if save_video else []
    return [out / name for name in [EVENTS, SUMMARY, *([HITS] if query else []), *videos]]


@dataclass
class Feed:
    """One source on its way through the run."""

    source: Source
    frames: Iterator[VideoFrame]
    summary: SourceSummary
    video: VideoWriter | None


Batch = list[tuple[Feed, VideoFrame]]


class Pipeline:
    """The state of a run."""

    def __init__(
        self,
        sources: Sequence[Source],
        detector: PersonDetector,
        manifest: Manifest,
        *,
        out: Path,
        steps: int,
        query: Query | None,
        save_video: bool,
        seed: int,
        site: str,
        on_progress: OnProgress,
    ) -> None:
        self._detector = detector
        self._model = model_record(manifest)
        self._match_threshold = manifest.match_threshold
        self._out = out
        self._steps = steps
        self._query = query
        self._seed = seed
        self._site = site
        self._on_progress = on_progress
        self._hits = BestHits()
        self._started = time.perf_counter()
        self._events = EventWriter(out / EVENTS)
        self._feeds = [_feed(source, out if save_video else None) for source in sources]

    def next_batch(self) -> Batch | None:
        """Return one frame of each source that has one now; None after the end of the last source."""
        while running := [feed for feed in self._feeds if feed.summary.status == "running"]:
            frames = [(feed, self._next_frame(feed)) for feed in running if feed.source.ready()]
            batch = [(feed, frame) for feed, frame in frames if frame is not None]
            if batch:
                return batch
            if not frames:
                time.sleep(POLL_S)
        return None

    def process(self, batch: Batch) -> None:
        """Detect in all frames of the batch at once and write each result."""
        seeds = [frame_seed(frame.camera, frame.seq, self._seed) for _, frame in batch]
        start = time.perf_counter()
        results = self._detector.detect([frame.image for _, frame in batch], self._steps, seeds)
        infer_ms = (time.perf_counter() - start) * 1000
        compute = Compute(steps=self._steps, batch=len(batch), infer_ms=infer_ms)
        for (feed, frame), people in zip(batch, results, strict=True):
            cosines = None if self._query is None else (people.embeddings @ self._query.embedding).tolist()
            self._write_events(feed, frame, people, cosines, compute)
            self._count(feed, people)
            if feed.video is not None:
                drawn = draw_detections(frame.image, people, cosines, match_threshold=self._match_threshold)
                feed.video.write(drawn, frame.pts_s)
            self._on_progress(feed.summary)

    def finish(self, *, interrupted: bool) -> RunSummary:
        """Close everything, write summary and contact sheet, return the summary."""
        for feed in self._feeds:
            if feed.summary.status == "running":
                self._end(feed, "interrupted")
        self._events.close()
        if self._query is not None:
            save_png(contact_sheet(self._query, self._hits.ranked(HITS_SHOWN)), self._out / HITS)
        summary = RunSummary(
            model=self._model,
            steps=self._steps,
            query=self._query.name if self._query else None,
            match_threshold=self._match_threshold,
            interrupted=interrupted,
            seconds=round(time.perf_counter() - self._started, 3),
            sources=[feed.summary for feed in self._feeds],
            files=self._files(),
        )
        partial = self._out / f".{SUMMARY}.partial"
        partial.write_text(summary.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(self._out / SUMMARY)
        return summary

    def _files(self) -> list[str]:
        filmed = [feed.summary for feed in self._feeds if feed.video is not None]
        videos = [f"{summary.camera}.mp4" for summary in filmed if summary.frames_processed]
        return [EVENTS, SUMMARY, *([HITS] if self._query is not None else []), *videos]

    def abandon(self) -> None:
        """Close everything after an error; unfinished videos are removed, events stay."""
        self._events.close()
        for feed in self._feeds:
            feed.source.close()
            if feed.video is not None:
                feed.video.discard()

    def _next_frame(self, feed: Feed) -> VideoFrame | None:
        try:
            frame = next(feed.frames, None)
        except SourceError as error:
            self._end(feed, "failed", str(error))
            return None
        if frame is None:
            self._end(feed, "ended")
        return frame

    def _write_events(
        self, feed: Feed, frame: VideoFrame, people: Detections, cosines: list[float] | None, compute: Compute
    ) -> None:
        matches = [self._match(cosines, i) for i in range(len(people))]
        events = []
        for i, match in enumerate(matches):
            box, score = as_box(people.boxes_xyxy[i]), float(people.scores[i])
            person = DetectedPerson(id=f"{frame.camera}:{frame.seq}:{i}", box=box, score=score)
            events.append(
                detection_event(
                    frame, person, match=match, model=self._model, compute=compute, site=self._site
                )
            )
            if match is not None:
                feed.summary.matches += match.is_match
                self._hits.offer(_hit(feed.source, frame, person, match))
        self._events.write(events)

    def _match(self, cosines: Sequence[float] | None, i: int) -> Match | None:
        if cosines is None or self._query is None:
            return None
        return Match(query=self._query.name, cos=cosines[i], is_match=cosines[i] >= self._match_threshold)

    def _count(self, feed: Feed, people: Detections) -> None:
        feed.summary.frames_processed += 1
        feed.summary.detections += len(people)
        self._read_counters(feed)

    def _read_counters(self, feed: Feed) -> None:
        summary, source = feed.summary, feed.source
        summary.frames_decoded = source.frames_decoded
        summary.frames_dropped = source.frames_dropped
        summary.frames_corrupt = source.frames_corrupt
        summary.corrupt_packets = source.corrupt_packets
        summary.seconds = round(time.perf_counter() - self._started, 3)
        summary.fps = round(summary.frames_processed / max(summary.seconds, 1e-3), 2)

    def _end(self, feed: Feed, status: Status, error: str | None = None) -> None:
        feed.source.close()
        feed.summary.status, feed.summary.error = status, error
        self._read_counters(feed)
        if (hit := self._hits.best_of(feed.summary.camera)) is not None:
            feed.summary.best_hit = _best_hit(hit)
        if feed.video is not None:
            feed.video.close()
        self._on_progress(feed.summary)


def _tell_nobody(summary: SourceSummary) -> None:
    pass


def _feed(source: Source, video_folder: Path | None) -> Feed:
    fps = source.fps_hint / source.every if source.fps_hint else None
    video = VideoWriter(video_folder / f"{source.camera}.mp4", fps) if video_folder else None
    summary = SourceSummary(camera=source.camera, frames_expected=source.num_frames_hint)
    return Feed(source, iter(source), summary, video)


def _hit(source: Source, frame: VideoFrame, person: DetectedPerson, match: Match) -> Hit:
    moment_s = frame.pts_s
    if moment_s is None and source.fps_hint:
        moment_s = frame.seq / source.fps_hint
    return Hit(
        camera=frame.camera,
        seq=frame.seq,
        moment_s=moment_s,
        box=person.box,
        score=person.score,
        cos=match.cos,
        is_match=match.is_match,
        crop=crop_person(frame.image, person.box),
    )


def _best_hit(hit: Hit) -> BestHit:
    return BestHit(
        frame_seq=hit.seq,
        moment_s=None if hit.moment_s is None else round(hit.moment_s, 3),
        box=hit.box,
        score=round(hit.score, 4),
        cos=round(hit.cos, 4),
        is_match=hit.is_match,
    )
