"""The C library's heaps, in programs that run for months."""

from __future__ import annotations

import ctypes

# Of <malloc.h>.
M_ARENA_MAX = -8

# Threads that wait for each other's allocations for microseconds cost less than a heap each.
MOST_HEAPS = 2


def share_heaps() -> None:
    """Let threads share heaps; to be called before they start.

    glibc gives each thread a heap of its own, up to eight for every core, and none shrinks while anything in it
    lives: with cameras that come and go memory creeps up. Other C libraries have no such setting, and no such need.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(M_ARENA_MAX, MOST_HEAPS)
