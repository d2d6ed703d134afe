"""The raw release of CUHK03 from the city: cuhk-03.mat, a MATLAB 7.3 (HDF5) file, and the new test protocol.

MATLAB stores arrays by columns, so that HDF5 shows every one transposed: images as (3, width, height), the table
of a camera pair as (10, identities).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .city import City, Style
from .reid import crops_city
from .writing import Plan, cell, draw_all, write_mat

if TYPE_CHECKING:
    import h5py

PAIR_SIZES = (843, 440, 77, 58, 49)
"""Identities before each of the five pairs of cameras in the release; the city has the same shares."""

SHOTS_PER_VIEW = 5
_SIZE = (60, 160)
_SLACK = {"labeled": 0.02, "detected": 0.09}
# Share of the shots that are not there: nobody was found, or there were fewer.
_MISSING = {"labeled": 0.05, "detected": 0.1}
_NUM_TEST_SETS, _TEST_SET_SIZE = 20, 100


@dataclass(frozen=True)
class _Slot:
    """A place for an image: camera pair, identity in the pair, and column of the table; all count from 0."""

    kind: str
    pair: int
    row: int
    column: int
    pid: int

    @property
    def view(self) -> int:
        """0 or 1: the camera of the pair."""
        return self.column // SHOTS_PER_VIEW

    @property
    def file_name(self) -> str:
        """The name that loaders give to the extracted image."""
        return f"{self.pair + 1:01d}_{self.row + 1:03d}_{self.view + 1:01d}_{self.column + 1:02d}.png"


def write_cuhk03(root: Path, plan: Plan, style: Style) -> None:
    """Write a set as CUHK03 is released: cuhk03_release/cuhk-03.mat and the two files of the new protocol.

    plan.images counts nothing here: an identity has up to ten images of each kind.
    """
    city = crops_city(plan, style)
    if len(city.cameras) != 2 * len(PAIR_SIZES):
        raise ValueError(f"num_cameras must be {2 * len(PAIR_SIZES)}, got {len(city.cameras)}")
    pairs = _pairs(len(city.people))
    slots = [slot for kind in _SLACK for slot in _slots(kind, pairs, plan.seed)]
    images = dict(zip(slots, draw_all(city, _draw_slot, slots, plan), strict=True))
    _write_release(root / "cuhk03_release" / "cuhk-03.mat", images, pairs, city)
    for kind in _SLACK:
        chosen = [slot for slot in slots if slot.kind == kind]
        write_mat(root / f"cuhk03_new_protocol_config_{kind}.mat", _new_protocol(chosen, city))


def _pairs(num_people: int) -> list[list[int]]:
    """Share the identities out to the pairs of cameras, in shuffled but fixed order; nobody is in two."""
    ends = np.rint(np.cumsum([0, *PAIR_SIZES]) / sum(PAIR_SIZES) * num_people).astype(int)
    order = np.random.default_rng(num_people).permutation(num_people).tolist()
    return [order[start:end] for start, end in pairwise(ends)]


def _slots(kind: str, pairs: list[list[int]], seed: int) -> list[_Slot]:
    """List the images that exist; at least two of each view, so that every query has a match."""
    rng = np.random.default_rng([seed, list(_SLACK).index(kind)])
    return [
        _Slot(kind, pair, row, column, pid)
        for pair, pids in enumerate(pairs)
        for row, pid in enumerate(pids)
        for column in range(2 * SHOTS_PER_VIEW)
        if column % SHOTS_PER_VIEW < 2 or rng.random() >= _MISSING[kind]
    ]


def _draw_slot(city: City, slot: _Slot) -> np.ndarray:
    return city.crop(slot.pid, 2 * slot.pair + slot.view, slot.column, size=_SIZE, slack=_SLACK[slot.kind])


def _write_release(path: Path, images: dict[_Slot, np.ndarray], pairs: list[list[int]], city: City) -> None:
    import h5py

    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        content = file.create_group("#refs#")
        for kind in _SLACK:
            tables = []
            for pair, pids in enumerate(pairs):
                table = np.full((2 * SHOTS_PER_VIEW, len(pids)), None, object)
                for slot, image in images.items():
                    if (slot.kind, slot.pair) == (kind, pair):
                        table[slot.column, slot.row] = image.transpose(2, 1, 0)
                tables.append(_cell_of(content, table))
            file.create_dataset(kind, data=_references(np.array([tables], object)))
        test_sets = [_stored(content, rows.T) for rows in _test_sets(pairs, city)]
        file.create_dataset("testsets", data=_references(np.array([test_sets], object)))


def _cell_of(content: h5py.Group, table: np.ndarray) -> h5py.Reference:
    """Store a cell of images as references to them, and give the reference to the cell."""
    references = np.empty(table.shape, object)
    for place, image in np.ndenumerate(table):
        if image is None:
            # MATLAB stores an empty array as its size.
            references[place] = _stored(content, np.zeros(2, np.uint64), empty=True)
        else:
            references[place] = _stored(content, image)
    return _stored(content, _references(references))


def _references(table: np.ndarray) -> np.ndarray:
    import h5py

    return table.astype(h5py.ref_dtype)


def _stored(content: h5py.Group, array: np.ndarray, *, empty: bool = False) -> h5py.Reference:
    """Store an array under the next free name and give the reference to it."""
    stored = content.create_dataset(f"{len(content):06d}", data=array)
    if empty:
        stored.attrs["MATLAB_empty"] = np.uint8(1)
    return stored.ref


def _test_sets(pairs: list[list[int]], city: City) -> list[np.ndarray]:
    """Draw the 20 test sets of the old protocol: float64 (n, 2) rows of pair and identity, from 1."""
    places = np.array([(p + 1, row + 1) for p, pids in enumerate(pairs) for row in range(len(pids))], float)
    size = min(_TEST_SET_SIZE, city.num_test_people)
    rng = np.random.default_rng(len(places))
    return [places[np.sort(rng.permutation(len(places))[:size])] for _ in range(_NUM_TEST_SETS)]


def _new_protocol(slots: list[_Slot], city: City) -> dict[str, np.ndarray]:
    """Give the variables of the new protocol: labels from 1, cameras 1 and 2, and indices from 1."""
    is_test = np.array([slot.pid >= city.num_train_people for slot in slots])
    is_query = is_test & np.array([slot.column % SHOTS_PER_VIEW == 0 for slot in slots])
    column = {
        "labels": [slot.pid + 1 for slot in slots],
        "camId": [slot.view + 1 for slot in slots],
        "train_idx": np.flatnonzero(~is_test) + 1,
        "query_idx": np.flatnonzero(is_query) + 1,
        "gallery_idx": np.flatnonzero(is_test & ~is_query) + 1,
    }
    variables = {name: np.array(values, np.float64)[:, None] for name, values in column.items()}
    return {"filelist": cell([slot.file_name for slot in slots]), **variables}
