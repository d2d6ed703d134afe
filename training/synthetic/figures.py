"""Drawing of people: a jointed figure in three dimensions, projected, shaded and anti-aliased.

Body coordinates are (left, up, forward) in units of an average body height, with the origin on the
ground under the hips. What somebody wears is read from a Person (people.py).
"""

import math
from collections.abc import Callable

import numpy as np

from .painter import ABOVE_GROUND, BELOW_GROUND, WIDTH, Painter, Point
from .people import Person, Rgb
from .poses import Pose, arm_joints, leg_joints, varied_pose, walking_pose

SUPER_SAMPLING, SUPER_SAMPLING_SMALL, SMALL_PX = 2, 3, 100


def sprite_origin(height_px: float) -> tuple[float, float]:
    """Give the (x, y) of the ground point under the hips in the sprite that draw_person returns."""
    return WIDTH * height_px / 2, ABOVE_GROUND * height_px


def draw_person(
    person: Person,
    height_px: float,
    *,
    view: float,
    phase: float,
    tilt: float = 0.0,
    rng: np.random.Generator | None = None,
    light: float = -0.6,
    offset_px: tuple[float, float] = (0.0, 0.0),
) -> tuple[np.ndarray, np.ndarray]:
    """Draw one person, walking.

    height_px: pixels of an average body height at level view; the person's own factor comes on top.
    view: walking direction in radians; 0 towards the camera, pi/2 to the right, pi away.
    phase: of the walking cycle, in [0, 1). tilt: 0 level camera .. 1 camera high above.
    rng: where given, the pose varies (standing, arms raised, carrying); otherwise it is a plain walk.
    light: side the light comes from, -1 left .. 1 right.
    offset_px: moves the figure inside the sprite, by less than a pixel.
    Returns rgb uint8 (H, W, 3) and alpha float32 (H, W) in [0, 1]; sprite_origin says where the feet are.
    """
    scale = SUPER_SAMPLING_SMALL if height_px < SMALL_PX else SUPER_SAMPLING
    width = math.ceil(WIDTH * height_px)
    height = math.ceil((ABOVE_GROUND + BELOW_GROUND) * height_px)
    canvas = np.zeros((height * scale, width * scale, 4), np.uint8)
    offset = (offset_px[0] / height_px, offset_px[1] / height_px)
    painter = Painter(canvas, height_px * scale, person.height, view, tilt, light, offset)
    pose = walking_pose(phase) if rng is None else varied_pose(rng, phase)
    for _, paint in sorted(_parts(painter, person, pose), key=lambda part: part[0]):
        paint()
    return painter.finish(scale)


_Part = tuple[float, Callable[[], None]]


def _parts(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    """List the parts of the figure with their painting order, far parts first."""
    return [
        *_legs(painter, person, pose),
        *_torso(painter, person, pose),
        *_arms(painter, person, pose),
        *_head(painter, person, pose),
        *_bag(painter, person, pose),
    ]


def _drop(point: Point, by: float) -> Point:
    return point[0], point[1] - by, point[2]


def _legs(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    legs = [leg_joints(person, pose, side) for side in range(2)]
    # The lower foot stands on the ground: the whole walk bobs, as real walks do.
    bob = min(ankle[1] for _, _, ankle, _ in legs) - 0.035
    parts: list[_Part] = []
    for hip, knee, ankle, shank in legs:
        joints = [_drop(joint, bob) for joint in (hip, knee, ankle)]
        depth = painter.nearness(joints[1])
        parts.append((-10 + depth, lambda j=joints, s=shank, d=depth: _leg(painter, person, j, s, d)))
    return parts


def _leg(painter: Painter, person: Person, joints: list[Point], shank: float, depth: float) -> None:
    hip, knee, ankle = joints
    tone = 0.8 if depth < -0.02 else 1.0
    girth = person.girth**0.7
    wide, middle, slim = 0.061 * girth, 0.043 * girth, 0.03 * girth
    # The foot points down behind the body, where the heel has left the ground.
    toe = (ankle[0] * 1.25, max(ankle[1] - 0.022 + 0.045 * min(shank, 0.0), 0.012), ankle[2] + 0.085)
    painter.limb((_drop(ankle, 0.012), toe), (0.026, 0.018), person.shoes, tone)
    if person.lower_kind in ("trousers", "coat"):
        painter.limb((hip, knee, ankle), (wide, middle, slim), person.lower, tone)
        return
    painter.limb((knee, ankle), (middle * 0.9, slim * 0.9), person.skin, tone)
    if person.lower_kind == "shorts":
        painter.limb((hip, knee), (wide, middle * 1.1), person.lower, tone)


def _torso(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    broad, girth, hips = person.shoulders, person.girth, person.leg_ratio
    shape = [
        (0.85, 0.036, 0.036),
        (0.822, 0.105 * broad, 0.046 * girth),
        (0.79, 0.122 * broad, 0.06 * girth),
        (0.70, 0.108 * (broad + girth) / 2, 0.074 * girth),
        (0.60, 0.092 * girth, 0.066 * girth),
        (hips - 0.01, 0.102 * girth, 0.074 * girth),
    ]
    if person.lower_kind == "coat":
        shape.append((0.27, 0.118 * girth, 0.088 * girth))
    rings = [(up, pose.lean * (up - hips), wide, deep) for up, wide, deep in shape]
    parts: list[_Part] = [(0.0, lambda: painter.rings(rings, lambda a, v: _upper_texture(person, a, v)))]
    if person.lower_kind == "skirt":
        hem = [(hips + 0.06, 0.0, 0.088 * girth, 0.064 * girth), (0.27, 0.02, 0.13 * girth, 0.105 * girth)]
        parts.append((-5.0, lambda: painter.rings(hem, lambda _a, _v: _plain(person.lower))))
    return parts


def _plain(colour: Rgb) -> np.ndarray:
    return np.array(colour, np.float32)[None, None]


def _upper_texture(person: Person, around: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Paint the pattern of the upper garment, and the opening in front of a jacket or coat."""
    if person.pattern == "plain":
        colours = np.repeat(_plain(person.upper), len(around), axis=1)
    else:
        lengths = v[:, None] * (1.8 if person.lower_kind == "coat" else 1.0)
        is_second = _pattern_mask(person.pattern, around[None], lengths)
        colours = np.array([person.upper, person.second], np.float32)[is_second.astype(np.uint8)]
    if person.sleeve > 0.7 and person.pattern in ("plain", "block"):
        front = np.abs((around + math.pi) % math.tau - math.pi) < 0.06
        colours[:, front] *= 0.6
    return colours


def _pattern_mask(pattern: str, around: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Say where the second colour shows; around (1, W) radians, v (H, 1) in body-length of a jacket."""
    if pattern == "stripes":
        return np.broadcast_to((v * 7.0) % 1 < 0.45, (len(v), around.shape[1]))
    if pattern == "vertical":
        return np.broadcast_to((around * 2.4) % 1 < 0.4, (len(v), around.shape[1]))
    if pattern == "block":
        return np.broadcast_to(v < 0.46, (len(v), around.shape[1]))
    if pattern == "checks":
        return ((v * 4.0) % 1 < 0.5) ^ ((around * 1.6) % 1 < 0.5)
    if pattern == "dots":
        return ((v * 6.0) % 1 - 0.5) ** 2 + ((around * 2.0) % 1 - 0.5) ** 2 < 0.08
    return np.zeros((len(v), around.shape[1]), bool)


def _arms(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    parts: list[_Part] = []
    for side in range(2):
        joints = arm_joints(person, pose, side)
        depth = painter.nearness(joints[1])
        parts.append((10 * depth + 0.2, lambda j=joints, d=depth: _arm(painter, person, j, d)))
    return parts


def _arm(painter: Painter, person: Person, joints: tuple[Point, Point, Point], depth: float) -> None:
    shoulder, elbow, hand = joints
    tone = 0.78 if depth < -0.03 else 0.92
    thick = person.girth**0.6
    wide, middle, slim = 0.038 * thick, 0.033 * thick, 0.023
    painter.ellipsoid(hand, (0.021, 0.027, 0.025), person.skin, tone)
    if person.sleeve > 0.7:
        painter.limb((shoulder, elbow, hand), (wide, middle, slim), person.upper, tone)
        return
    painter.limb((shoulder, elbow, hand), (wide * 0.85, middle * 0.85, slim * 0.85), person.skin, tone)
    share = min(1.0, 2 * person.sleeve)
    end = [s + share * (e - s) for s, e in zip(shoulder, elbow, strict=True)]
    painter.limb((shoulder, (end[0], end[1], end[2])), (wide, middle), person.upper, tone)


def _head(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    """Paint neck, head, hair and hat; the face shows unless the head is turned away."""
    size = person.head_size
    lean = pose.lean * 0.45
    centre = (0.0, 0.925, 0.014 + lean)
    facing = painter.turned(pose.head_yaw)
    is_bare = person.hair_style == "bald"
    back = -1.0 if facing.cos > 0.1 else 3.0
    parts: list[_Part] = [
        (-0.5, lambda: painter.limb(((0.0, 0.83, lean), centre), (0.032, 0.03), person.skin, 0.85)),
        (2.0, lambda: _skull(facing, person, centre, size)),
    ]
    if person.hair_style == "long" and person.hat != "hood":
        ends = (0.0, 0.79, lean - 0.05)
        parts.append(
            (back, lambda: painter.limb(((0.0, 0.94, lean), ends), (0.056, 0.06), person.hair, 0.95))
        )
    if person.hair_style == "bun" and person.hat == "none":
        knot = (0.0, 0.965, lean - 0.062)
        parts.append((back, lambda: facing.ellipsoid(knot, (0.03, 0.03, 0.03), person.hair)))
    if person.hat == "hood":
        nape = (0.0, 0.83, lean - 0.03)
        parts.append(
            (1.0, lambda: painter.limb((centre, nape), (0.074 * size, 0.075), person.hat_colour, 0.9))
        )
    elif not is_bare or person.hat != "none":
        parts += _hat(facing, person, centre, size)
    return parts


def _skull(painter: Painter, person: Person, centre: Point, size: float) -> None:
    """Paint hair or hood as a shell, and the face in front of it as far as it is turned to the camera."""
    left, up, forward = centre
    radii = (0.05 * size, 0.069 * size, 0.06 * size)
    shell = person.skin if person.hair_style == "bald" else person.hair
    grown = 1.06
    if person.hat == "hood":
        shell, grown = person.hat_colour, 1.25
    painter.ellipsoid(
        (left, up + 0.004, forward), (radii[0] * grown, radii[1] * grown, radii[2] * grown), shell
    )
    seen = min(max((painter.cos + 0.5) / 0.8, 0.0), 1.0)
    if seen > 0.1:
        face = (left, up - 0.013 * size, forward + 0.36 * radii[2])
        painter.ellipsoid(face, (radii[0] * 0.86 * seen, radii[1] * 0.8, radii[2] * 0.72 * seen), person.skin)
    if painter.cos > 0.2 and painter.unit_px > 360:
        for side in (-0.02, 0.02):
            eye = (side * size, up + 0.004, forward + 0.92 * radii[2])
            painter.ellipsoid(eye, (0.007, 0.005, 0.004), (52, 40, 36))


def _hat(painter: Painter, person: Person, centre: Point, size: float) -> list[_Part]:
    if person.hat == "none":
        return []
    _, up, forward = centre
    crown = (0.0, up + 0.034 * size, forward - 0.004)
    radii = (0.056 * size, 0.048 * size, 0.066 * size)
    is_cap = person.hat == "cap"
    middle = forward + 0.055 if is_cap else forward
    wide, deep = (0.045, 0.05) if is_cap else (0.1, 0.105)
    brim = [(up + 0.036, middle, wide, deep), (up + 0.026, middle, wide, deep)]
    colour = person.hat_colour
    # From behind the peak of a cap lies behind the crown.
    brim_order = 2.6 if painter.cos > -0.3 or not is_cap else 1.9
    return [
        (2.5, lambda: painter.ellipsoid(crown, radii, colour)),
        (brim_order, lambda: painter.rings(brim, lambda _a, _v: 0.85 * _plain(colour))),
    ]


def _bag(painter: Painter, person: Person, pose: Pose) -> list[_Part]:
    side = person.bag_side
    if person.bag == "backpack":
        return _backpack(painter, person)
    if person.bag == "shoulder":
        hip = (side * 0.135 * person.girth**0.5, person.leg_ratio + 0.02, -0.01)
        strap_from = (-side * 0.06, 0.825, 0.02)
        depth = 10 * painter.nearness(hip) + 0.5
        return [
            (depth, lambda: _satchel(painter, person, hip)),
            (0.1, lambda: _strap(painter, person, strap_from, hip)),
        ]
    if person.bag == "hand":
        _, elbow, hand = arm_joints(person, pose, 0 if side > 0 else 1)
        depth = 10 * painter.nearness(elbow) + 0.25
        return [(depth, lambda: _carried(painter, person, hand))]
    return []


def _backpack(painter: Painter, person: Person) -> list[_Part]:
    depth = -0.115 * person.girth**0.5
    pack = [
        (0.8, depth, 0.07, 0.04),
        (0.77, depth, 0.088, 0.06),
        (0.57, depth - 0.01, 0.094, 0.07),
        (0.54, depth, 0.08, 0.05),
    ]
    behind = 0.3 if painter.cos < 0.25 else -1.2
    parts: list[_Part] = [(behind, lambda: painter.rings(pack, lambda _a, _v: _plain(person.bag_colour)))]
    for side in (-0.068, 0.068):
        front = 0.075 * person.girth
        top, low = (side, 0.815, front * 0.6), (side * 1.15, 0.62, front)
        if painter.cos > 0.1:
            parts.append(
                (0.1, lambda t=top, w=low: painter.limb((t, w), (0.013, 0.013), person.bag_colour, 0.9))
            )
    return parts


def _satchel(painter: Painter, person: Person, hip: Point) -> None:
    left, up, forward = hip
    bag = [(up + 0.055, forward, 0.035, 0.08), (up - 0.075, forward, 0.04, 0.09)]
    painter.rings(bag, lambda _a, _v: _plain(person.bag_colour), left=left)


def _strap(painter: Painter, person: Person, shoulder: Point, hip: Point) -> None:
    """Paint the strap over the chest or the back, whichever side is seen."""
    front = 0.075 * person.girth * (1 if painter.cos > 0 else -1)
    chest = (0.3 * (shoulder[0] + hip[0]), 0.7, front)
    for start, end in ((shoulder, chest), (chest, hip)):
        painter.limb((start, end), (0.01, 0.01), person.bag_colour, 0.85)


def _carried(painter: Painter, person: Person, hand: Point) -> None:
    left, up, forward = hand
    bag = [(up - 0.03, forward, 0.035, 0.075), (up - 0.17, forward, 0.045, 0.095)]
    painter.rings(bag, lambda _a, _v: _plain(person.bag_colour), left=left)
