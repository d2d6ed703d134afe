"""What every decoder on a device gives: frames in main memory, or the reason why it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import av


@dataclass(frozen=True)
class DecoderFinding:
    """One decoder, on this machine."""

    name: str
    is_usable: bool
    reason: str
    """Why it is usable or not, and how to get it."""


class DeviceError(Exception):
    """A device cannot decode a stream, or no longer; the text says why."""


class DeviceDecoder(Protocol):
    """A decoder of one stream, apart from FFmpeg's own on the CPU."""

    def decode(self, packet: av.Packet | None) -> list[av.VideoFrame]:
        """Give the frames that a packet completes; None gives those that are held back.

        Raises FFmpegError where the packet is damaged, DeviceError where the device is lost.
        """
        ...

    def close(self) -> None:
        """Give the device back."""
        ...
