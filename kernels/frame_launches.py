"""Launches of the kernels around the network: the letterbox before it, the DDIM step behind its heads; NumPy only.

Legend: B images, N proposals an image, E embedding dimension, h, w frame, H, W canvas.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .launches import ITEM_BYTES, DeviceArray, Launch, check_array, check_dtype

STEP_WARPS = 4
LETTERBOX_THREADS = 256

DDIM_STEP_ARGS = np.dtype(
    [
        *(
            (name, "u8")
            for name in (
                "boxes_t",
                "emb_t",
                "logits",
                "deltas",
                "embeddings",
                "levels",
                "boxes_next",
                "emb_next",
                "boxes_xyxy",
                "scores",
                "unit_embeddings",
            )
        ),
        ("proposals", "i4"),
        ("proposals_per_image", "i4"),
        ("embedding_dim", "i4"),
        ("box_scale", "f4"),
        ("embedding_scale", "f4"),
    ],
    align=True,
)
LETTERBOX_ARGS = np.dtype(
    [
        *((name, "u8") for name in ("first_plane", "chroma_plane", "canvas")),
        *((name, "i4") for name in ("first_pitch", "chroma_pitch", "frame_width", "frame_height")),
        *((name, "i4") for name in ("placed_width", "placed_height", "width", "height")),
        *(
            (name, "f4")
            for name in ("luma_offset", "luma_gain", "red_v", "green_u", "green_v", "blue_u")
        ),
        ("mean", "f4", 3),
        ("inverse_std", "f4", 3),
    ],
    align=True,
)  # fmt: skip

# Shares of red and of blue in luma (ITU-R BT.601 and BT.709).
MATRICES = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}
Matrix = Literal["bt601", "bt709"]


def ddim_step_launch(
    state: tuple[DeviceArray, DeviceArray],
    heads: tuple[DeviceArray, DeviceArray, DeviceArray],
    levels: DeviceArray,
    outputs: tuple[DeviceArray, DeviceArray, DeviceArray, DeviceArray, DeviceArray],
    *,
    box_scale: float,
    embedding_scale: float,
) -> Launch:
    """Decode the heads and move both states to the next timestep; arithmetic of kernels.reference_frame.ddim_step.

    state: boxes_t (B, N, 4) and emb_t (B, N, E), f32. heads: logits (B, N), deltas (B, N, 4) and embeddings
    (B, N, E), one dtype of f32, f16, bf16. levels: (B, 4) f32, signal and noise at t, then at t_next.
    outputs, f32, written: boxes_next, emb_next, boxes_xyxy, scores (B, N), unit embeddings. Raises ValueError.
    """
    boxes_t, emb_t = state
    batch, count, dim = emb_t.shape if len(emb_t.shape) == 3 else (0, 0, 0)
    if not batch * count:
        raise ValueError(f"emb_t must be of shape (B, N, E) with proposals in it, got {emb_t.shape}")
    if dim % 4 or not dim:
        raise ValueError(f"embedding_dim must be a multiple of 4, got {dim}")
    for name, scale in (("box_scale", box_scale), ("embedding_scale", embedding_scale)):
        if not scale > 0:
            raise ValueError(f"{name} must be above 0, got {scale}")
    logits, deltas, embeddings = heads
    check_dtype("logits", logits, ("f32", "f16", "bf16"))
    of_boxes, of_embeddings, of_scores = (batch, count, 4), (batch, count, dim), (batch, count)
    boxes_next, emb_next, boxes_xyxy, scores, unit_embeddings = outputs
    checked = {
        "boxes_t": (boxes_t, of_boxes, "f32"),
        "emb_t": (emb_t, of_embeddings, "f32"),
        "logits": (logits, of_scores, logits.dtype),
        "deltas": (deltas, of_boxes, logits.dtype),
        "embeddings": (embeddings, of_embeddings, logits.dtype),
        "levels": (levels, (batch, 4), "f32"),
        "boxes_next": (boxes_next, of_boxes, "f32"),
        "emb_next": (emb_next, of_embeddings, "f32"),
        "boxes_xyxy": (boxes_xyxy, of_boxes, "f32"),
        "scores": (scores, of_scores, "f32"),
        "unit_embeddings": (unit_embeddings, of_embeddings, "f32"),
    }
    args = np.zeros(1, DDIM_STEP_ARGS)
    for name, (array, shape, dtype) in checked.items():
        check_array(name, array, shape, dtype)
        args[name] = array.pointer
    args["proposals"], args["proposals_per_image"], args["embedding_dim"] = batch * count, count, dim
    args["box_scale"], args["embedding_scale"] = box_scale, embedding_scale
    blocks = -(-batch * count // STEP_WARPS)
    return Launch(f"psdiff_ddim_step_{logits.dtype}", (blocks, 1, 1), 32 * STEP_WARPS, args)


def rgb_letterbox_launch(
    frame: DeviceArray,
    canvas: DeviceArray,
    *,
    pitch: int | None = None,
    mean: tuple[float, float, float] = (0, 0, 0),
    std: tuple[float, float, float] = (1, 1, 1),
) -> Launch:
    """Place an RGB frame (h, w, 3) u8 on a canvas (H, W, 3): u8, or f16 or f32 and normalised.

    mean and std: of 0..255 values, by channel. pitch: bytes from row to row of the frame, default 3w. Arithmetic of
    kernels.reference_frame.letterbox. Raises ValueError.
    """
    if len(frame.shape) != 3 or frame.shape[2] != 3 or not all(frame.shape):
        raise ValueError(f"frame must be of shape (h, w, 3) with pixels in it, got {frame.shape}")
    check_dtype("frame", frame, ("u8",))
    height, width, _ = frame.shape
    args = _placed(width, height, canvas, mean, std)
    args["first_plane"] = frame.pointer
    args["first_pitch"] = _checked_pitch("pitch", pitch, 3 * width)
    return _letterbox("rgb8", canvas, args)


def nv12_letterbox_launch(
    luma: DeviceArray,
    chroma: DeviceArray,
    canvas: DeviceArray,
    *,
    pitches: tuple[int, int] | None = None,
    matrix: Matrix = "bt709",
    full_range: bool = False,
    mean: tuple[float, float, float] = (0, 0, 0),
    std: tuple[float, float, float] = (1, 1, 1),
) -> Launch:
    """Place an NV12 frame on a canvas, as rgb_letterbox_launch does an RGB one.

    luma: (h, w) u8. chroma: (ceil(h / 2), ceil(w / 2), 2) u8, U before V. pitches: bytes from row to row of both,
    default w and 2 ceil(w / 2). matrix and full_range: how the camera encodes colour. Raises ValueError.
    """
    if len(luma.shape) != 2 or not all(luma.shape):
        raise ValueError(f"luma must be of shape (h, w) with pixels in it, got {luma.shape}")
    check_dtype("luma", luma, ("u8",))
    height, width = luma.shape
    of_chroma = (-(-height // 2), -(-width // 2), 2)
    if chroma.shape != of_chroma:
        raise ValueError(f"chroma must be of shape {of_chroma}, got {chroma.shape}")
    check_dtype("chroma", chroma, ("u8",))
    args = _placed(width, height, canvas, mean, std)
    args["first_plane"], args["chroma_plane"] = luma.pointer, chroma.pointer
    luma_pitch, chroma_pitch = pitches or (None, None)
    args["first_pitch"] = _checked_pitch("pitches[0]", luma_pitch, width)
    args["chroma_pitch"] = _checked_pitch("pitches[1]", chroma_pitch, 2 * of_chroma[1])
    for name, value in yuv_to_rgb(matrix, full_range=full_range).items():
        args[name] = value
    return _letterbox("nv12", canvas, args)


def yuv_to_rgb(matrix: Matrix, *, full_range: bool) -> dict[str, float]:
    """The numbers of LetterboxArgs that take 0..255 of Y, U - 128, V - 128 to 0..255 of R, G, B.

    Source: ITU-R BT.601 and BT.709; limited range is 16..235 for luma and 16..240 for chroma. Raises ValueError.
    """
    if matrix not in MATRICES:
        raise ValueError(f"matrix must be bt601 or bt709, got {matrix!r}")
    red, blue = MATRICES[matrix]
    green = 1 - red - blue
    luma_gain, chroma_gain = (1.0, 1.0) if full_range else (255 / 219, 255 / 224)
    return {
        "luma_offset": 0.0 if full_range else 16.0,
        "luma_gain": luma_gain,
        "red_v": chroma_gain * 2 * (1 - red),
        "green_u": -chroma_gain * 2 * (1 - blue) * blue / green,
        "green_v": -chroma_gain * 2 * (1 - red) * red / green,
        "blue_u": chroma_gain * 2 * (1 - blue),
    }


def placed_size(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Width and height of a frame on the canvas, as models.preprocess.Letterbox places it."""
    scale = min(canvas_width / width, canvas_height / height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _placed(
    width: int,
    height: int,
    canvas: DeviceArray,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    if len(canvas.shape) != 3 or canvas.shape[2] != 3 or not all(canvas.shape):
        raise ValueError(f"canvas must be of shape (H, W, 3) with pixels in it, got {canvas.shape}")
    check_dtype("canvas", canvas, ("u8", "f16", "f32"))
    if canvas.pointer % ITEM_BYTES[canvas.dtype]:
        size = ITEM_BYTES[canvas.dtype]
        raise ValueError(f"canvas must start at a multiple of {size} bytes, got {canvas.pointer:#x}")
    if not all(value > 0 for value in std):
        raise ValueError(f"std must be above 0, got {std}")
    args = np.zeros(1, LETTERBOX_ARGS)
    args["frame_width"], args["frame_height"] = width, height
    args["height"], args["width"], _ = canvas.shape
    args["placed_width"], args["placed_height"] = placed_size(width, height, canvas.shape[1], canvas.shape[0])
    args["mean"], args["inverse_std"] = mean, [1 / value for value in std]
    return args


def _checked_pitch(name: str, pitch: int | None, row_bytes: int) -> int:
    if pitch is not None and pitch < row_bytes:
        raise ValueError(f"{name} must be at least the {row_bytes} bytes of a row, got {pitch}")
    return row_bytes if pitch is None else pitch


def _letterbox(source: str, canvas: DeviceArray, args: np.ndarray) -> Launch:
    args["canvas"] = canvas.pointer
    blocks = -(-canvas.shape[0] * canvas.shape[1] // LETTERBOX_THREADS)
    return Launch(f"psdiff_letterbox_{source}_{canvas.dtype}", (blocks, 1, 1), LETTERBOX_THREADS, args)
