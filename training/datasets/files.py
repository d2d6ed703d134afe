"""Opens the files of a data set; whatever is missing or damaged is named beside the tree that should be there.

A tree is a short text that each reader holds as TREE: the folders and files below the root that a user gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from .schema import DatasetError


def fail(path: Path, complaint: str, tree: str) -> NoReturn:
    """Raise DatasetError: `<path> <complaint>`, then the expected tree."""
    raise DatasetError(f"{path} {complaint}; the expected tree is\n{tree}")


def require(root: Path, relative: Iterable[str], tree: str) -> None:
    """Check that the root and every path below it exist. Raises DatasetError with the first that does not."""
    for path in (root, *(root / name for name in relative)):
        if not path.exists():
            fail(path, "must exist, got nothing there", tree)


def require_images(paths: Iterable[Path], tree: str) -> None:
    """Check that every image file exists; each folder is listed once, for a set has up to 130,000 files.

    Raises DatasetError with the first missing file and how many are missing.
    """
    folders: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in folders:
            folders[path.parent] = {p.name for p in path.parent.iterdir()} if path.parent.is_dir() else set()
        if path.name not in folders[path.parent]:
            missing.append(path)
    if missing:
        fail(missing[0], f"must exist, got nothing there ({len(missing)} image files are missing)", tree)


def list_files(folder: Path, pattern: str, tree: str) -> list[Path]:
    """Files of a folder that match, by name. Raises DatasetError if there are none."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        fail(folder, f"must hold files {pattern}, got none", tree)
    return paths


def read_mat(path: Path, keys: Sequence[str], tree: str) -> NDArray[Any]:
    """Read the first variable of a MATLAB v5 file that goes by one of the keys.

    Raises DatasetError if the file is missing or damaged, or holds none of the keys.
    """
    from scipy.io import loadmat

    require(path, (), tree)
    try:
        variables = loadmat(path)
    except Exception as error:  # a truncated file raises anything from TypeError to zlib.error
        raise DatasetError(f"{path} must be a MATLAB v5 file, got {error}; copy it again") from error
    for key in keys:
        if key in variables:
            return variables[key]
    found = sorted(name for name in variables if not name.startswith("__"))
    fail(path, f"must hold the variable {' or '.join(keys)}, got {found}", tree)


def read_json(path: Path, text: str | None = None) -> Any:  # noqa: ANN401
    """Parse a JSON file, or a text taken from it. Raises DatasetError if it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8") if text is None else text)
    except ValueError as error:
        raise DatasetError(f"{path} must be JSON, got {error}; copy it again") from error


def text_of(value: NDArray[Any]) -> str:
    """Unwrap the one string of a MATLAB cell or field, however many axes it came with."""
    return str(np.ravel(value)[0])
