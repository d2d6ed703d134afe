"""Which frames of a stream show what the camera saw, and which are smeared.

A decoder marks a frame in whose own data it noticed damage. The frames after it repeat the damage, unmarked, until a
key frame; and a stream that is joined between two key frames begins with frames that refer to nothing. What the
decoder does not notice nobody can know: arithmetic coding turns most flipped bits into other valid pictures.
"""

from __future__ import annotations

# After damage a key frame is waited for at most so long: cameras send one every 1 to 4 s, some one a minute, and
# those must not be blind for it. What was damaged has mostly been drawn anew by then.
LONGEST_SMEAR_S = 4.0

# FFmpeg's decoders of these hold back what refers to nothing. They know more than the key frame: a stream that
# refreshes its picture strip by strip has none after the first.
SELF_STARTING = frozenset({"h264", "hevc"})


class DamageWatch:
    """Follows one stream."""

    def __init__(self, codec: str) -> None:
        """codec: FFmpeg's name of it."""
        self._has_begun = codec in SELF_STARTING
        self._since_s: float | None = None
        """Video time of the latest damage that no key frame has ended."""
        self._lost_pts: int | None = None
        self._is_lost = False

    def lose(self, pts: int | None) -> None:
        """A packet could not be decoded."""
        self._is_lost, self._lost_pts = True, pts

    def is_damaged(self, time_s: float, pts: int | None, *, is_key: bool, is_corrupt: bool) -> bool:
        """Whether the next frame must not be looked at. time_s: its place in the video."""
        if self._is_lost and self._since_s is None:
            self._since_s = time_s
        if is_corrupt:
            self._since_s = time_s
        elif is_key and self._is_after_loss(pts):
            self._since_s, self._is_lost, self._lost_pts, self._has_begun = None, False, None, True
        elif self._since_s is not None and abs(time_s - self._since_s) > LONGEST_SMEAR_S:
            self._since_s, self._is_lost, self._lost_pts = None, False, None
        return not self._has_begun or self._since_s is not None

    def _is_after_loss(self, pts: int | None) -> bool:
        # Decoders hold frames back: a key frame from before the loss may come after it.
        return pts is None or self._lost_pts is None or pts > self._lost_pts
