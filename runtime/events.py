"""What is written about a run: one CloudEvents 1.0 JSON line a detection, and the summary at the end."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import BaseModel, Field, PlainSerializer
from ulid import ULID

from ..bundle import Manifest
from .frames import TimeSource, VideoFrame

EVENT_TYPE = "psdiff.detection.v1"
TRACK_ENDED = "psdiff.track.v1"


def utc_text(time: datetime) -> str:
    """Return RFC 3339 with milliseconds: 2026-11-20T12:51:03.214Z. time: UTC."""
    return time.replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


UtcTime = Annotated[datetime, PlainSerializer(utc_text)]
Pixels = Annotated[float, PlainSerializer(lambda value: round(value, 1), return_type=float)]
Ratio = Annotated[float, PlainSerializer(lambda value: round(value, 4), return_type=float)]
Milliseconds = Annotated[float, PlainSerializer(lambda value: round(value, 1), return_type=float)]


class FrameSize(BaseModel):
    """Frame pixels."""

    w: int
    h: int


class TrackRecord(BaseModel):
    """The detections of one camera that are one person."""

    id: str
    """camera:start:number; start tells services apart that ran one after the other."""
    state: Literal["new", "update", "end"]
    votes: int
    """Detections so far, this one included."""


class DetectedPerson(BaseModel):
    """One box of one frame."""

    id: str
    """camera:frame_seq:rank, the same in every run over the same source; of a service camera:start:frame_seq:rank."""
    box: tuple[Pixels, Pixels, Pixels, Pixels]
    """x1, y1, x2, y2 in frame pixels."""
    score: Ratio
    track: TrackRecord | None = None
    """Absent where nobody follows people from frame to frame."""


class Match(BaseModel):
    """How much the person looks like the one asked for."""

    query: str
    cos: Ratio
    """Cosine of the two embeddings, in [-1, 1]."""
    is_match: bool
    """Whether cos reaches the model's match threshold."""


class ModelRecord(BaseModel):
    """Which model said so."""

    id: str
    sha256: str
    """Digest over the names and SHA-256 of the bundle's files."""
    space: str
    """Embeddings compare only within one space."""


class Compute(BaseModel):
    """What the answer cost."""

    steps: int
    batch: int
    infer_ms: Milliseconds
    """Wall time of the whole batch."""
    queue_ms: Milliseconds | None = None
    """From the camera's decoder to the computation; absent where frames do not wait."""
    warm: bool | None = None
    """Whether the diffusion began with the people of the frame before; absent where that was not asked for."""


class EventData(BaseModel):
    """The part of an event that is psdiff's own."""

    camera: str
    frame_seq: int
    pts_s: Annotated[float, PlainSerializer(lambda value: round(value, 3), return_type=float)] | None
    ts_source: TimeSource
    ts_uncertainty_ms: Milliseconds | None = None
    """Absent where it is not known."""
    frame: FrameSize
    det: DetectedPerson
    match: Match | None = None
    """Absent in a run without query."""
    model: ModelRecord
    compute: Compute
    trace_id: str | None = None
    """32 hexadecimal digits, of frames that are traced; else absent."""


class DetectionEvent(BaseModel):
    """CloudEvents 1.0 envelope, JSON format."""

    specversion: Literal["1.0"] = "1.0"
    id: str = Field(default_factory=lambda: str(ULID()))
    type: Literal["psdiff.detection.v1"] = EVENT_TYPE
    source: str
    """/site/camera, percent-encoded."""
    subject: str
    time: UtcTime
    datacontenttype: Literal["application/json"] = "application/json"
    data: EventData

    def line(self) -> str:
        """Return the event as one line of JSON, with its newline."""
        # pts_s stays as null: "no timestamps" is an answer. What was not asked for, or not measured, is left out.
        data = self.data
        parts = {"compute": data.compute, "det": data.det}
        inside = {name: _absent(part, "queue_ms", "warm", "track") for name, part in parts.items()}
        without = dict.fromkeys(_absent(data, "match", "ts_uncertainty_ms", "trace_id"), True)
        return self.model_dump_json(exclude={"data": without | inside}) + "\n"


class BestView(BaseModel):
    """The detection that showed a person best: the largest score times area."""

    frame_seq: int
    box: tuple[Pixels, Pixels, Pixels, Pixels]
    score: Ratio


class TrackData(BaseModel):
    """A person who is gone."""

    camera: str
    track: TrackRecord
    first_seen: UtcTime
    last_seen: UtcTime
    best: BestView
    model: ModelRecord


class TrackEvent(BaseModel):
    """CloudEvents 1.0 envelope, JSON format: the end of a track. Its time is that of the last detection."""

    specversion: Literal["1.0"] = "1.0"
    id: str = Field(default_factory=lambda: str(ULID()))
    type: Literal["psdiff.track.v1"] = TRACK_ENDED
    source: str
    """/site/camera, percent-encoded."""
    subject: str
    time: UtcTime
    datacontenttype: Literal["application/json"] = "application/json"
    data: TrackData

    def line(self) -> str:
        """Return the event as one line of JSON, with its newline."""
        return self.model_dump_json() + "\n"


def _absent(part: BaseModel, *names: str) -> set[str]:
    return {name for name in names if getattr(part, name, None) is None}


Status = Literal["running", "ended", "failed", "interrupted"]


class BestHit(BaseModel):
    """The detection of a source that looks most like the query."""

    frame_seq: int
    moment_s: float | None
    box: tuple[float, float, float, float]
    score: float
    cos: float
    is_match: bool


class SourceSummary(BaseModel):
    """What became of one source."""

    camera: str
    status: Status = "running"
    error: str | None = None
    frames_expected: int | None = None
    """What the file says it holds; more than frames_decoded after the end means that the file is cut off."""
    frames_decoded: int = 0
    frames_processed: int = 0
    frames_dropped: int = 0
    frames_corrupt: int = 0
    """Decoded, but damaged: nobody was looked for in them."""
    corrupt_packets: int = 0
    detections: int = 0
    matches: int = 0
    """Detections whose cosine reaches the match threshold."""
    seconds: float = 0.0
    fps: float = 0.0
    """Processed frames per second of wall time."""
    best_hit: BestHit | None = None


class RunSummary(BaseModel):
    """What a run did; also the content of summary.json."""

    model: ModelRecord
    steps: int
    query: str | None
    match_threshold: float
    interrupted: bool
    seconds: float
    sources: list[SourceSummary]
    files: list[str]
    """Names of the files written, in the output folder."""


def detection_event(
    frame: VideoFrame,
    person: DetectedPerson,
    *,
    match: Match | None,
    model: ModelRecord,
    compute: Compute,
    site: str = "local",
    trace_id: str | None = None,
) -> DetectionEvent:
    """Wrap one person found in a frame."""
    height, width = frame.image.shape[:2]
    data = EventData(
        camera=frame.camera,
        frame_seq=frame.seq,
        pts_s=frame.pts_s,
        ts_source=frame.time_source,
        ts_uncertainty_ms=None if frame.uncertainty_s is None else 1000 * frame.uncertainty_s,
        frame=FrameSize(w=width, h=height),
        det=person,
        match=match,
        model=model,
        compute=compute,
        trace_id=trace_id,
    )
    source = source_of(site, frame.camera)
    return DetectionEvent(source=source, subject=person.id, time=frame.time, data=data)


def source_of(site: str, camera: str) -> str:
    """Name a camera of a site as CloudEvents want it."""
    return f"/{quote(site, safe='')}/{quote(camera, safe='')}"


def model_record(manifest: Manifest) -> ModelRecord:
    """Name the model; the digest is the same wherever the bundle's files are."""
    content = "".join(f"{name}\0{digest}\n" for name, digest in sorted(manifest.files.items()))
    sha256 = hashlib.sha256(content.encode()).hexdigest()
    return ModelRecord(id=manifest.model_id, sha256=sha256, space=manifest.embedding_space)


class EventWriter:
    """Write events as JSON lines. A reader, or a crash, finds whole lines only."""

    def __init__(self, path: Path) -> None:
        """Replace path. Raises OSError."""
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        self._size = 0

    def write(self, events: Sequence[DetectionEvent]) -> None:
        """Append the events of one frame with one system call. Raises OSError when the disk is full."""
        lines = "".join(event.line() for event in events).encode()
        if not lines:
            return
        written = os.write(self._file, lines)
        if written != len(lines):
            # A full disk takes a part of the bytes: take the half line back before saying so.
            os.ftruncate(self._file, self._size)
            raise OSError(
                f"events must fit on the disk, got {written} of {len(lines)} bytes into {self._path}"
            )
        self._size += written

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
