"""When a frame was captured: the camera's own clock where it can be believed, else when the frame arrived.

A camera numbers its frames by a clock that starts anywhere (PTS). RTCP sender reports say which time of day a PTS
is; FFmpeg hands that over with each packet. Camera clocks are set, jump, and are wrong, and PTS start again; what
comes out of here never goes back, and says where it is from and how far it may be off.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass
from typing import Literal

CaptureSource = Literal["rtcp_sr", "arrival", "file"]
Trust = Literal["auto", "always", "never"]

# A camera clock further from ours than this is wrong, unless the user says that ours is.
CREDIBLE_OFFSET_S = 2.0

# A reference that moves the timeline by more is a jump; it must be told this many times before it is believed.
JUMP_S = 5.0
AGREEING_REFERENCES = 3
AGREEMENT_S = 0.5

# PTS that go back by more, or leave more out, start a new timeline. Reordered frames stay below the first.
PTS_BACK_S, PTS_AHEAD_S = 0.5, 10.0

# Two readings of our two clocks that differ by more mean that the clock of the machine was set.
CLOCK_STEP_S = 1.0

# Frames over which the shortest way from the camera to us is looked for: a minute and more of video.
WINDOW_FRAMES = 600

# What encoder, network and decoder hold back when nothing tells; cameras in use take 0.1 to 1 s.
UNKNOWN_DELAY_S = 0.5

# How far apart sender reports and frames of one camera lie, as measured with FFmpeg's and GStreamer's senders.
REFERENCE_UNCERTAINTY_S = 0.02

# Files tell when they were begun in whole seconds.
FILE_UNCERTAINTY_S = 1.0

# Time never stands still between two frames of a camera.
SMALLEST_STEP_S = 1e-6


@dataclass(frozen=True)
class Arrival:
    """When a frame came out of the decoder, by two clocks of this machine."""

    utc_s: float
    """Seconds since 1970."""
    monotonic_s: float
    """Seconds of a clock that nobody sets."""


@dataclass(frozen=True)
class CaptureTime:
    """When a frame was captured."""

    utc_s: float
    """Seconds since 1970."""
    source: CaptureSource
    uncertainty_s: float
    """How far it may be off, to either side."""


class CaptureClock:
    """The times of one camera's frames, in the order of decoding."""

    def __init__(self, trust: Trust = "auto") -> None:
        """trust: whether to believe the camera's clock; auto: where it is within CREDIBLE_OFFSET_S of ours."""
        self._trust: Trust = trust
        self._last_utc_s: float | None = None
        self._last_pts_s: float | None = None
        self._clock_difference_s: float | None = None
        self._start_timeline()

    @property
    def camera_offset_s(self) -> float | None:
        """The camera's clock minus ours, as the latest references say; None without any."""
        return statistics.median(self._offsets) if self._offsets else None

    def begin_connection(self) -> None:
        """PTS that follow have nothing to do with those before, however well they may seem to go on."""
        self._start_timeline()
        self._last_pts_s = None

    def time_of(self, pts_s: float | None, arrival: Arrival, reference_s: float | None = None) -> CaptureTime:
        """The capture time of the next frame.

        pts_s: its PTS in seconds. reference_s: what the camera's clock was at that PTS, seconds since 1970, where a
        sender report has told.
        """
        self._notice_steps(pts_s, arrival)
        if pts_s is None:
            found = CaptureTime(arrival.utc_s - UNKNOWN_DELAY_S, "arrival", UNKNOWN_DELAY_S)
        else:
            self._delays.append(arrival.utc_s - pts_s)
            if reference_s is not None:
                self._learn(reference_s - pts_s, reference_s - arrival.utc_s)
            found = self._on_timeline(pts_s)
        return self._forward(found)

    def recorded(self, utc_s: float) -> CaptureTime:
        """The capture time of the next frame of a recording that tells when it was made: utc_s, since 1970."""
        return self._forward(CaptureTime(utc_s, "file", FILE_UNCERTAINTY_S))

    def _start_timeline(self) -> None:
        self._anchor_s: float | None = None
        """The camera's clock minus its PTS."""
        self._candidates: list[float] = []
        self._offsets: deque[float] = deque(maxlen=WINDOW_FRAMES)
        self._delays: deque[float] = deque(maxlen=WINDOW_FRAMES)

    def _notice_steps(self, pts_s: float | None, arrival: Arrival) -> None:
        """Begin anew where the camera's PTS or the clock of this machine jumped."""
        difference = arrival.utc_s - arrival.monotonic_s
        known = self._clock_difference_s
        if known is not None and abs(difference - known) > CLOCK_STEP_S:
            self._start_timeline()
            # The clock was put right: what it said before is no reason to hold the new time back.
            self._last_utc_s = None
        self._clock_difference_s = difference
        if pts_s is not None:
            if self._last_pts_s is not None and not -PTS_BACK_S <= pts_s - self._last_pts_s <= PTS_AHEAD_S:
                self._start_timeline()
            self._last_pts_s = pts_s

    def _learn(self, anchor_s: float, offset_s: float) -> None:
        """Move the timeline to a reference: at once by a little, and by a jump only when it is told again."""
        self._offsets.append(offset_s)
        if self._anchor_s is None or abs(anchor_s - self._anchor_s) <= JUMP_S:
            self._anchor_s = anchor_s
            self._candidates = []
            return
        if self._candidates and abs(anchor_s - self._candidates[-1]) > AGREEMENT_S:
            self._candidates = []
        self._candidates.append(anchor_s)
        if len(self._candidates) >= AGREEING_REFERENCES:
            self._anchor_s = anchor_s
            self._candidates = []
            self._offsets.clear()
            self._offsets.append(offset_s)

    def _on_timeline(self, pts_s: float) -> CaptureTime:
        if self._anchor_s is not None and self._is_believed():
            return CaptureTime(pts_s + self._anchor_s, "rtcp_sr", REFERENCE_UNCERTAINTY_S)
        # The frame that came fastest was held back least; the others lie on its timeline by their PTS.
        fastest = min(self._delays)
        spread = statistics.median(self._delays) - fastest
        return CaptureTime(pts_s + fastest - UNKNOWN_DELAY_S, "arrival", UNKNOWN_DELAY_S + spread)

    def _is_believed(self) -> bool:
        if self._trust != "auto":
            return self._trust == "always"
        offset = self.camera_offset_s
        return offset is not None and abs(offset) <= CREDIBLE_OFFSET_S

    def _forward(self, found: CaptureTime) -> CaptureTime:
        """Hold back a time that lies before that of the frame before."""
        utc_s = found.utc_s
        if self._last_utc_s is not None and utc_s <= self._last_utc_s:
            held = self._last_utc_s + SMALLEST_STEP_S
            found = CaptureTime(held, found.source, found.uncertainty_s + held - utc_s)
        self._last_utc_s = found.utc_s
        return found
