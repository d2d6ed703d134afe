"""How every set reaches the disk: drawn by several processes, and visible under its name only when complete.

Same plan, same bytes: nothing that is written holds a time of day.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np

from .city import City

Job = TypeVar("Job")
Result = TypeVar("Result")

MARKER = "synth.json"
"""The file in a finished folder that says what it holds; a folder with it may be written anew."""

TRAIN_SHARE = 0.6
JOBS_PER_WORKER = 32
"""Fewer images are not worth the second that a process takes to start."""

# The text at the head of a MAT file, where scipy would write the time.
_MAT_HEAD_BYTES = 116


@dataclass(frozen=True)
class Plan:
    """How much of a set to draw, and with how many processes. Raises ValueError for what cannot be drawn."""

    images: int
    """Frames, or crops in a ReID set."""
    people: int
    """Named people of both splits; 0 in a detection set, which names nobody."""
    seed: int = 7
    width: int = 640
    """Of frames, in pixels; crops have the usual size of their set."""
    height: int = 384
    workers: int = 1
    report: Callable[[int, int], None] = lambda _done, _total: None
    """Called with the numbers of images that are drawn, and that will be drawn."""

    def __post_init__(self) -> None:
        if self.people and not 4 <= self.people <= self.images // 3:
            raise ValueError(
                "people must be at least 4 and at most a third of the images, so that everybody is seen twice "
                f"in each split, got {self.people} people and {self.images} images"
            )
        if self.images < 4:
            raise ValueError(f"images must be at least 4, got {self.images}")
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")

    @property
    def train_images(self) -> int:
        """Number of training frames."""
        return round(TRAIN_SHARE * self.images)

    @property
    def train_people(self) -> int:
        """Number of training identities."""
        return round(TRAIN_SHARE * self.people)

    @property
    def test_people(self) -> int:
        """Number of test identities."""
        return self.people - self.train_people


@contextmanager
def finished_folder(out: Path, settings: dict[str, Any]) -> Iterator[Path]:
    """Give a folder <out>.partial to write to, which takes the name out when everything went well.

    settings: written into MARKER. An out that is empty or has that file is replaced.
    Raises FileExistsError for any other.
    """
    out = out.resolve()
    partial_out = out.with_name(f"{out.name}.partial")
    for folder in (out, partial_out):
        _check_replaceable(folder)
    _remove(partial_out)
    partial_out.mkdir(parents=True)
    try:
        (partial_out / MARKER).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        yield partial_out
        _remove(out)
        partial_out.rename(out)
    finally:
        _remove(partial_out)


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).is_file()):
        raise FileExistsError(
            f"out must be a new or empty folder, or one that psdiff synth wrote, got {folder}; "
            "name another or remove it"
        )


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def draw_all(
    city: City, draw: Callable[[City, Job], Result], jobs: Sequence[Job], plan: Plan
) -> list[Result]:
    """Give draw(city, job) of every job, in order, drawn by plan.workers processes.

    draw: a function of a module, which other processes can import. With more than one worker a script that
    calls this needs the usual `if __name__ == "__main__"`.
    """
    plan.report(0, len(jobs))
    results: list[Result] = []
    with _results(city, draw, jobs, plan.workers) as found:
        for result in found:
            results.append(result)
            plan.report(len(results), len(jobs))
    return results


@contextmanager
def _results(
    city: City, draw: Callable[[City, Job], Result], jobs: Sequence[Job], workers: int
) -> Iterator[Iterator[Result]]:
    workers = min(workers, len(jobs) // JOBS_PER_WORKER)
    if workers <= 1:
        num_threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            yield (draw(city, job) for job in jobs)
        finally:
            cv2.setNumThreads(num_threads)
        return
    # Not fork: the progress bar has a thread, and a fork may copy its lock while it is held.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(city,))
    try:
        chunk = min(max(len(jobs) // (4 * workers), 1), 16)
        yield pool.map(partial(_draw, draw), jobs, chunksize=chunk)
    finally:
        pool.shutdown(cancel_futures=True)


_cities: list[City] = []


def _begin(city: City) -> None:
    """Prepare a process: its city, one thread, and the interrupt left to the process that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    cv2.setNumThreads(1)
    _cities[:] = [city]


def _draw(draw: Callable[[City, Job], Result], job: Job) -> Result:
    return draw(_cities[0], job)


def write_image(path: Path, image: np.ndarray, *, jpeg_quality: int = 92) -> None:
    """Write uint8 RGB as JPEG or PNG, by the ending of the path; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_image(image, path.suffix, jpeg_quality=jpeg_quality))


def encode_image(image: np.ndarray, suffix: str, *, jpeg_quality: int = 92) -> bytes:
    """Compress uint8 RGB as ".jpg" or ".png"."""
    options = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality] if suffix == ".jpg" else []
    return cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def write_mat(path: Path, variables: dict[str, np.ndarray]) -> None:
    """Write a MATLAB 5 file whose bytes depend on the variables only; the folder is made."""
    from scipy.io import savemat

    buffer = io.BytesIO()
    savemat(buffer, variables)
    content = bytearray(buffer.getvalue())
    content[:_MAT_HEAD_BYTES] = b"MATLAB 5.0 MAT-file, written by psdiff synth".ljust(_MAT_HEAD_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def cell(values: Sequence[Any]) -> np.ndarray:
    """Give a MATLAB cell of shape (n, 1)."""
    array = np.empty((len(values), 1), object)
    for row, value in enumerate(values):
        array[row, 0] = value
    return array


def struct(fields: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
    """Give a MATLAB struct array of shape (1, n); a row holds the values of the fields."""
    array = np.empty((1, len(rows)), [(field, object) for field in fields])
    for column, row in enumerate(rows):
        array[0, column] = row
    return array


def write_json(path: Path, content: object) -> None:
    """Write JSON in one line; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
