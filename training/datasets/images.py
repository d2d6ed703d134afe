"""Pixels of images and crops, from image files, from an LMDB or from HDF5.

Containers are opened when the first crop of them is read, once a process, and stay open. A forked process opens
its own; crops themselves hold only paths, so they can be pickled and sent anywhere.
Legend: H height, W width in pixels.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

from .schema import Crop, DatasetError, LabelledImage

if TYPE_CHECKING:
    import h5py
    import lmdb

Picture = NDArray[np.uint8]

_environments: dict[Path, lmdb.Environment] = {}
_hdf5_files: dict[Path, h5py.File] = {}

# LMDB refuses to open one folder twice in a process, so two threads must not try at once.
_opening = threading.RLock()


def read_image(image: LabelledImage) -> Picture:
    """Pixels (H, W, 3), uint8 RGB, as stored: an orientation tag is not applied, for boxes know none.

    Raises DatasetError if the file is missing or is no image.
    """
    return _read_file(image.path)


def read_crop(crop: Crop) -> Picture:
    """Pixels (H, W, 3), uint8 RGB, of a crop from its file or container.

    Raises DatasetError if the file, or the crop in its container, is missing or is no image.
    """
    if not crop.key:
        return _read_file(crop.path)
    if crop.path.suffix == ".mat":
        return _read_hdf5(crop)
    with open_lmdb(crop.path).begin() as transaction:
        content = transaction.get(crop.key.encode())
    return _decode(content or b"", f"entry {crop.key} of {crop.path}")


def open_lmdb(path: Path) -> lmdb.Environment:
    """The LMDB of a folder, read-only, one for each process. Raises DatasetError if it cannot be opened."""
    import lmdb

    path = path.absolute()
    with _opening:
        if path not in _environments:
            try:
                _environments[path] = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
            except lmdb.Error as error:
                raise DatasetError(f"{path} must be a folder with an LMDB, got {error}") from error
        return _environments[path]


def open_hdf5(path: Path) -> h5py.File:
    """The HDF5 file, read-only, one for each process. Raises DatasetError if it cannot be opened."""
    import h5py

    path = path.absolute()
    with _opening:
        if path not in _hdf5_files:
            try:
                _hdf5_files[path] = h5py.File(path, "r")
            except OSError as error:
                raise DatasetError(
                    f"{path} must be an HDF5 file (MATLAB v7.3), got {error}; copy it again"
                ) from error
        return _hdf5_files[path]


def _start_anew() -> None:
    """In a forked process: close what came from the parent, whose own handles stay open."""
    for containers in (_environments, _hdf5_files):
        for container in containers.values():
            container.close()
        containers.clear()
    _opening.release()


# The lock is held over a fork, so that no half-opened container is inherited.
os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_start_anew)


def _read_file(path: Path) -> Picture:
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise DatasetError(f"{path} must be an image file that can be read, got {error}") from error


def _decode(content: bytes, name: str) -> Picture:
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    picture = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    if picture is None:
        raise DatasetError(
            f"{name} must be an image, got {len(content)} bytes of something else; copy it again"
        )
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), dtype=np.uint8)


def _read_hdf5(crop: Crop) -> Picture:
    """An image of CUHK03: variable/pair/person/column, through two levels of references."""
    file: Any = open_hdf5(crop.path)
    try:
        variable, pair, person, column = crop.key.split("/")
        pairs = file[variable][()].ravel()
        cell = file[pairs[int(pair)]]
        stored = file[cell[int(column), int(person)]][()]
    except (KeyError, IndexError, ValueError) as error:
        raise DatasetError(f"{crop.path} must hold the crop {crop.key}, got {error}") from error
    if stored.ndim != 3:
        raise DatasetError(f"{crop.path} must hold an image as {crop.key}, got an empty cell")
    # MATLAB stores (H, W, 3) column by column, which HDF5 shows as (3, W, H).
    return np.ascontiguousarray(stored.T, dtype=np.uint8)
