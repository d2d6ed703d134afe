"""Procedural people: who somebody is, as clothes and build, and the unit vector that describes them.

How a person is drawn is the business of figures.py; where people walk is the business of street.py.
"""

import colorsys
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Rgb = tuple[int, int, int]

EMBEDDING_DIM = 64

PATTERNS = ("plain", "stripes", "vertical", "block", "checks", "dots")
HAIR_STYLES = ("short", "long", "bald", "bun")
LOWER_KINDS = ("trousers", "shorts", "skirt", "coat")
BAGS = ("none", "shoulder", "backpack", "hand")
HATS = ("none", "cap", "hood", "brimmed")

# What most people wear in a street: black, greys, navy, denim, beige, brown, white.
STREET_COLOURS: tuple[Rgb, ...] = (
    (24, 24, 28),
    (45, 46, 52),
    (88, 90, 95),
    (140, 141, 143),
    (25, 32, 58),
    (48, 68, 110),
    (98, 124, 160),
    (186, 168, 138),
    (104, 78, 56),
    (226, 224, 218),
)
SKIN_COLOURS: tuple[Rgb, ...] = (
    (238, 200, 172),
    (224, 178, 146),
    (198, 148, 114),
    (156, 110, 80),
    (110, 74, 52),
    (74, 50, 38),
)
HAIR_COLOURS: tuple[Rgb, ...] = (
    (22, 18, 17),
    (48, 32, 24),
    (92, 60, 38),
    (168, 124, 70),
    (212, 182, 120),
    (140, 62, 34),
    (150, 148, 146),
)


@dataclass(frozen=True)
class Person:
    """Build and clothes of one person. Lengths are factors of an average build, colours are RGB 0..255."""

    height: float
    girth: float
    shoulders: float
    leg_ratio: float
    head_size: float
    skin: Rgb
    hair: Rgb
    hair_style: str
    upper: Rgb
    pattern: str
    second: Rgb
    sleeve: float
    """Share of the arm that the sleeve covers, 0.3 (T-shirt) .. 1 (to the wrist)."""
    lower_kind: str
    lower: Rgb
    shoes: Rgb
    bag: str
    bag_colour: Rgb
    bag_side: int
    """+1: carried on the person's own left side, -1: on the right."""
    hat: str
    hat_colour: Rgb


def random_person(rng: np.random.Generator) -> Person:
    """Draw a person; about half of the garments have ordinary street colours, the others any colour."""
    upper = _garment_colour(rng, vivid=0.55)
    lower_kind = _pick(rng, LOWER_KINDS, (0.62, 0.13, 0.13, 0.12))
    return Person(
        height=float(np.clip(rng.normal(1.0, 0.055), 0.86, 1.13)),
        girth=float(np.clip(rng.normal(1.0, 0.15), 0.75, 1.4)),
        shoulders=float(np.clip(rng.normal(1.0, 0.08), 0.82, 1.2)),
        leg_ratio=float(rng.uniform(0.46, 0.51)),
        head_size=float(rng.uniform(0.92, 1.1)),
        skin=_jitter(rng, SKIN_COLOURS[rng.integers(len(SKIN_COLOURS))], 8),
        hair=_jitter(rng, HAIR_COLOURS[rng.integers(len(HAIR_COLOURS))], 8),
        hair_style=_pick(rng, HAIR_STYLES, (0.5, 0.3, 0.09, 0.11)),
        upper=upper,
        pattern=_pick(rng, PATTERNS, (0.46, 0.13, 0.09, 0.16, 0.09, 0.07)),
        second=_contrasting_colour(rng, upper),
        sleeve=1.0 if rng.random() < 0.62 else float(rng.uniform(0.3, 0.5)),
        lower_kind=lower_kind,
        lower=_garment_colour(rng, vivid=0.4),
        shoes=_garment_colour(rng, vivid=0.25),
        bag=_pick(rng, BAGS, (0.45, 0.2, 0.2, 0.15)),
        bag_colour=_garment_colour(rng, vivid=0.5),
        bag_side=1 if rng.random() < 0.5 else -1,
        hat=_pick(rng, HATS, (0.68, 0.16, 0.08, 0.08)),
        hat_colour=_garment_colour(rng, vivid=0.55),
    )


def appearance_code(person: Person, dim: int = EMBEDDING_DIM) -> np.ndarray:
    """Describe a person by a float32 unit vector of shape (dim,), the target of the embedding.

    A fixed orthonormal projection of the weighted attributes, centred on the average person, so that
    two people drawn at random have a cosine of about 0. Raises ValueError if dim is below 1.
    """
    if dim < 1:
        raise ValueError(f"dim must be at least 1, got {dim}")
    code = _projection(dim) @ (_attributes(person) - _average_attributes())
    return (code / np.linalg.norm(code)).astype(np.float32)


def _attributes(person: Person) -> np.ndarray:
    """List what can be seen of a person, weighted by how well it can be seen, as a float64 vector."""
    patterned = float(person.pattern != "plain")
    hatted = float(person.hat != "none")
    haired = float(person.hair_style != "bald" and person.hat in ("none", "cap"))
    return np.concatenate(
        [
            _colour(person.upper, 1.0),
            _colour(person.lower, 1.0 if person.lower_kind != "coat" else 0.5),
            _colour(person.second, 0.6 * patterned),
            _one_of(person.pattern, PATTERNS, 0.45),
            _one_of(person.hat, HATS, 0.35),
            _colour(person.hat_colour, 0.45 * hatted),
            _one_of(person.bag, BAGS, 0.35),
            _colour(person.bag_colour, 0.4 * float(person.bag != "none")),
            [0.3 if person.sleeve > 0.7 else -0.3],
            _one_of(person.lower_kind, LOWER_KINDS, 0.4),
            _one_of(person.hair_style, HAIR_STYLES, 0.25 * float(person.hat != "hood")),
            _colour(person.hair, 0.25 * haired),
            _colour(person.skin, 0.25),
            _colour(person.shoes, 0.15),
        ]
    )


def _colour(rgb: Rgb, weight: float) -> np.ndarray:
    """Centre a colour to [-1, 1] as lightness and two opponent axes; the hue counts as much as lightness."""
    red, green, blue = (channel / 127.5 - 1 for channel in rgb)
    lightness = (red + green + blue) / 3
    return weight * np.array([lightness, 0.75 * (red - green), 0.75 * ((red + green) / 2 - blue)])


def _one_of(value: str, choices: tuple[str, ...], weight: float) -> np.ndarray:
    return weight * np.array([1.0 if value == choice else 0.0 for choice in choices])


@lru_cache(maxsize=1)
def _average_attributes() -> np.ndarray:
    rng = np.random.default_rng(20_011)
    return np.mean([_attributes(random_person(rng)) for _ in range(1000)], axis=0)


@lru_cache(maxsize=4)
def _projection(dim: int) -> np.ndarray:
    """Give the fixed (dim, attributes) matrix: orthonormal columns, or rows where dim is the smaller."""
    size = len(_average_attributes())
    tall = np.random.default_rng(7).standard_normal((max(dim, size), min(dim, size)))
    orthonormal = np.linalg.qr(tall)[0]
    return orthonormal if dim >= size else orthonormal.T


def _garment_colour(rng: np.random.Generator, *, vivid: float) -> Rgb:
    """Draw a street colour, or with probability vivid a colour from anywhere in the colour space."""
    if rng.random() >= vivid:
        return _jitter(rng, STREET_COLOURS[rng.integers(len(STREET_COLOURS))], 12)
    hue, saturation = rng.random(), rng.uniform(0.25, 0.95)
    return _to_rgb(255 * np.array(colorsys.hsv_to_rgb(hue, saturation, rng.uniform(0.3, 0.95))))


def _contrasting_colour(rng: np.random.Generator, other: Rgb) -> Rgb:
    """Draw a garment colour that can be told from another one, so that a pattern can be seen."""
    candidates = [_garment_colour(rng, vivid=0.5) for _ in range(4)]
    return max(candidates, key=lambda rgb: np.abs(np.subtract(rgb, other)).sum())


def _jitter(rng: np.random.Generator, rgb: Rgb, amount: float) -> Rgb:
    return _to_rgb(np.array(rgb) + rng.uniform(-amount, amount, 3))


def _to_rgb(values: np.ndarray) -> Rgb:
    red, green, blue = np.clip(np.rint(values), 0, 255).astype(int).tolist()
    return red, green, blue


def _pick(rng: np.random.Generator, choices: tuple[str, ...], weights: tuple[float, ...]) -> str:
    return choices[int(np.searchsorted(np.cumsum(weights), rng.random() * 0.999_999))]
