"""Poses of the human body: joint angles of a walk and of people who stand about, and where the joints are.

Body coordinates are (left, up, forward) in units of an average body height, origin on the ground.
"""

import math
from dataclasses import dataclass

import numpy as np

from .painter import Point
from .people import Person

STRIDE = 0.8
"""Ground covered by one cycle of the walking phase, in body heights."""


@dataclass(frozen=True)
class Pose:
    """Joint angles in radians, each for (left, right); positive swings forward, knees bend backward."""

    thighs: tuple[float, float] = (0.0, 0.0)
    knees: tuple[float, float] = (0.04, 0.04)
    arms: tuple[float, float] = (0.0, 0.0)
    elbows: tuple[float, float] = (0.2, 0.2)
    spread: float = 0.1
    lean: float = 0.02
    head_yaw: float = 0.0


def walking_pose(phase: float) -> Pose:
    """Give the pose at a phase in [0, 1) of the walking cycle; the left leg is in front at 0.25."""
    swing = math.sin(math.tau * phase)
    lift = math.cos(math.tau * phase)
    return Pose(
        thighs=(0.06 + 0.4 * swing, 0.06 - 0.4 * swing),
        knees=(0.1 + 0.85 * max(lift, 0.0) ** 1.5, 0.1 + 0.85 * max(-lift, 0.0) ** 1.5),
        arms=(-0.38 * swing, 0.38 * swing),
        elbows=(0.28 - 0.15 * swing, 0.28 + 0.15 * swing),
    )


def varied_pose(rng: np.random.Generator, phase: float) -> Pose:
    """Vary a walk, or stand: hands at the sides, in the pockets, holding or reaching for something."""
    walk = walking_pose(phase)
    stride = rng.uniform(0.5, 1.15) if rng.random() < 0.65 else 0.0
    arms = [walk.arms[0] * stride, walk.arms[1] * stride]
    elbows = [rng.uniform(0.1, 0.6), rng.uniform(0.1, 0.6)]
    for side in range(2):
        if rng.random() < 0.22:
            arms[side], elbows[side] = rng.uniform(-0.2, 0.9), rng.uniform(0.6, 2.1)
        elif rng.random() < 0.06:
            arms[side], elbows[side] = rng.uniform(1.2, 2.4), rng.uniform(0.0, 0.7)
    sway = rng.uniform(-0.06, 0.06)
    return Pose(
        thighs=(walk.thighs[0] * stride + sway, walk.thighs[1] * stride - sway),
        knees=(walk.knees[0] * max(stride, 0.25), walk.knees[1] * max(stride, 0.25)),
        arms=(arms[0], arms[1]),
        elbows=(elbows[0], elbows[1]),
        spread=rng.uniform(0.02, 0.22),
        lean=rng.normal(0.02, 0.045),
        head_yaw=rng.normal(0.0, 0.45),
    )


def leg_joints(person: Person, pose: Pose, side: int) -> tuple[Point, Point, Point, float]:
    """Give hip, knee and ankle of one leg (side 0 left, 1 right) and its shank angle, hips at leg_ratio."""
    left = (0.048, -0.048)[side] * person.girth**0.5
    length = (person.leg_ratio - 0.035) / 2
    thigh, shank = pose.thighs[side], pose.thighs[side] - pose.knees[side]
    hip = (left, person.leg_ratio, 0.0)
    knee = (left, hip[1] - length * math.cos(thigh), length * math.sin(thigh))
    ankle = (left, knee[1] - length * math.cos(shank), knee[2] + length * math.sin(shank))
    return hip, knee, ankle, shank


def arm_joints(person: Person, pose: Pose, side: int) -> tuple[Point, Point, Point]:
    """Give shoulder, elbow and hand of one arm, side 0 left, 1 right."""
    sign = (1, -1)[side]
    shoulder = (sign * 0.118 * person.shoulders, 0.795, pose.lean * 0.3)
    swing, bend = pose.arms[side], pose.arms[side] + pose.elbows[side]
    elbow = (
        shoulder[0] + sign * 0.16 * math.sin(pose.spread),
        shoulder[1] - 0.165 * math.cos(swing),
        shoulder[2] + 0.165 * math.sin(swing),
    )
    hand = (
        elbow[0] - sign * 0.02,
        elbow[1] - 0.155 * math.cos(bend),
        elbow[2] + 0.155 * math.sin(bend),
    )
    return shoulder, elbow, hand
