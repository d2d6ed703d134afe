"""Data sets by name, as the command line takes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from .cuhk03 import load_cuhk03_raw
from .cuhk_sysu import load_cuhk_sysu
from .detection import load_crowdhuman, load_eurocity_persons
from .luperson import load_luperson
from .market import load_cuhk03_np, load_dukemtmc, load_market1501
from .msmt17 import load_msmt17
from .posetrack21 import load_posetrack21
from .prw import load_prw
from .schema import DetectionSet, PersonSearchSet, ReidSet

PERSON_SEARCH_SETS = ("cuhk-sysu", "prw", "posetrack21")

DETECTION_SETS: dict[str, Callable[[Path], DetectionSet]] = {
    "crowdhuman": load_crowdhuman,
    "eurocity-day": partial(load_eurocity_persons, time="day"),
    "eurocity-night": partial(load_eurocity_persons, time="night"),
}

REID_SETS: dict[str, Callable[[Path], ReidSet]] = {
    "market1501": load_market1501,
    "dukemtmc": load_dukemtmc,
    "cuhk03-np-labeled": partial(load_cuhk03_np, kind="labeled"),
    "cuhk03-np-detected": partial(load_cuhk03_np, kind="detected"),
    "cuhk03-labeled": partial(load_cuhk03_raw, kind="labeled"),
    "cuhk03-detected": partial(load_cuhk03_raw, kind="detected"),
    "msmt17": load_msmt17,
    "luperson": load_luperson,
}


def load_person_search(
    name: str, root: Path, *, gallery_size: int = 100, cross_camera: bool = False, compat: bool = False
) -> PersonSearchSet:
    """Read one of PERSON_SEARCH_SETS from the folder of its release.

    gallery_size: of CUHK-SYSU; cross_camera, compat: of PRW. The other sets pass them over.
    Raises ValueError for another name, DatasetError for missing or contradicting files.
    """
    if name == "cuhk-sysu":
        return load_cuhk_sysu(root, gallery_size=gallery_size)
    if name == "prw":
        return load_prw(root, cross_camera=cross_camera, compat=compat)
    if name == "posetrack21":
        return load_posetrack21(root)
    raise ValueError(f"name must be one of {PERSON_SEARCH_SETS}, got {name!r}")


def load_detection(name: str, root: Path) -> DetectionSet:
    """Read one of DETECTION_SETS. Raises ValueError for another name, DatasetError for missing files."""
    if name not in DETECTION_SETS:
        raise ValueError(f"name must be one of {tuple(DETECTION_SETS)}, got {name!r}")
    return DETECTION_SETS[name](root)


def load_reid(name: str, root: Path) -> ReidSet:
    """Read one of REID_SETS. Raises ValueError for another name, DatasetError for missing files."""
    if name not in REID_SETS:
        raise ValueError(f"name must be one of {tuple(REID_SETS)}, got {name!r}")
    return REID_SETS[name](root)
