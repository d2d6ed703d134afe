"""Clips of the synthetic street: an H.264 file of one camera, and beside it the truth about every frame."""

from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import av
from pydantic import BaseModel, ConfigDict

from .composition import LabelledFrame
from .street import Street

CODE_DECIMALS = 5


class FrameTruth(BaseModel):
    """Who can be seen in one frame, and where; M people."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    boxes_xyxy: list[tuple[float, float, float, float]]
    """(M, 4) pixels, one decimal."""
    pids: list[int]
    """(M,) indices into ClipTruth.codes."""
    visibility: list[float]
    """(M,) in [0, 1], two decimals."""


class ClipTruth(BaseModel):
    """What a clip shows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int
    camera: int
    fps: float
    width: int
    height: int
    codes: list[list[float]]
    """Appearance code of everybody in the cast, whether seen in this clip or not."""
    frames: list[FrameTruth]


def truth_path(clip: Path) -> Path:
    """Give the path of the truth that belongs to a clip."""
    return clip.with_name(f"{clip.stem}.truth.json")


def read_truth(path: Path) -> ClipTruth:
    """Read a truth file. Raises FileNotFoundError, or pydantic.ValidationError if it is not one."""
    return ClipTruth.model_validate_json(path.read_bytes())


def write_clip(
    street: Street,
    camera: int,
    path: Path,
    *,
    fps: float = 10.0,
    duration_s: float | None = None,
    on_frame: Callable[[], None] | None = None,
) -> None:
    """Write what one camera sees as an mp4 file, and the truth as <stem>.truth.json beside it.

    duration_s: from the start; None writes the whole duration of the street.
    on_frame: called after every frame. Files appear under their names only when complete.
    Raises ValueError unless fps > 0, the clip has a frame and the sides are even, as yuv420p needs.
    """
    num_frames = round((duration_s if duration_s is not None else street.duration_s) * fps)
    if fps <= 0 or num_frames < 1:
        raise ValueError(
            f"fps must be positive and the clip hold at least one frame, got {fps} and {num_frames}"
        )
    if street.width % 2 or street.height % 2:
        raise ValueError(f"width and height must be even, got {street.width} x {street.height}")
    # The ending stays: it tells the muxer the format.
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    partial_truth = truth_path(partial)
    try:
        frames = _encode(street, camera, partial, fps, num_frames, on_frame)
        partial_truth.write_text(_truth(street, camera, fps, frames).model_dump_json())
        partial_truth.replace(truth_path(path))
        partial.replace(path)
    finally:
        for leftover in (partial, partial_truth):
            with suppress(FileNotFoundError):
                leftover.unlink()


def _encode(
    street: Street,
    camera: int,
    path: Path,
    fps: float,
    num_frames: int,
    on_frame: Callable[[], None] | None,
) -> list[FrameTruth]:
    """Write the pictures to a file and give the truth of each."""
    truths: list[FrameTruth] = []
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = street.width, street.height, "yuv420p"
        stream.options = {"crf": "20", "preset": "veryfast"}
        for number in range(num_frames):
            labelled = street.frame(camera, number / fps)
            picture = av.VideoFrame.from_ndarray(labelled.image, format="rgb24")
            container.mux(stream.encode(picture))
            truths.append(_frame_truth(labelled))
            if on_frame is not None:
                on_frame()
        container.mux(stream.encode())
    return truths


def _frame_truth(labelled: LabelledFrame) -> FrameTruth:
    boxes = [tuple(round(float(side), 1) for side in box) for box in labelled.boxes_xyxy]
    return FrameTruth(
        boxes_xyxy=[(left, top, right, bottom) for left, top, right, bottom in boxes],
        pids=labelled.pids.tolist(),
        visibility=[round(float(share), 2) for share in labelled.visibility],
    )


def _truth(street: Street, camera: int, fps: float, frames: list[FrameTruth]) -> ClipTruth:
    return ClipTruth(
        seed=street.seed,
        camera=camera,
        fps=fps,
        width=street.width,
        height=street.height,
        codes=[[round(float(value), CODE_DECIMALS) for value in code] for code in street.codes],
        frames=frames,
    )
