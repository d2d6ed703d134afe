"""Threads of a program that asked for it share heaps; what glibc maps for them tells."""

import platform
import subprocess
import sys

import pytest

# Each thread holds a block that is too small for a mapping of its own, so that it needs a heap.
PROGRAM = """
import ctypes, sys, threading
from psdiff.runtime.heaps import share_heaps
if sys.argv[1] == "shared":
    share_heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
held, done = threading.Barrier(13), threading.Event()
def hold():
    libc.malloc(4096)
    held.wait()
    done.wait()
threads = [threading.Thread(target=hold) for _ in range(12)]
for thread in threads:
    thread.start()
held.wait()
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.fdopen.restype = ctypes.c_void_p
libc.fdopen.argtypes = [ctypes.c_int, ctypes.c_char_p]
libc.fflush.argtypes = [ctypes.c_void_p]
out = libc.fdopen(1, b"w")
libc.malloc_info(0, out)
libc.fflush(out)
done.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_threads_share_two_heaps():
    heaps = {}
    for how in ("own", "shared"):
        told = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, timeout=60
        )
        assert told.returncode == 0, told.stderr
        heaps[how] = told.stdout.count("<heap nr=")
    assert heaps["shared"] <= 2 < heaps["own"]
