"""LUPerson: four million crops of street videos, without labels, in an LMDB or a plain folder.

Source: Fu et al., "Unsupervised Pre-training for Person Re-identification" (arXiv:2012.03753) and its release.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import NoReturn

from .files import fail, list_files
from .images import open_lmdb
from .schema import NO_CAMERA, UNLABELLED, Crop, DatasetError, ReidSet

TREE = """\
<root>/keys.pkl
<root>/lmdb/data.mdb    (or <root>/data.mdb)
or
<root>/**/*.jpg"""


def load_luperson(root: Path) -> ReidSet:
    """Read LUPerson: crops for training only, every pid UNLABELLED.

    keys.pkl holds a list of keys, or a dict with that list under "keys"; keys are text or bytes. Without keys.pkl
    and data.mdb the root is searched for .jpg files.
    Raises DatasetError for missing or contradicting files.
    """
    if not root.is_dir():
        fail(root, "must be a folder, got none", TREE)
    lmdb = next((path for path in (root / "lmdb", root) if (path / "data.mdb").exists()), None)
    keys = root / "keys.pkl"
    if lmdb is None and not keys.exists():
        paths = list_files(root, "**/*.jpg", TREE)
        return ReidSet("luperson", [Crop(path, UNLABELLED, NO_CAMERA) for path in paths])
    if lmdb is None:
        fail(root / "lmdb/data.mdb", "must exist beside keys.pkl, got nothing there", TREE)
    if not keys.exists():
        fail(keys, "must exist beside data.mdb, got nothing there", TREE)
    return ReidSet("luperson", [Crop(lmdb, UNLABELLED, NO_CAMERA, key) for key in _read_keys(keys, lmdb)])


def _read_keys(path: Path, lmdb: Path) -> list[str]:
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DatasetError(f"{path} must be a pickled list of keys, got {error}; copy it again") from error
    keys = content.get("keys") if isinstance(content, dict) else content
    if not isinstance(keys, (list, tuple)) or not keys:
        fail(path, 'must hold a list of keys, or one under "keys", got something else', TREE)
    keys = [key.decode() if isinstance(key, bytes) else str(key) for key in keys]
    with open_lmdb(lmdb).begin() as transaction:
        num_entries = transaction.stat()["entries"]
        if num_entries < len(keys) or transaction.get(keys[-1].encode()) is None:
            fail(path, f"must name entries of {lmdb}, got {len(keys)} keys for {num_entries} entries", TREE)
    return keys


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dicts, text and bytes; a pickle that wants to call anything else is refused."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"a pickle that wants {module}.{name}")
