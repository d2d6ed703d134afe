"""Run every kernel over exactly sized buffers; started by a test with AddressSanitizer loaded. NumPy only.

Arguments: the library, and C and D where it holds dynamic convolutions of one size.
"""

import ctypes
import sys

import numpy as np
from psdiff.kernels.frame_launches import ddim_step_launch, nv12_letterbox_launch, rgb_letterbox_launch
from psdiff.kernels.launches import DeviceArray, dynamic_conv_launch, roi_align_grad_launch, roi_align_launch

BYTES = {"f32": np.float32, "f16": np.uint16, "bf16": np.uint16, "u8": np.uint8}
FLOATS = ("f32", "f16", "bf16")
SIZES = (
    [tuple(map(int, sys.argv[2:]))] if sys.argv[2:] else [(96, 8), (128, 8), (128, 64), (256, 8), (256, 64)]
)
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
for dtype in FLOATS:
    for ratio in (1, 2):
        settings = {"sampling_ratio": ratio, "canonical_size": 224.0}
        sizes = [(1, 9, 13, 24), (1, 5, 7, 24), (1, 3, 4, 24), (1, 1, 1, 24)]
        boxes, tokens = array((1, 5, 4), "f32", BOXES), array((5, 49, 24), dtype)
        run(roi_align_launch([array(size, dtype) for size in sizes], boxes, tokens, **settings))
        grads = [array(size, "f32") for size in sizes]
        run(roi_align_grad_launch(tokens, boxes, grads, **settings))
    for channels, width in SIZES:
        norms = [(array((size,), "f32"), array((size,), "f32")) for size in (width, channels)]
        inputs = array((2, 49, channels), dtype), array((2, 2 * channels * width), dtype)
        for shape in ((2, 49, channels), (2, channels)):
            run(dynamic_conv_launch(*inputs, *norms, array(shape, dtype)))
    boxes, emb, scores = (2, 3, 4), (2, 3, 68), (2, 3)
    run(
        ddim_step_launch(
            (array(boxes, "f32"), array(emb, "f32")),
            (array(scores, dtype), array(boxes, dtype), array(emb, dtype)),
            array((2, 4), "f32", [[0.1, 0.9, 0.2, 0.8]] * 2),
            tuple(array(shape, "f32") for shape in (boxes, emb, boxes, scores, emb)),
            box_scale=2.0,
            embedding_scale=3.0,
        )
    )
for dtype in ("u8", "f16", "f32"):
    for height, width in ((31, 45), (200, 97), (5, 3), (1, 1)):
        canvas = array((24, 40, 3), dtype)
        run(rgb_letterbox_launch(array((height, width, 3), "u8"), canvas))
        chroma = array(((height + 1) // 2, (width + 1) // 2, 2), "u8")
        run(nv12_letterbox_launch(array((height, width), "u8"), chroma, canvas))
print("every kernel ran")
