"""What a bad network or a bad camera does to RTP and RTCP packets, inside an RTSP connection over TCP (RFC 2326).

Layouts after RFC 3550 (RTP header, sender report) and RFC 6184 (NAL units of H.264).
"""

from __future__ import annotations

import random
import re
import struct
import time
from typing import Protocol

RTP_HEADER = struct.Struct("!BBHII")
SENDER_REPORT = struct.Struct("!BBHIIIIII")
REPORT_TYPE = 200

# Seconds from 1900, where NTP begins, to 1970.
NTP_EPOCH_S = 2_208_988_800

VIDEO_CLOCK_HZ = 90_000

# NAL units: a slice of an IDR frame, the parameter sets, and a fragment of another unit.
IDR, SPS, PPS, FRAGMENT = 5, 7, 8, 28

# A text answer without an end in so many bytes is none.
LONGEST_ANSWER = 65536


class PacketFault(Protocol):
    """Alters packets; called by one thread a connection."""

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """One packet of a channel (even: RTP, odd: RTCP) -> those that go on in its place."""
        ...


class RtspSplitter:
    """Takes the bytes of a server apart into text answers and interleaved packets; for one connection."""

    def __init__(self) -> None:
        self._rest = b""
        self._is_rtsp = True

    def feed(self, data: bytes, fault: PacketFault | None) -> bytes:
        """The whole messages that are there by now, their packets altered."""
        if not self._is_rtsp:
            return data
        self._rest += data
        done: list[bytes] = []
        while (size := self._message_size()) and size <= len(self._rest):
            message, self._rest = self._rest[:size], self._rest[size:]
            done.append(_altered(message, fault) if fault is not None and message[0] == 0x24 else message)
        if not size and len(self._rest) > LONGEST_ANSWER:
            self._is_rtsp = False
            done.append(self._rest)
        return b"".join(done)

    def _message_size(self) -> int:
        """Bytes of the message that begins here; 0 while that cannot be told."""
        rest = self._rest
        if rest[:1] == b"$":
            return 4 + int.from_bytes(rest[2:4]) if len(rest) >= 4 else 0
        head = rest.find(b"\r\n\r\n")
        if head < 0:
            return 0
        length = re.search(rb"(?i)content-length:\s*(\d+)", rest[:head])
        return head + 4 + (int(length[1]) if length else 0)


class FlippedBytes:
    """Flips single bytes in the payload of RTP packets."""

    def __init__(self, rng: random.Random, share: float) -> None:
        """share: of the packets, in (0, 1]."""
        self._rng, self._share = rng, share
        self.flipped = 0

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """Alter one packet; headers of RTP and of fragments stay, so that the decoder gets the damage."""
        first = RTP_HEADER.size + 2
        if channel % 2 or len(packet) <= first or self._rng.random() >= self._share:
            return [(channel, packet)]
        altered = bytearray(packet)
        altered[self._rng.randrange(first, len(packet))] ^= self._rng.randrange(1, 256)
        self.flipped += 1
        return [(channel, bytes(altered))]


class LostPackets:
    """Loses RTP packets."""

    def __init__(self, rng: random.Random, share: float) -> None:
        """share: of the packets, in (0, 1]."""
        self._rng, self._share = rng, share
        self.lost = 0

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """Let a packet pass, or not."""
        if channel % 2 or self._rng.random() >= self._share:
            return [(channel, packet)]
        self.lost += 1
        return []


class NoReports:
    """A camera that never tells its clock."""

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """Drop RTCP."""
        return [] if channel % 2 else [(channel, packet)]


class NoFirstKeyFrame:
    """A stream that begins in the middle of a group of pictures: the first IDR frame is not there."""

    def __init__(self) -> None:
        self._idr_timestamp: int | None = None
        self.dropped = 0

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """Drop the parameter sets and slices of the first IDR frame."""
        if channel % 2 or len(packet) < RTP_HEADER.size + 2:
            return [(channel, packet)]
        timestamp = RTP_HEADER.unpack_from(packet)[3]
        if self._idr_timestamp is None and _nal_type(packet) in (IDR, SPS, PPS):
            self._idr_timestamp = timestamp
        if timestamp != self._idr_timestamp:
            return [(channel, packet)]
        self.dropped += 1
        return []


class CameraClock:
    """A camera's clocks as one wants them: its PTS, and the time of day that it reports before every frame."""

    def __init__(self, offset_s: float | None = 0.0, pts_shift_s: float = 0.0) -> None:
        """offset_s: its time of day minus ours; None reports nothing. pts_shift_s: added to every PTS."""
        self.offset_s = offset_s
        self.pts_shift_s = pts_shift_s
        self.wraps_in_s: float | None = None
        """Move the PTS once, so that its 32 bits overflow after so many seconds."""
        self._is_first_packet = True

    def __call__(self, channel: int, packet: bytes) -> list[tuple[int, bytes]]:
        """Renumber one packet, and put a report before it where a frame begins."""
        if channel % 2:
            return []
        if len(packet) < RTP_HEADER.size:
            return [(channel, packet)]
        flags, kind, sequence, timestamp, sender = RTP_HEADER.unpack_from(packet)
        if self.wraps_in_s is not None:
            self.pts_shift_s = -(timestamp / VIDEO_CLOCK_HZ + self.wraps_in_s)
            self.wraps_in_s = None
        timestamp = (timestamp + round(self.pts_shift_s * VIDEO_CLOCK_HZ)) % 2**32
        head = RTP_HEADER.pack(flags, kind, sequence, timestamp, sender)
        out = [(channel, head + packet[RTP_HEADER.size :])]
        if self._is_first_packet and self.offset_s is not None:
            out.insert(0, (channel + 1, _sender_report(sender, timestamp, time.time() + self.offset_s)))
        # The marker bit ends a frame.
        self._is_first_packet = bool(kind & 0x80)
        return out


def _altered(message: bytes, fault: PacketFault) -> bytes:
    packets = fault(message[1], message[4:])
    return b"".join(b"$" + bytes([channel]) + len(data).to_bytes(2) + data for channel, data in packets)


def _nal_type(packet: bytes) -> int:
    payload = RTP_HEADER.size
    kind = packet[payload] & 0x1F
    return packet[payload + 1] & 0x1F if kind == FRAGMENT else kind


def _sender_report(sender: int, timestamp: int, utc_s: float) -> bytes:
    seconds = int(utc_s)
    fraction = int((utc_s - seconds) * 2**32)
    words = SENDER_REPORT.size // 4 - 1
    return SENDER_REPORT.pack(
        0x80, REPORT_TYPE, words, sender, seconds + NTP_EPOCH_S, fraction, timestamp, 0, 0
    )
