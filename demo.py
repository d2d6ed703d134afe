"""psdiff demo: two clips of one synthetic street, and one person of camera 1 searched for in camera 2.

The clips are drawn here, so the truth about every frame is known and the answer is judged by it, whether
it flatters or not. Needs the base install only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from .bundle import Manifest, load_manifest
from .models.detector import Detector
from .runtime.console import progress_of
from .runtime.detector import detector_of, shipped_bundle
from .runtime.drawing import contact_sheet, moment_text, save_png
from .runtime.events import DetectionEvent, RunSummary
from .runtime.frames import Picture, SourceError
from .runtime.query import BestHits, Box, Hit, Query, box_text, crop_person, load_query
from .runtime.run import EVENTS, HITS, SUMMARY
from .runtime.run import run as run_pipeline
from .runtime.sources import open_source
from .runtime.verified import require_proof
from .training.synthetic.clips import ClipTruth, FrameTruth, read_truth, truth_path, write_clip
from .training.synthetic.street import Street

# Chosen by eye: a street in the sun seen from nearby, and a pale hall seen from above.
DEFAULT_SEED = 2
DEFAULT_DURATION_S = 12.0
NUM_PEOPLE = 12
WIDTH, HEIGHT, FPS = 960, 576, 10.0

CAMERAS = ("camera-1", "camera-2")
CLIPS, QUERY = "clips", "query.png"

# The query shows a person almost whole, and the other camera shows that person long enough to be found.
QUERY_VISIBILITY = 0.95
ANSWER_VISIBILITY = 0.8
ANSWER_FRAMES = 5

# A detection shows the person whose true box it overlaps by this much, as in the evaluation.
SAME_BOX_IOU = 0.5


class DemoError(Exception):
    """The demo cannot be made with these arguments."""


class Truth(StrEnum):
    """Whom a hit really shows."""

    RIGHT = "the right person"
    OTHER = "another person"
    NOBODY = "no labelled person"


@dataclass(frozen=True)
class JudgedHit:
    """A hit, and what the truth says of it."""

    hit: Hit
    truth: Truth


@dataclass(frozen=True)
class Wanted:
    """The person to search for, as camera 1 sees them in one frame."""

    pid: int
    seq: int
    box: Box


@dataclass(frozen=True)
class DemoResult:
    """What the demo found."""

    wanted: Wanted
    hits: tuple[JudgedHit, ...]
    """In camera 2, one a passage, best first."""
    own: JudgedHit | None
    """The best hit in camera 1, from which the query was taken."""
    summary: RunSummary
    files: tuple[Path, ...]
    seconds: float

    @property
    def is_right(self) -> bool:
        """Whether the best hit in camera 2 is the person asked for."""
        return bool(self.hits) and self.hits[0].truth is Truth.RIGHT


def run_demo(
    out: Path,
    *,
    bundle: Path | None = None,
    steps: int | None = None,
    seed: int = DEFAULT_SEED,
    duration_s: float = DEFAULT_DURATION_S,
    console: Console,
) -> DemoResult:
    """Draw two clips into out, search both for a person of the first, print and return what was found.

    bundle, steps: by default the shipped one, and its own number of steps. Files of an earlier demo in out
    are replaced. Raises DemoError (steps, duration_s, or a street without a person to ask for) before
    anything is searched, BundleError, and OSError where out cannot be written.
    """
    began = time.monotonic()
    folder = bundle or shipped_bundle()
    manifest = load_manifest(folder)
    detector = detector_of(manifest, folder)
    steps = manifest.default_steps if steps is None else steps
    street = _street(seed, duration_s, detector, steps)
    require_proof(detector, manifest, folder, "onnxruntime")
    clips = _render(street, out / CLIPS, console)
    truths = [read_truth(truth_path(clip)) for clip in clips]
    wanted = pick_wanted(*truths)
    if wanted is None:
        raise DemoError(
            "the street must show somebody well in both cameras, got nobody with "
            f"seed {seed} in {duration_s:g} s; take another seed or a longer duration"
        )
    query = _take_query(detector, clips[0], wanted, out / QUERY, steps)
    _say(console, f"query: camera 1 at {wanted.seq / FPS:.1f} s, box {box_text(wanted.box)} in {out / QUERY}")
    summary = _search(clips, detector, manifest, query, out, steps, console)
    own, hits = (
        judged(best_hits(out / EVENTS, camera), truth, wanted.pid)
        for camera, truth in zip(CAMERAS, truths, strict=True)
    )
    _draw_hits(query, [found.hit for found in hits], clips[1], out / HITS)
    seconds = time.monotonic() - began
    result = DemoResult(wanted, tuple(hits), next(iter(own), None), summary, _files(out, clips), seconds)
    _show(result, out, console)
    return result


def _street(seed: int, duration_s: float, detector: Detector, steps: int) -> Street:
    if duration_s * FPS < 1:
        raise DemoError(f"duration must be at least one frame, {1 / FPS:g} s, got {duration_s:g}")
    if seed < 0:
        raise DemoError(f"seed must be a whole number >= 0, got {seed}")
    try:
        detector.detect([], steps)
    except ValueError as error:
        raise DemoError(str(error)) from None
    return Street(
        seed, num_people=NUM_PEOPLE, cameras=len(CAMERAS), width=WIDTH, height=HEIGHT, duration_s=duration_s
    )


def _render(street: Street, folder: Path, console: Console) -> list[Path]:
    """Draw each camera's clip, and write its truth beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = [folder / f"{camera}.mp4" for camera in CAMERAS]
    columns = (TextColumn("drawing {task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console) as bars:
        tasks = [bars.add_task(clip.stem, total=round(street.duration_s * FPS)) for clip in clips]
        for camera, (clip, task) in enumerate(zip(clips, tasks, strict=True)):
            write_clip(street, camera, clip, fps=FPS, on_frame=lambda task=task: bars.advance(task))
    return clips


def pick_wanted(here: ClipTruth, there: ClipTruth) -> Wanted | None:
    """Pick the largest whole view in one clip of somebody whom the other clip shows well too; None: nobody.

    The model has no say in it: the choice follows from the truth alone.
    """
    there_well = (
        pid for frame in there.frames for _, pid, seen in _people(frame) if seen >= ANSWER_VISIBILITY
    )
    shown = Counter(there_well)
    views = [
        Wanted(pid, seq, box)
        for seq, frame in enumerate(here.frames)
        for box, pid, seen in _people(frame)
        if seen >= QUERY_VISIBILITY and shown[pid] >= ANSWER_FRAMES
    ]
    return max(views, key=lambda view: _area(view.box), default=None)


def _people(frame: FrameTruth) -> Iterable[tuple[Box, int, float]]:
    return zip(frame.boxes_xyxy, frame.pids, frame.visibility, strict=True)


def _area(box: Box) -> float:
    x1, y1, x2, y2 = box
    return max(0.0, x2 - x1) * max(0.0, y2 - y1)


def _take_query(detector: Detector, clip: Path, wanted: Wanted, path: Path, steps: int) -> Query:
    """Save the frame of the clip that shows the wanted person, and describe the person in the true box."""
    save_png(Image.fromarray(_pictures(clip, {wanted.seq})[wanted.seq]), path)
    return load_query(detector, path, wanted.box, steps)


def _pictures(clip: Path, seqs: set[int]) -> dict[int, Picture]:
    with open_source(str(clip)) as source:
        return {frame.seq: frame.image for frame in source if frame.seq in seqs}


def _search(
    clips: Sequence[Path],
    detector: Detector,
    manifest: Manifest,
    query: Query,
    out: Path,
    steps: int,
    console: Console,
) -> RunSummary:
    """Do what psdiff run --query --save-video does."""
    with ExitStack() as stack:
        sources = [stack.enter_context(open_source(str(clip))) for clip in clips]
        on_progress = stack.enter_context(progress_of(sources, console))
        summary = run_pipeline(
            sources,
            detector,
            manifest,
            out=out,
            steps=steps,
            query=query,
            save_video=True,
            on_progress=on_progress,
        )
    if summary.interrupted:
        raise KeyboardInterrupt
    for source in summary.sources:
        if source.status == "failed":
            raise SourceError(source.error)
    return summary


def best_hits(events: Path, camera: str) -> list[Hit]:
    """Read the events of a run with query: one camera's best hits, one a passage, best first; without crops."""
    hits = BestHits()
    with events.open(encoding="utf-8") as lines:
        for line in lines:
            data = DetectionEvent.model_validate_json(line).data
            if data.camera == camera and data.match is not None:
                hits.offer(
                    Hit(
                        camera=data.camera,
                        seq=data.frame_seq,
                        moment_s=data.pts_s,
                        box=data.det.box,
                        score=data.det.score,
                        cos=data.match.cos,
                        is_match=data.match.is_match,
                        crop=np.zeros((1, 1, 3), np.uint8),
                    )
                )
    return hits.ranked()


def judged(hits: Iterable[Hit], truth: ClipTruth, pid: int) -> list[JudgedHit]:
    """Look up whom each hit shows."""
    return [JudgedHit(hit, _judge(hit.box, truth.frames[hit.seq], pid)) for hit in hits]


def _judge(box: Box, frame: FrameTruth, pid: int) -> Truth:
    overlaps = ((iou(box, true_box), shown) for true_box, shown, _ in _people(frame))
    overlap, shown = max(overlaps, default=(0.0, -1))
    if overlap < SAME_BOX_IOU:
        return Truth.NOBODY
    return Truth.RIGHT if shown == pid else Truth.OTHER


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, in [0, 1]."""
    common = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - common
    return common / union if union > 0 else 0.0


def _draw_hits(query: Query, hits: Sequence[Hit], clip: Path, path: Path) -> None:
    """Replace the run's contact sheet by one of camera 2 alone: the passage asked about fills no places."""
    pictures = _pictures(clip, {hit.seq for hit in hits})
    with_crops = [replace(hit, crop=crop_person(pictures[hit.seq], hit.box)) for hit in hits]
    save_png(contact_sheet(query, with_crops), path)


def _files(out: Path, clips: Sequence[Path]) -> tuple[Path, ...]:
    videos = [out / clip.name for clip in clips]
    return (out / QUERY, out / HITS, *videos, out / EVENTS, out / SUMMARY, *clips, *map(truth_path, clips))


def _show(result: DemoResult, out: Path, console: Console) -> None:
    console.print(hit_table(result))
    frames, steps = result.summary.sources[0].frames_processed, result.summary.steps
    videos = ", ".join(f"{camera}.mp4" for camera in CAMERAS)
    _say(console, f"{len(CAMERAS)} clips of {frames} frames, K={steps}: {result.seconds:.0f} s in all")
    _say(console, f"in {out}: {QUERY}, {HITS}, {videos}, {EVENTS}, {SUMMARY}, {CLIPS}/ (clips and truth)")
    _say(console, verdict(result))


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def hit_table(result: DemoResult) -> Table:
    """Return the table of the hits in camera 2, and below it the best one in camera 1."""
    table = Table(title="Best hits, one a passage, by cosine x box score", title_justify="left")
    for name in ("rank", "camera", "time", "cosine", "box score"):
        table.add_column(name, justify="left" if name == "camera" else "right", no_wrap=True)
    table.add_column("truth: shows", no_wrap=True)
    for rank, found in enumerate(result.hits, 1):
        table.add_row(str(rank), *_cells(found), end_section=rank == len(result.hits))
    if result.own is not None:
        table.add_row("query", *_cells(result.own))
    return table


def _cells(found: JudgedHit) -> tuple[str, ...]:
    hit = found.hit
    style = "green" if found.truth is Truth.RIGHT else "red"
    return hit.camera, moment_text(hit), f"{hit.cos:.2f}", f"{hit.score:.2f}", f"[{style}]{found.truth}[/]"


def verdict(result: DemoResult) -> str:
    """Say in one sentence whether the person was found in camera 2, and whether that is true."""
    if not result.hits:
        return "not found in camera 2: nobody was detected there, although the person comes past."
    best = result.hits[0]
    place = f"in camera 2 at {moment_text(best.hit)} with cosine {best.hit.cos:.2f}"
    threshold = result.summary.match_threshold
    answer = f"found {place}" if best.hit.is_match else f"nearest {place}, no match (below {threshold:.2f})"
    judgement = "right" if result.is_right else "WRONG"
    return f"{answer}: {judgement}, according to the truth it is {best.truth}."
