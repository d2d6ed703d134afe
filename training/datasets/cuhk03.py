"""CUHK03 as it was released: one MATLAB v7.3 file (HDF5) of images, split by the new protocol's two files.

Sources: Li et al., "DeepReID: Deep Filter Pairing Neural Network for Person Re-Identification" (CVPR 2014); Zhong
et al., "Re-ranking Person Re-identification with k-reciprocal Encoding" (arXiv:1701.08398).
Legend: P people of one pair of cameras.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .files import fail, read_mat, require, text_of
from .images import open_hdf5
from .market import reid_set
from .schema import Crop, ReidSet

TREE = """\
<root>/cuhk03_release/cuhk-03.mat
<root>/cuhk03_new_protocol_config_labeled.mat
<root>/cuhk03_new_protocol_config_detected.mat"""

# Pair of cameras, person of that pair, view (the camera), and column 1..10, five for each view; all from 1.
_NAME = re.compile(r"(\d+)_(\d+)_([12])_(\d+)\.png")


def load_cuhk03_raw(root: Path, kind: Literal["labeled", "detected"] = "labeled") -> ReidSet:
    """Read CUHK03 from cuhk-03.mat in the new protocol: 767 training and 700 test identities, 2 cameras.

    kind: boxes drawn by hand, or by a detector.
    Crops are read from the file, one by one, by read_crop; their key is kind/pair/person/column, from 0.
    Raises DatasetError for missing or contradicting files, ValueError for another kind.
    """
    if kind not in ("labeled", "detected"):
        raise ValueError(f"kind must be labeled or detected, got {kind!r}")
    mat, config = root / "cuhk03_release/cuhk-03.mat", root / f"cuhk03_new_protocol_config_{kind}.mat"
    require(root, [str(path.relative_to(root)) for path in (mat, config)], TREE)
    names = [text_of(name) for name in read_mat(config, ["filelist"], TREE).ravel()]
    pids = read_mat(config, ["labels"], TREE).ravel().astype(np.int64)
    if len(names) != len(pids):
        fail(config, f"must hold a label a file, got {len(pids)} for {len(names)}", TREE)
    crop_of = _finder(mat, config, kind)
    parts = []
    for part in ("train_idx", "query_idx", "gallery_idx"):
        # MATLAB counts from 1.
        chosen = read_mat(config, [part], TREE).ravel().astype(np.int64) - 1
        parts.append([crop_of(names[i], int(pids[i])) for i in chosen])
    return reid_set(f"cuhk03-{kind}", *parts)


def _finder(mat: Path, config: Path, kind: str) -> Callable[[str, int], Crop]:
    """A function from a name of the protocol and its pid to the crop, which it makes sure is there."""
    file: Any = open_hdf5(mat)
    if kind not in file:
        fail(mat, f"must hold the variable {kind}, got {sorted(file)}", TREE)
    # HDF5 sees MATLAB's axes in reverse: a cell of P people by 10 images is (10, P) here.
    pairs: list[NDArray[Any]] = [file[reference][()] for reference in file[kind][()].ravel()]

    def crop_of(name: str, pid: int) -> Crop:
        if not (match := _NAME.fullmatch(name)):
            fail(config, f"must name files like 1_001_1_01.png, got {name}", TREE)
        pair, person, view, column = (int(number) for number in match.groups())
        is_there = (
            pair <= len(pairs) and column <= len(pairs[pair - 1]) and person <= pairs[pair - 1].shape[1]
        )
        # A person may have fewer than five images in a view; the other cells are empty.
        if not is_there or not _is_image(file, pairs[pair - 1][column - 1, person - 1]):
            fail(mat, f"must hold the image {name} of {config.name}, got an empty cell", TREE)
        return Crop(mat, pid, view, f"{kind}/{pair - 1}/{person - 1}/{column - 1}")

    return crop_of


def _is_image(file: Any, reference: Any) -> bool:  # noqa: ANN401
    return bool(reference) and file[reference].ndim == 3
