"""Pictures of H.264 and HEVC put together from the pieces in which a camera sends them over RTP.

FFmpeg's own parser gives a picture when the next one begins: a frame late. RTP marks the last piece of a picture, but
FFmpeg passes neither that mark on nor the one at the end of a fragmented NAL unit. What is left to see:

* a NAL unit is cut into pieces of one size, of which the last is shorter;
* a stream cuts each picture into as many slices as the one before.

Neither is a law. So both are held against the stream's own pictures, and a picture is given at once only after they
have told the end of the latest thirty rightly, a key frame among them. If they ever tell it too early, what was given
is torn, and nothing of that stream is given early again.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import av

START_CODE = b"\x00\x00\x01"

# A piece that begins a NAL unit begins with this; bytes inside of one cannot look like it.
PIECE_START = b"\x00" + START_CODE

# So many pictures must have ended where they seemed to.
PROOF_PICTURES = 30

# Of the largest picture of a camera it is a dozen times the size; a stream without pictures must not fill the memory.
LONGEST_UNIT = 1 << 25

# FFmpeg's decoder of H.264 marks every picture that lacks a slice, and 96 of 100 that were cut within one; that of
# HEVC hardly any.
PROVABLE = frozenset({"h264"})


class Nal(NamedTuple):
    """What the head of a NAL unit tells."""

    is_slice: bool
    is_first: bool
    """Whether a slice is the first of its picture."""
    is_key: bool
    is_head: bool
    """Whether it stands before the slices of a picture, never between them."""
    is_set: bool
    """Whether it is a sequence parameter set of H.264."""


def h264_nal(data: bytes) -> Nal:
    """data: from the byte after the start code. Rec. ITU-T H.264, 7.3.1, 7.4.1.2.3 and 7.3.3 (first_mb_in_slice)."""
    kind = data[0] & 0x1F
    is_slice = kind in (1, 2, 5)
    return Nal(is_slice, is_slice and data[1] >= 0x80, kind == 5, kind in (6, 7, 8, 9), kind == 7)


def hevc_nal(data: bytes) -> Nal:
    """data: from the byte after the start code. Rec. ITU-T H.265, 7.3.1.2, 7.4.2.4.4 and 7.3.6.1."""
    kind, layer = data[0] >> 1 & 0x3F, (data[0] & 1) << 5 | data[1] >> 3
    is_slice = kind < 32 and layer == 0
    is_head = 32 <= kind <= 37 or kind == 39 or 41 <= kind <= 44 or 48 <= kind <= 55
    return Nal(is_slice, is_slice and data[2] >= 0x80, 16 <= kind <= 23, is_head and layer == 0, False)


READERS: dict[str, tuple[Callable[[bytes], Nal], int]] = {"h264": (h264_nal, 1), "hevc": (hevc_nal, 2)}
"""How a codec's NAL units are read, and how many bytes their heads have."""


class PieceLengths:
    """Tells by their lengths which pieces end a NAL unit."""

    def __init__(self, head_length: int) -> None:
        self._head_length = head_length
        self._shortest_first: int | None = None
        """Of the pieces that were followed by more of their NAL unit."""
        self._first = 0
        self._full = 0

    def ends(self, data: bytes, num_nals: int) -> bool:
        """Whether the next piece of a stream seems to end a NAL unit. num_nals: how many begin in it."""
        if num_nals:
            self._first = len(data)
            self._full = len(data) - len(PIECE_START) - self._head_length
            return num_nals > 1 or (self._shortest_first is not None and len(data) < self._shortest_first)
        if self._first:
            self._shortest_first = min(self._first, self._shortest_first or self._first)
            self._first = 0
        return len(data) < self._full


class _Unit:
    """What has come of one picture."""

    def __init__(self) -> None:
        self.pieces: list[bytes] = []
        self.length = 0
        self.pts: int | None = None
        self.slices = 0
        self.is_key = False
        self.is_whole_so_far = False
        self.is_in_slice = False
        self.seemed_to_end = False

    def take(self, data: bytes, pts: int | None, nals: list[Nal]) -> None:
        if not self.slices:
            # Parameter sets may carry another time than their picture.
            self.pts = pts
            slices = [nal for nal in nals if nal.is_slice]
            self.is_whole_so_far = bool(slices) and slices[0].is_first
        self.pieces.append(data)
        self.length += len(data)
        self.slices += sum(nal.is_slice for nal in nals)
        self.is_key = self.is_key or any(nal.is_key for nal in nals)
        self.is_in_slice = nals[-1].is_slice if nals else self.is_in_slice


class AccessUnits:
    """Pieces of one stream -> its pictures, each with what stands before it (parameter sets, messages)."""

    def __init__(self, codec: str, time_base: Fraction | None) -> None:
        """codec: h264 or hevc."""
        self._read, head_length = READERS[codec]
        self._lengths = PieceLengths(head_length)
        self._time_base = time_base
        self.lost: list[int | None] = []
        """PTS of pictures that were given before they were whole, or whose beginning never came; for the reader to
        take away."""
        self._latest_lost: tuple[int | None] | None = None
        self._unit = _Unit()
        self._is_provable = codec in PROVABLE
        self._given: tuple[int | None] | None = None
        """PTS of the picture that was given early, while no other has begun."""
        self._slices: int | None = None
        """Of each of the latest self._proved pictures."""
        self._proved = 0
        self._has_proved_key = False
        self._set: bytes | None = None

    @property
    def is_proven(self) -> bool:
        """Whether pictures can be given as soon as they seem to be whole."""
        return self._is_provable and self._has_proved_key and self._proved >= PROOF_PICTURES

    def add(self, piece: av.Packet) -> list[av.Packet]:
        """Give the pictures that end before or with a piece, with the PTS of their pieces and without DTS."""
        data, pts = bytes(piece), piece.pts
        nals = self._nals(data)
        done: list[av.Packet] = []
        if self._begins_picture(pts, nals):
            done += self.rest()
        if self._belongs_to_nothing(pts, nals):
            self._lose(pts)
            return done
        self._unit.take(data, pts, nals)
        if self._seems_whole(data, nals) and self.is_proven:
            self._given = (pts,)
            done += self.rest()
        return done

    def rest(self) -> list[av.Packet]:
        """Give the picture that is under way: the stream has ended, or the next one begins."""
        unit, self._unit = self._unit, _Unit()
        # Without a slice it is the end of the stream, which no decoder takes as a picture.
        if not unit.slices:
            return []
        self._learn(unit)
        packet = av.Packet(b"".join(unit.pieces))
        packet.pts, packet.is_keyframe = unit.pts, unit.is_key
        if self._time_base is not None:
            packet.time_base = self._time_base
        return [packet]

    def _nals(self, data: bytes) -> list[Nal]:
        if not data.startswith(PIECE_START):
            return []
        found: list[Nal] = []
        for nal in data.split(START_CODE)[1:]:
            found.append(self._read(nal[:3].ljust(3, b"\x00")))
            # Zeros belong to the start code that follows.
            if found[-1].is_set and nal.rstrip(b"\x00") != self._set:
                # Another encoder, or another setting of it.
                self._set, self._slices = nal.rstrip(b"\x00"), None
                self._proved, self._has_proved_key = 0, False
        return found

    def _begins_picture(self, pts: int | None, nals: list[Nal]) -> bool:
        unit = self._unit
        if unit.length > LONGEST_UNIT:
            return True
        # Two fields, or the pictures of a camera whose clock stands still, share a time.
        return unit.slices > 0 and (pts != unit.pts or (bool(nals) and (nals[0].is_head or nals[0].is_first)))

    def _belongs_to_nothing(self, pts: int | None, nals: list[Nal]) -> bool:
        unit = self._unit
        if not nals:
            return not unit.pieces or pts != unit.pts
        slices = [nal for nal in nals if nal.is_slice]
        return not unit.slices and self._given == (pts,) and bool(slices) and not slices[0].is_first

    def _lose(self, pts: int | None) -> None:
        if self._given == (pts,):
            self._is_provable = False
        if self._latest_lost != (pts,):
            self._latest_lost = (pts,)
            self.lost.append(pts)

    def _seems_whole(self, data: bytes, nals: list[Nal]) -> bool:
        """Whether a piece, already taken, ends the picture by all that is known."""
        unit, ends = self._unit, self._lengths.ends(data, len(nals))
        is_of_picture = unit.is_in_slice or any(nal.is_slice for nal in nals)
        if is_of_picture and unit.seemed_to_end:
            self._is_provable = False
        unit.seemed_to_end = unit.seemed_to_end or (
            is_of_picture and ends and unit.is_whole_so_far and unit.slices == self._slices
        )
        return unit.seemed_to_end

    def _learn(self, unit: _Unit) -> None:
        if unit.slices != self._slices:
            self._slices, self._proved, self._has_proved_key = unit.slices, 0, False
        self._proved += 1
        self._has_proved_key = self._has_proved_key or unit.is_key
