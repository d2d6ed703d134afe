"""The synthetic street: labelled stills for training, and a cast of people walking past several cameras.

Everything is a function of seeds: the same seed gives the same pixels, whatever was drawn before.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from .cameras import Camera, random_camera
from .composition import LabelledFrame, Standing, compose
from .figures import draw_person, sprite_origin
from .people import Person, appearance_code, random_person
from .poses import STRIDE
from .props import draw_prop

MAX_PEOPLE = 9
WALK_SPEED = 0.8
"""Body heights per second: 1.4 m/s for a person of 1.75 m."""

TYPICAL_VISIBLE = 5.0
"""People in a view at once, where the cast and the time allow it."""

LONGEST_WALK_S = 9.0
"""Time that must lie between two walks of one person, before whichever camera."""

FOCAL_HEIGHTS = 1.2
"""Focal length of every camera in frame heights: a vertical angle of view of 45 degrees."""


def random_frame(seed: int, index: int, *, width: int = 640, height: int = 384) -> LabelledFrame:
    """Draw a still of 0..9 new people before a new camera; a function of seed and index only."""
    rng = np.random.default_rng([seed, index])
    camera = random_camera(rng)
    scene = camera.background(width, height)
    first_pid = (seed % 100_003) * 10**9 + index * (MAX_PEOPLE + 1)
    standing = [
        _random_standing(rng, camera, (width, height), first_pid + number)
        for number in range(_random_crowd(rng))
    ]
    if rng.random() < 0.45:
        standing += [random_occluder(rng, camera, (width, height)) for _ in range(int(rng.integers(1, 4)))]
    return compose(camera, scene, standing, rng)


def _random_crowd(rng: np.random.Generator) -> int:
    """Draw the number of people in a still: seldom nobody; about 4.5 of them stay visible on average."""
    weights = np.array([4, 6, 9, 11, 13, 13, 13, 12, 10, 9])
    return int(rng.choice(MAX_PEOPLE + 1, p=weights / weights.sum()))


def _random_standing(rng: np.random.Generator, camera: Camera, size: tuple[int, int], pid: int) -> Standing:
    """Place a new person, in most cases where the perspective wants a person of that size."""
    width, height = size
    if rng.random() < 0.78:
        smallest, largest = camera.far_scale * height, 1.1 * camera.near_scale * height
        person_px = math.exp(rng.uniform(math.log(smallest), math.log(largest)))
        row = camera.row_of(person_px, height)
    else:
        person_px = math.exp(rng.uniform(math.log(28), math.log(0.95 * height)))
        row = rng.uniform(0.85 * person_px, height + 0.35 * person_px)
    person_px = float(np.clip(person_px, 28, 0.95 * height))
    person = random_person(rng)
    rgb, alpha = pose_sprite(rng, person, camera, person_px)
    origin = sprite_origin(person_px)
    left = rng.uniform(-0.1, 1.1) * width - origin[0]
    return Standing(rgb, alpha, int(left), int(row - origin[1]), row, pid, appearance_code(person))


def pose_sprite(
    rng: np.random.Generator, person: Person, camera: Camera, person_px: float
) -> tuple[np.ndarray, np.ndarray]:
    """Draw somebody in a random pose and direction, as a camera sees an average body of person_px pixels.

    Returns rgb uint8 (H, W, 3) and alpha float32 (H, W) in [0, 1]; sprite_origin says where the feet are.
    """
    tilt = float(np.clip(camera.tilt + rng.normal(0, 0.06), 0, 1))
    view, phase = rng.uniform(0, math.tau), rng.random()
    return draw_person(person, person_px, view=view, phase=phase, tilt=tilt, rng=rng, light=camera.light)


def random_occluder(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> Standing:
    """Stand a thing that hides people somewhere in a frame of size (width, height) pixels."""
    width, height = size
    row = rng.uniform(camera.horizon, 1.2) * height
    unit_px = float(np.clip(camera.person_px(row, height) * rng.uniform(0.7, 1.1), 20, 0.7 * height))
    rgb, alpha = draw_prop(rng, unit_px, occluder=True)
    left = int(rng.uniform(0, 1) * width - rgb.shape[1] / 2)
    return Standing(rgb, alpha, left, int(row - len(rgb)), row)


@dataclass(frozen=True)
class Visit:
    """One walk of one person through the view of one camera."""

    person: int
    start_s: float
    speed: float
    """Body heights per second."""
    path: np.ndarray
    """float64 (P, 2): points (across, away) on the ground in body heights, as the camera sees it."""

    @cached_property
    def distances(self) -> np.ndarray:
        """Distance walked at each point of the path, in body heights, float64 (P,)."""
        steps = np.linalg.norm(np.diff(self.path, axis=0), axis=1)
        return np.concatenate([[0.0], np.cumsum(steps)])

    @property
    def duration_s(self) -> float:
        """Time from entering to leaving the view."""
        return float(self.distances[-1]) / self.speed

    def walked(self, time_s: float) -> float:
        """Distance walked since the start, in body heights; negative before it."""
        return (time_s - self.start_s) * self.speed

    def place(self, distance: float) -> np.ndarray:
        """Point (across, away) after a distance."""
        return np.array([np.interp(distance, self.distances, column) for column in self.path.T])


class Street:
    """A cast of people who walk past several cameras; everybody comes past every camera, at another time."""

    def __init__(
        self,
        seed: int,
        *,
        num_people: int = 20,
        cameras: int = 2,
        width: int = 640,
        height: int = 384,
        duration_s: float = 60.0,
    ) -> None:
        if num_people < 1 or cameras < 1 or duration_s <= 0:
            raise ValueError(
                "num_people, cameras and duration_s must be positive, "
                f"got {num_people}, {cameras} and {duration_s}"
            )
        self.seed, self.width, self.height, self.duration_s = seed, width, height, duration_s
        rng = np.random.default_rng([seed, 1])
        self.people: list[Person] = [random_person(rng) for _ in range(num_people)]
        self.codes = np.stack([appearance_code(person) for person in self.people])
        self.cameras: list[Camera] = [mounted_camera(rng, number) for number in range(cameras)]
        self._scenes = [camera.background(width, height) for camera in self.cameras]
        self._things = [
            [random_occluder(rng, camera, (width, height)) for _ in range(int(rng.integers(0, 3)))]
            for camera in self.cameras
        ]
        # Each camera sees the cast in the same order, but shifted: nobody is in two places at once.
        order = rng.permutation(num_people)
        most_rounds = max(1, int(duration_s / (cameras * LONGEST_WALK_S)))
        self._visits = [
            _schedule(
                rng,
                lambda who, camera=camera: _random_walk(rng, camera, who, (width, height)),
                np.roll(order, number * num_people // cameras).tolist(),
                duration_s,
                most_rounds,
            )
            for number, camera in enumerate(self.cameras)
        ]

    def frame(self, camera: int, time_s: float) -> LabelledFrame:
        """Take the picture of one camera at a time in [0, duration_s]; pids are indices into people."""
        standing = list(self._things[camera])
        for visit in self._visits[camera]:
            if 0.0 <= visit.walked(time_s) <= visit.distances[-1]:
                standing.append(self._walker(self.cameras[camera], visit, time_s))
        rng = np.random.default_rng([self.seed, 2, camera, round(1000 * time_s)])
        return compose(self.cameras[camera], self._scenes[camera], standing, rng)

    def _walker(self, camera: Camera, visit: Visit, time_s: float) -> Standing:
        """Draw a person where a visit has brought them."""
        person, distance = self.people[visit.person], visit.walked(time_s)
        across, away = visit.place(distance)
        before, after = visit.place(distance - 0.15), visit.place(distance + 0.15)
        person_px = FOCAL_HEIGHTS * self.height / away
        x, row = self.width / 2 + across * person_px, camera.row_of(person_px, self.height)
        origin = sprite_origin(person_px)
        left, top = math.floor(x - origin[0]), math.floor(row - origin[1])
        # The line of sight turns with the place in the frame, and the view of the body with it.
        view = math.atan2(after[0] - before[0], before[1] - after[1]) - math.atan2(across, away)
        rgb, alpha = draw_person(
            person,
            person_px,
            view=view,
            phase=(distance / (STRIDE * person.height) + 0.37 * visit.person) % 1,
            tilt=camera.tilt,
            light=camera.light,
            offset_px=(x - origin[0] - left, row - origin[1] - top),
        )
        return Standing(rgb, alpha, left, top, row, visit.person, self.codes[visit.person])


def mounted_camera(rng: np.random.Generator, number: int) -> Camera:
    """Draw a camera of a street; neighbours differ clearly in place, light, colour, scale and height."""
    camera = random_camera(rng)
    is_near = number % 2 == 0
    near = float(rng.uniform(0.62, 0.8) if is_near else rng.uniform(0.42, 0.55))
    warmth = float(rng.uniform(0.04, 0.1)) * (1 if is_near else -1)
    horizon = float(rng.uniform(0.26, 0.36) if is_near else rng.uniform(0.18, 0.26))
    return replace(
        camera,
        place=("street", "hall", "shop", "park")[number % 4],
        horizon=horizon,
        near_scale=near,
        # Below the horizon's height, so that the far ones fit into the frame with their heads.
        far_scale=horizon * float(rng.uniform(0.75, 0.9)),
        tilt=float(rng.uniform(0.05, 0.2) if is_near else rng.uniform(0.35, 0.5)),
        gain=float(rng.uniform(1.1, 1.25) if is_near else rng.uniform(0.85, 0.98)),
        tint=(1 + warmth, 1.0, 1 - warmth),
        gamma=float(rng.uniform(0.85, 1.0) if is_near else rng.uniform(1.0, 1.15)),
        light=float(rng.uniform(-1, -0.4) if is_near else rng.uniform(0.4, 1)),
        vignette=0.5 * camera.vignette,
        light_falloff=0.6 * camera.light_falloff,
        noise_sigma=float(rng.uniform(1, 3) if is_near else rng.uniform(3, 6)),
        blur_sigma=0.0 if is_near else float(rng.uniform(0.4, 0.7)),
    )


def _random_walk(rng: np.random.Generator, camera: Camera, person: int, size: tuple[int, int]) -> Visit:
    return Visit(person, 0.0, WALK_SPEED * rng.uniform(0.85, 1.15), _random_path(rng, camera, size))


def _schedule(
    rng: np.random.Generator,
    draw_walk: Callable[[int], Visit],
    cast: list[int],
    duration_s: float,
    most_rounds: int,
) -> list[Visit]:
    """Let the cast pass one after the other, evenly over the time, and again if the view is empty."""
    walks = [draw_walk(person) for person in cast]
    busy_s = sum(walk.duration_s for walk in walks)
    rounds = int(np.clip(round(TYPICAL_VISIBLE * duration_s / busy_s), 1, most_rounds))
    walks += [draw_walk(person) for _ in range(rounds - 1) for person in cast]
    # The middle of each walk falls inside the duration, so that everybody is seen.
    middles_s = (np.arange(len(walks)) + rng.uniform(0.3, 0.7, len(walks))) / len(walks) * duration_s
    return [
        replace(walk, start_s=float(middle) - walk.duration_s / 2)
        for walk, middle in zip(walks, middles_s, strict=True)
    ]


def _random_path(rng: np.random.Generator, camera: Camera, size: tuple[int, int]) -> np.ndarray:
    """Draw a curve that enters beside the frame, bends inside and leaves again; (P, 2) on the ground."""
    width, height = size
    spread = camera.near_scale - camera.far_scale

    def ground(x: float, depth: float) -> np.ndarray:
        person_px = height * (camera.far_scale + depth * spread)
        return np.array([(x - width / 2) / person_px, FOCAL_HEIGHTS * height / person_px])

    sides = [-1, 1] if rng.random() < 0.5 else [1, -1]
    if rng.random() < 0.15:
        sides[1] = sides[0]
    ends = []
    for side in sides:
        depth = rng.uniform(0.05, 0.95)
        outside = 0.55 * height * (camera.far_scale + depth * spread)
        ends.append(ground(width / 2 + side * (width / 2 + outside), depth))
    bend = ground(rng.uniform(0.25, 0.75) * width, rng.uniform(0.05, 1.0))
    t = np.linspace(0, 1, 48)[:, None]
    return (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * bend + t**2 * ends[1]
