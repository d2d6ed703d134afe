"""The synthetic city: named people and strangers before mounted cameras, as whole frames and as single crops.

A frame is a function of the city's seed, the split and the frame's number, a crop of the person, the camera and
the shot, whatever was drawn before: several processes can draw a set in any order. What is written to disk, and
how, is the business of the other modules of this folder.
Legend: M labelled people of one frame.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from ..datasets.schema import UNLABELLED
from ..synthetic.cameras import Camera
from ..synthetic.composition import LabelledFrame, Standing, compose
from ..synthetic.figures import sprite_origin
from ..synthetic.people import Person, appearance_code, random_person
from ..synthetic.props import draw_prop
from ..synthetic.street import MAX_PEOPLE, mounted_camera, pose_sprite, random_occluder

Split = Literal["train", "test"]

STRANGER_SHARE = 0.3
"""Share of the labelled boxes that show people without a name."""

MIN_WIDTH, MIN_HEIGHT = 96, 64
_LEAD_PX = 44
_SMALLEST = 24 / 384

# First numbers of the seeds of frames, crops and new people.
_SEED_SPLIT, _SEED_CROP, _SEED_STRANGER = {"train": 1, "test": 2}, 3, 4
# The pid of strangers while a frame is composed, where -1 stands for things.
_STRANGER = -2


@dataclass(frozen=True)
class Style:
    """What makes a data set look like itself, so that there is a domain gap between two of them."""

    name: str = "city"
    """Part of the seed: two names show different people in different places."""
    num_cameras: int = 6
    crowd: float = 4.5
    """Mean number of people in a frame, in (0, MAX_PEOPLE)."""
    scale: float = 1.0
    """Factor of the size of people in frames."""
    tilt: float = 0.0
    """Added to the tilt of the cameras: 0 at eye level .. 1 looking down steeply."""
    gain: float = 1.0
    warmth: float = 0.0
    """Added to the factor of red and taken from that of blue."""
    gamma: float = 1.0
    noise_sigma: float = 0.0
    """Added to that of the cameras, in grey levels."""
    blur_sigma: float = 0.0
    """Added to that of the cameras, in pixels."""
    jpeg_quality: int = 92
    """Of the written files, 1..100."""


@dataclass(frozen=True)
class _Spot:
    """Where somebody stands: the point between the feet, and the height of an average body there, in pixels."""

    x: float
    row: float
    person_px: float

    def is_hidden_by(self, left: float, top: float, right: float, row: float) -> bool:
        """Say whether something with these bounds, standing on a row, could cover the person."""
        reach = 0.3 * self.person_px
        return row >= self.row and left < self.x + reach and right > self.x - reach and top < self.row


class City:
    """A pool of people with names, split into train and test identities, and the cameras that see them.

    pids: 0 .. num_train_people - 1 are the train identities, the next num_test_people the test identities.
    In every frame one named person, the lead, stands in full view. Everybody leads in turn: in the first
    2 x people frames of a split each person leads twice, before two cameras.
    """

    def __init__(
        self,
        seed: int,
        *,
        num_cameras: int | None = None,
        num_train_people: int = 40,
        num_test_people: int = 20,
        style: Style | None = None,
        width: int = 640,
        height: int = 384,
    ) -> None:
        self.style = style or Style()
        num_cameras = self.style.num_cameras if num_cameras is None else num_cameras
        _check(seed, num_cameras, num_train_people, num_test_people)
        if width < MIN_WIDTH or height < MIN_HEIGHT:
            raise ValueError(
                f"width and height must be at least {MIN_WIDTH} x {MIN_HEIGHT}, got {width} x {height}"
            )
        if not 0 < self.style.crowd < MAX_PEOPLE:
            raise ValueError(f"crowd must be between 0 and {MAX_PEOPLE}, got {self.style.crowd}")
        self.width, self.height = width, height
        self.num_train_people, self.num_test_people = num_train_people, num_test_people
        self._entropy = [seed, zlib.crc32(self.style.name.encode())]
        rng = np.random.default_rng([*self._entropy, 0])
        self.people = [random_person(rng) for _ in range(num_train_people + num_test_people)]
        self.cameras = [_styled_camera(rng, number, self.style) for number in range(num_cameras)]
        self._scenes: dict[int, np.ndarray] = {}

    def pids(self, split: Split) -> range:
        """Give the identities of a split."""
        if split == "train":
            return range(self.num_train_people)
        return range(self.num_train_people, len(self.people))

    def cast(self, split: Split, index: int) -> tuple[int, int | None]:
        """Give the camera of a frame, and the pid of its lead; None where the split has no names."""
        pids = self.pids(split)
        if not pids:
            return index % len(self.cameras), None
        turn, place = divmod(index, len(pids))
        return (place + turn) % len(self.cameras), pids[place]

    def frame(self, split: Split, index: int) -> LabelledFrame:
        """Draw one frame of a split, with 0..MAX_PEOPLE people; pids of strangers are UNLABELLED."""
        rng = np.random.default_rng([*self._entropy, _SEED_SPLIT[split], index])
        number, lead = self.cast(split, index)
        camera, size = self.cameras[number], (self.width, self.height)
        # Later frames may be empty; in the first ones everybody has to be seen twice.
        is_needed = lead is not None and index < 2 * len(self.pids(split))
        num_people = max(_random_crowd(rng, self.style.crowd), int(is_needed))
        spot = _lead_spot(rng, camera, size) if lead is not None and num_people else None
        pids = self._draw_pids(rng, split, lead, num_people)
        standing = []
        for pid in pids:
            place = spot if spot and pid == lead else _spot_behind(rng, camera, size, spot)
            standing.append(self._stand(rng, camera, place, pid))
        standing += _occluders(rng, camera, size, spot)
        labelled = compose(camera, self._scene(number), standing, rng)
        return replace(labelled, pids=np.where(labelled.pids == _STRANGER, UNLABELLED, labelled.pids))

    def crop(
        self, pid: int, camera: int, shot: int, *, size: tuple[int, int], slack: float = 0.04
    ) -> np.ndarray:
        """Draw one person and cut the box out: uint8 RGB of size (width, height) pixels.

        pid: an identity of this city; a larger number is a stranger, always the same for the same number.
        slack: standard deviation of the sides of the box, as a share of its own size; poor detectors have more.
        """
        rng = np.random.default_rng([*self._entropy, _SEED_CROP, pid, camera, shot])
        person_px = math.exp(rng.uniform(math.log(0.14), math.log(0.5))) * self.height
        patch = self._patch(rng, camera, person_px)
        spot = _Spot(patch.shape[1] / 2, 1.25 * person_px, person_px)
        target = self._stand(rng, self.cameras[camera], spot, pid)
        standing = [target, *_before(rng, patch, spot)] if rng.random() < 0.3 else [target]
        labelled = compose(self.cameras[camera], patch, standing, rng)
        if not len(labelled.pids):  # the thing in front hides too much
            labelled = compose(self.cameras[camera], patch, [target], rng)
        return _cut(labelled.image, labelled.boxes_xyxy[0], rng.normal(0, slack, 4), size)

    def background_crop(self, camera: int, shot: int, *, size: tuple[int, int]) -> np.ndarray:
        """Cut a box without anybody, as a detector's false alarm: uint8 RGB of size (width, height) pixels."""
        rng = np.random.default_rng([*self._entropy, _SEED_CROP, len(self.people) + 2**31, camera, shot])
        patch = self._patch(rng, camera, rng.uniform(0.15, 0.45) * self.height)
        labelled = compose(self.cameras[camera], patch, [], rng)
        tall = len(labelled.image)
        box = np.array([0, 0, min(tall / 2, labelled.image.shape[1]), tall], np.float32)
        return _cut(labelled.image, box, np.zeros(4), size)

    def _draw_pids(
        self, rng: np.random.Generator, split: Split, lead: int | None, num_people: int
    ) -> list[int]:
        """Choose who is in a frame: the lead, others with a name, and strangers."""
        if lead is None or not num_people:
            return [_STRANGER] * num_people
        share = min(1.0, STRANGER_SHARE * num_people / max(num_people - 1, 1))
        others = [pid for pid in self.pids(split) if pid != lead]
        num_named = min(num_people - 1 - int(rng.binomial(num_people - 1, share)), len(others))
        named = rng.choice(others, num_named, replace=False).tolist() if num_named else []
        return [lead, *named, *[_STRANGER] * (num_people - 1 - num_named)]

    def _person(self, pid: int) -> Person:
        if pid < len(self.people):
            return self.people[pid]
        return random_person(np.random.default_rng([*self._entropy, _SEED_STRANGER, pid]))

    def _stand(self, rng: np.random.Generator, camera: Camera, spot: _Spot, pid: int) -> Standing:
        person = random_person(rng) if pid == _STRANGER else self._person(pid)
        rgb, alpha = pose_sprite(rng, person, camera, spot.person_px)
        origin = sprite_origin(spot.person_px)
        left, top = int(spot.x - origin[0]), int(spot.row - origin[1])
        return Standing(rgb, alpha, left, top, spot.row, pid, appearance_code(person))

    def _scene(self, camera: int) -> np.ndarray:
        if camera not in self._scenes:
            self._scenes[camera] = self.cameras[camera].background(self.width, self.height)
        return self._scenes[camera]

    def _patch(self, rng: np.random.Generator, camera: int, person_px: float) -> np.ndarray:
        """Cut a random piece of a camera's empty scene with room for a person."""
        scene = self._scene(camera)
        width, height = min(int(1.3 * person_px), self.width), min(int(1.5 * person_px), self.height)
        left, top = rng.integers(self.width - width + 1), rng.integers(self.height - height + 1)
        return scene[top : top + height, left : left + width]


def _check(seed: int, num_cameras: int, num_train_people: int, num_test_people: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if num_cameras < 2:
        raise ValueError(f"num_cameras must be at least 2, got {num_cameras}")
    if min(num_train_people, num_test_people) < 0:
        raise ValueError(
            "num_train_people and num_test_people must be at least 0, "
            f"got {num_train_people} and {num_test_people}"
        )


def _styled_camera(rng: np.random.Generator, number: int, style: Style) -> Camera:
    """Draw a mounted camera that sees far, and shift it to the look of a data set."""
    camera = mounted_camera(rng, number)
    near = min(camera.near_scale * style.scale, 0.9)
    red, green, blue = camera.tint
    return replace(
        camera,
        near_scale=near,
        # Below the horizon's height, so that the far ones fit into the frame with their heads.
        far_scale=min(near * float(rng.uniform(0.08, 0.22)), 0.8 * camera.horizon),
        tilt=float(np.clip(camera.tilt + style.tilt, 0, 1)),
        gain=camera.gain * style.gain,
        tint=(red + style.warmth, green, blue - style.warmth),
        gamma=camera.gamma * style.gamma,
        noise_sigma=camera.noise_sigma + style.noise_sigma,
        blur_sigma=camera.blur_sigma + style.blur_sigma,
        jpeg_quality=None,  # the written file is compressed
    )


def _random_crowd(rng: np.random.Generator, mean: float) -> int:
    """Draw a number of people in 0..MAX_PEOPLE with this mean, spread wider than a binomial."""
    share = mean / MAX_PEOPLE
    return int(rng.binomial(MAX_PEOPLE, rng.beta(4 * share, 4 * (1 - share))))


def _lead_spot(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> _Spot:
    """Place somebody who has to be seen: inside the frame from head to feet, and not too small."""
    width, height = size
    smallest = max(0.22 * height, _LEAD_PX)
    largest = max(min(0.7 * height, 1.1 * camera.near_scale * height), smallest)
    person_px = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    highest, lowest = 1.12 * person_px, height - 0.1 * person_px
    row = min(max(camera.row_of(person_px, height), highest), lowest)
    return _Spot(rng.uniform(0.4 * person_px, width - 0.4 * person_px), row, person_px)


def _spot_behind(
    rng: np.random.Generator, camera: Camera, size: tuple[int, int], lead: _Spot | None
) -> _Spot:
    """Place somebody anywhere but before the lead."""
    spot = _random_spot(rng, camera, size)
    if lead is None:
        return spot
    for _ in range(8):
        reach, top = 0.3 * spot.person_px, spot.row - 1.1 * spot.person_px
        if not lead.is_hidden_by(spot.x - reach, top, spot.x + reach, spot.row):
            return spot
        spot = _random_spot(rng, camera, size)
    return replace(spot, row=min(spot.row, lead.row - 1))


def _random_spot(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> _Spot:
    """Place somebody, in most cases where the perspective wants a person of that size."""
    width, height = size
    smallest, largest = max(camera.far_scale, _SMALLEST) * height, 1.1 * camera.near_scale * height
    person_px = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
    row = camera.row_of(person_px, height)
    if rng.random() < 0.15:
        row = rng.uniform(0.85 * person_px, height + 0.35 * person_px)
    return _Spot(rng.uniform(-0.02, 1.02) * width, row, person_px)


def _occluders(
    rng: np.random.Generator, camera: Camera, size: tuple[int, int], lead: _Spot | None
) -> list[Standing]:
    """Stand some things in a frame that hide people, though not the lead."""
    if rng.random() >= 0.45:
        return []
    things = [random_occluder(rng, camera, size) for _ in range(int(rng.integers(1, 4)))]
    return [
        thing
        for thing in things
        if lead is None
        or not lead.is_hidden_by(thing.left, thing.top, thing.left + thing.rgb.shape[1], thing.ground_row)
    ]


def _before(rng: np.random.Generator, patch: np.ndarray, spot: _Spot) -> list[Standing]:
    """Stand one thing before the person of a crop, a little to the side."""
    rgb, alpha = draw_prop(rng, 0.8 * spot.person_px, occluder=True)
    row = spot.row + rng.uniform(0.05, 0.3) * spot.person_px
    side = 1 if rng.random() < 0.5 else -1
    left = patch.shape[1] / 2 + side * rng.uniform(0.1, 0.4) * spot.person_px - rgb.shape[1] / 2
    return [Standing(rgb, alpha, int(left), int(row - len(rgb)), row)]


def _cut(image: np.ndarray, box: np.ndarray, slack: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut a box out of an image, each side moved by a share of the box's size, and scale it."""
    wide, tall = box[2] - box[0], box[3] - box[1]
    moved = box + slack * np.array([wide, tall, wide, tall])
    # People seen from the side are slim: more background beside them, rather than a body stretched to double.
    missing = max(0.0, 0.8 * tall * size[0] / size[1] - wide) / 2
    moved += np.array([-missing, 0, missing, 0])
    left, top = np.maximum(np.floor(moved[:2]), 0).astype(int)
    right, bottom = np.ceil(moved[2:]).astype(int)
    return cv2.resize(image[top:bottom, left:right], size, interpolation=cv2.INTER_LINEAR)
