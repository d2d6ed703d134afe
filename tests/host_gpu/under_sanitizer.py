"""Run every kernel over exactly sized buffers; started by a test with AddressSanitizer loaded. NumPy only."""

import ctypes
import sys

import numpy as np
from psdiff.kernels.launches import DeviceArray, dynamic_conv_launch, roi_align_grad_launch, roi_align_launch

BYTES = {"f32": np.float32, "f16": np.uint16, "bf16": np.uint16}
library = ctypes.CDLL(sys.argv[1])
library.launch_on_host.restype = ctypes.c_char_p
kept = []


def array(shape, dtype, values=None):
    """A buffer of its own; the sanitizer guards both its ends. 16-bit values are small positive numbers."""
    buffer = np.zeros(shape, BYTES[dtype]) if values is None else np.array(values, BYTES[dtype])
    kept.append(buffer)
    return DeviceArray(buffer.ctypes.data, tuple(shape), dtype)


def run(launch):
    problem = library.launch_on_host(
        getattr(library, launch.entry),
        (ctypes.c_uint * 3)(*launch.grid),
        launch.threads,
        launch.args.ctypes.data_as(ctypes.c_void_p),
        3,
    )
    assert not problem, problem


nan, far = np.nan, np.inf
BOXES = [[[0, 0, 9, 9], [-50, -50, 500, 500], [nan] * 4, [-far, -far, far, far], [30, 20, 10, 5]]]
for dtype in BYTES:
    for ratio in (1, 2):
        settings = {"sampling_ratio": ratio, "canonical_size": 224.0}
        sizes = [(1, 9, 13, 24), (1, 5, 7, 24), (1, 3, 4, 24), (1, 1, 1, 24)]
        boxes, tokens = array((1, 5, 4), "f32", BOXES), array((5, 49, 24), dtype)
        run(roi_align_launch([array(size, dtype) for size in sizes], boxes, tokens, **settings))
        grads = [array(size, "f32") for size in sizes]
        run(roi_align_grad_launch(tokens, boxes, grads, **settings))
    for channels, width in ((96, 8), (128, 8), (128, 64), (256, 8), (256, 64)):
        norms = [(array((size,), "f32"), array((size,), "f32")) for size in (width, channels)]
        inputs = array((2, 49, channels), dtype), array((2, 2 * channels * width), dtype)
        for shape in ((2, 49, channels), (2, channels)):
            run(dynamic_conv_launch(*inputs, *norms, array(shape, dtype)))
print("every kernel ran")
