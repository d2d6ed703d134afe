"""Pictures in memory that two processes share: one writes, the other looks at them where they lie.

The memory has no name (memfd): nothing is left when both processes end, however they end, and the small /dev/shm
of a container does not matter. A slot is free again when the last array over it is gone. Linux only.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import weakref

import numpy as np

from .frames import Picture

FREE, FULL = 0, 1

# Pictures begin at multiples of this, as vector instructions like it.
ALIGNMENT = 64


class FrameSlots:
    """A number of slots for pictures of one size at most.

    A state byte a slot comes first, then the slots. The writer fills the lowest free slot, so that pages of slots
    that are never needed are never touched and cost no memory.
    """

    def __init__(self, fd: int, slot_bytes: int, count: int) -> None:
        """Map the memory of a file descriptor, which stays the caller's to close."""
        self.slot_bytes = slot_bytes
        self.count = count
        self.fd = fd
        self._memory = mmap.mmap(fd, _total(slot_bytes, count))

    @classmethod
    def create(cls, slot_bytes: int, count: int) -> FrameSlots:
        """New memory, all slots free; who creates it closes fd. Raises ValueError for a size below 1."""
        if slot_bytes < 1 or count < 1:
            raise ValueError(f"slot_bytes and count must be >= 1, got {slot_bytes} and {count}")
        fd = os.memfd_create("psdiff frames")
        os.ftruncate(fd, _total(slot_bytes, count))
        return cls(fd, slot_bytes, count)

    def write(self, image: Picture) -> int | None:
        """Copy (height, width, 3) uint8 into a free slot; the slot, or None where all are in use.

        Raises ValueError for a picture that is larger than a slot.
        """
        if image.nbytes > self.slot_bytes:
            raise ValueError(f"image must have at most {self.slot_bytes} bytes, got {image.nbytes}")
        slot = self._memory.find(bytes([FREE]), 0, self.count)
        if slot < 0:
            return None
        target = np.frombuffer(self._memory, np.uint8, image.nbytes, self._start(slot))
        np.copyto(target.reshape(image.shape), image)
        self._memory[slot] = FULL
        return slot

    def picture(self, slot: int, height: int, width: int) -> Picture:
        """The picture in a slot, (height, width, 3) uint8, read-only.

        The slot is free when the picture and its views are gone.
        """
        # NumPy's views refer to what owns the memory, so that this owner lives as long as any of them.
        owner = (ctypes.c_ubyte * (height * width * 3)).from_buffer(self._memory, self._start(slot))
        weakref.finalize(owner, self._free, slot).atexit = False
        image = np.frombuffer(memoryview(owner), np.uint8).reshape(height, width, 3)
        image.flags.writeable = False
        return image

    def num_free(self) -> int:
        """Slots that can be written."""
        return self._memory[: self.count].count(FREE)

    def _free(self, slot: int) -> None:
        self._memory[slot] = FREE

    def _start(self, slot: int) -> int:
        return _aligned(self.count) + slot * _aligned(self.slot_bytes)


def _aligned(size: int) -> int:
    return math.ceil(size / ALIGNMENT) * ALIGNMENT


def _total(slot_bytes: int, count: int) -> int:
    return _aligned(count) + count * _aligned(slot_bytes)
