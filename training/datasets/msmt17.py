"""MSMT17, in the form of its release (lists of files; version 1 or 2) or as a copy in the folders of Market-1501.

Source: Wei et al., "Person Transfer GAN to Bridge Domain Gap for Person Re-Identification" (arXiv:1711.08565).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .files import fail, require, require_images
from .market import FOLDERS, read_folder, reid_set
from .schema import Crop, ReidSet

TREE = """\
<root>/train/0000/0000_000_01_0303morning_0015_0.jpg, ...    (mask_train_v2 in version 2)
<root>/test/0000/...                                         (mask_test_v2 in version 2)
<root>/list_train.txt, list_val.txt, list_query.txt, list_gallery.txt
or
<root>/bounding_box_train/0000_c12_....jpg, ...
<root>/query/...
<root>/bounding_box_test/..."""

# Half -> the names of its folder in versions 1 and 2.
_HALVES = {"train": ("train", "mask_train_v2"), "test": ("test", "mask_test_v2")}


def load_msmt17(root: Path) -> ReidSet:
    """Read MSMT17: 32,621 training crops (its train and val lists), 11,659 query and 82,161 gallery crops.

    Cameras are 1..15. The labels of the test half start at 0 again, so they are moved behind the training ones.
    Raises DatasetError for missing files, and for lines or names of another form.
    """
    if (root / FOLDERS[0]).is_dir() and not (root / "list_train.txt").exists():
        train, query, gallery = (read_folder(root, folder, tree=TREE) for folder in FOLDERS)
    else:
        train = [*_read_list(root, "train", "train"), *_read_list(root, "val", "train")]
        query, gallery = _read_list(root, "query", "test"), _read_list(root, "gallery", "test")
        require_images((crop.path for crop in (*train, *query, *gallery)), TREE)
    first_pid = 1 + max(crop.pid for crop in train)
    return reid_set("msmt17", train, _moved(query, first_pid), _moved(gallery, first_pid))


def _moved(crops: Sequence[Crop], first_pid: int) -> list[Crop]:
    return [replace(crop, pid=crop.pid + first_pid) for crop in crops]


def _read_list(root: Path, name: str, half: str) -> list[Crop]:
    """Crops of a list with lines `<relative path> <label>`; the camera is the third part of the file's name."""
    path = root / f"list_{name}.txt"
    require(root, [path.name], TREE)
    folder = _folder(root, half)
    crops = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        try:
            relative, label = line.split()
            crops.append(Crop(folder / relative, int(label), int(Path(relative).name.split("_")[2])))
        except (ValueError, IndexError):
            fail(path, f"must hold lines like `0000/0000_000_01_x.jpg 0`, got {line!r}", TREE)
    if not crops:
        fail(path, "must name files, got none", TREE)
    return crops


def _folder(root: Path, half: str) -> Path:
    found = [root / name for name in _HALVES[half] if (root / name).is_dir()]
    if not found:
        require(root, _HALVES[half][:1], TREE)
    return found[0]
