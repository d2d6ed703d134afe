"""The data sets that the city can be written as: the writer of each, and what the set looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .city import Style
from .cuhk03 import write_cuhk03
from .cuhk_sysu import write_cuhk_sysu
from .detection import write_crowdhuman, write_eurocity
from .person_search import write_posetrack21, write_prw
from .reid import write_cuhk03_np, write_dukemtmc, write_luperson, write_market1501, write_msmt17
from .writing import Plan, finished_folder


@dataclass(frozen=True)
class CitySet:
    """A published format, and the look of the frames that the city has in it."""

    write: Callable[[Path, Plan, Style], None]
    style: Style
    images_per_person: int
    """How many images there are for a named person, where nobody asks for a number of people; 0: no names."""


SETS: dict[str, CitySet] = {
    "cuhk-sysu": CitySet(write_cuhk_sysu, Style("cuhk-sysu", num_cameras=48, crowd=4.5, warmth=0.03), 4),
    "prw": CitySet(
        write_prw, Style("prw", num_cameras=6, crowd=4.0, scale=0.9, tilt=0.05, gain=1.05, gamma=0.95), 8
    ),
    "posetrack21": CitySet(
        write_posetrack21, Style("posetrack21", num_cameras=12, crowd=5.0, scale=1.15, blur_sigma=0.5), 8
    ),
    "crowdhuman": CitySet(
        write_crowdhuman, Style("crowdhuman", num_cameras=64, crowd=6.5, scale=1.2, gain=1.1, warmth=0.05), 0
    ),
    "eurocity": CitySet(
        write_eurocity,
        Style("eurocity", num_cameras=16, crowd=3.5, scale=0.65, gain=0.8, warmth=-0.08, noise_sigma=2),
        0,
    ),
    "market1501": CitySet(
        write_market1501, Style("market1501", num_cameras=6, gain=1.1, warmth=0.06, jpeg_quality=85), 16
    ),
    "dukemtmc": CitySet(
        write_dukemtmc, Style("dukemtmc", num_cameras=8, gain=0.85, warmth=-0.05, tilt=0.1), 16
    ),
    "cuhk03-np": CitySet(
        write_cuhk03_np, Style("cuhk03-np", num_cameras=2, gamma=1.2, blur_sigma=0.4, tilt=0.15), 8
    ),
    "cuhk03": CitySet(
        write_cuhk03, Style("cuhk03", num_cameras=10, gamma=1.2, blur_sigma=0.4, tilt=0.15), 20
    ),
    "msmt17": CitySet(
        write_msmt17,
        Style(
            "msmt17", num_cameras=15, gain=0.7, warmth=-0.1, noise_sigma=3, blur_sigma=0.6, jpeg_quality=75
        ),
        24,
    ),
    "luperson": CitySet(write_luperson, Style("luperson", num_cameras=32, tilt=-0.1, jpeg_quality=80), 8),
}


def write_set(name: str, out: Path, plan: Plan) -> None:
    """Write the set of a name to a new folder; it appears when it is complete.

    Raises ValueError for a plan that the set cannot fulfil, and FileExistsError if out holds something else.
    """
    if name not in SETS:
        raise ValueError(f"format must be one of {', '.join(SETS)}, got {name}")
    city_set = SETS[name]
    if bool(plan.people) != bool(city_set.images_per_person):
        raise ValueError(
            f"people must be {'positive' if not plan.people else '0'} for {name}, got {plan.people}"
        )
    settings = {
        "format": name,
        "seed": plan.seed,
        "images": plan.images,
        "people": plan.people,
        "width": plan.width,
        "height": plan.height,
    }
    with finished_folder(out, settings) as folder:
        city_set.write(folder, plan, city_set.style)


def usual_people(name: str, images: int) -> int:
    """Give the number of named people for a number of images; 0 for a set without names."""
    each = SETS[name].images_per_person
    return max(images // each, 4) if each else 0
