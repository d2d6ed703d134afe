"""The faults that a service must survive, by their number in the list of docs/faults.md."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import clips, clock_faults, network_faults, service_faults
from .watched_service import WatchedService


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    number: int
    title: str
    criterion: str
    """What the service must do, in words."""
    run: Callable[[WatchedService, random.Random], float]
    """Causes the fault and ends it; returns the seconds until all was well again. Raises FaultError."""
    missing: Callable[[WatchedService], str | None] = lambda site: None
    """Why the fault cannot be had here; None where it can."""


FAULTS = (
    Fault(
        1,
        "camera absent (closed port)",
        "state backoff(refused), others go on, ready; back in 10 s",
        network_faults.absent,
    ),
    Fault(2, "all cameras drop", "all back 10 s after the server", network_faults.all_gone),
    Fault(
        3,
        "connection taken, never a word",
        "given up for its timeout within 10 s; others go on; back in 10 s",
        network_faults.mute,
    ),
    Fault(
        4,
        "TCP stalls in mid-stream",
        "state stalled 3 s after the last byte; others go on; back in 10 s",
        network_faults.stall,
    ),
    Fault(
        5,
        "slow link, lost packets",
        "no frame waits longer than max_staleness_ms; others go on; back in 10 s",
        network_faults.slow_link,
    ),
    Fault(
        6,
        "corrupt packets",
        "counted, no crash, damaged pictures are not looked at; whole ones in 10 s",
        network_faults.corrupt,
    ),
    Fault(
        7,
        "decoder crash",
        "the worker is replaced and its cameras are back in 5 s; those of other workers go on",
        service_faults.decoder_crash,
        service_faults.no_workers,
    ),
    Fault(8, "change of resolution", "boxes lie on people in every frame", network_faults.resolution),
    Fault(
        9,
        "PTS jump, reset, overflow; camera clock set",
        "time never goes back, own clock again in 10 s, the offset is told",
        clock_faults.camera_clock,
    ),
    Fault(10, "no sender reports", "ts_source is arrival, with an uncertainty", network_faults.no_reports),
    Fault(
        11,
        "B-frames, long groups, start between key frames",
        "no smeared picture is looked at",
        network_faults.mid_group,
    ),
    Fault(
        12,
        "four times as many frames as K = 4 can do",
        "K falls and rises again; 99 % keep the promise + 1 frame, every camera min_fps, once K has fallen",
        service_faults.overload,
    ),
    Fault(
        22,
        "SIGTERM (a psdiff serve of its own)",
        "ends with 0 within 10 s, whole lines only",
        service_faults.sigterm,
        service_faults.no_model,
    ),
    Fault(
        23,
        "this machine's clock is set by an hour",
        "cameras stay connected, times follow the clock",
        clock_faults.host_clock,
        lambda site: (
            "the clock can only be set for cameras in threads" if service_faults.worker_ids(site) else None
        ),
    ),
    Fault(
        24,
        "a camera goes and comes, 20 times",
        "threads and files do not grow; back in 10 s",
        service_faults.add_and_remove,
        service_faults.no_apply,
    ),
    Fault(
        25,
        "the site is edited",
        "what cannot hold is refused and the old goes on; others are not disturbed",
        service_faults.edits,
        service_faults.no_apply,
    ),
)


def fault(number: int) -> Fault:
    """The fault of a number. Raises ValueError where there is none."""
    for each in FAULTS:
        if each.number == number:
            return each
    raise ValueError(f"fault must be one of {[each.number for each in FAULTS]}, got {number}")


def write_clips(folder: Path, cameras: int, minutes: float) -> dict[str, Path]:
    """What the cameras of a soak play, for so many minutes: `cameras` plain ones and the special ones."""
    repeat = 1 + round(minutes * 60 / 10)
    plain = clips.write_clip(folder / "plain.mp4", seconds=10, repeat=repeat)
    sizes = ((640, 360), (320, 180))
    return {f"cam{i + 1}": plain for i in range(cameras)} | {
        "resizes": clips.write_clip(folder / "resizes.mp4", seconds=2, sizes=sizes, repeat=3 * repeat),
        "long_groups": clips.write_clip(folder / "long.mp4", seconds=10, group=50, b_frames=3, repeat=repeat),
    }
