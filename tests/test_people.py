import numpy as np
import pytest
from psdiff.training.synthetic.figures import draw_person, sprite_origin
from psdiff.training.synthetic.people import EMBEDDING_DIM, appearance_code, random_person


def people(seed, count):
    rng = np.random.default_rng(seed)
    return [random_person(rng) for _ in range(count)]


def test_the_same_seed_gives_the_same_person_and_another_seed_another():
    assert people(3, 5) == people(3, 5)
    assert people(3, 5) != people(4, 5)


def test_an_appearance_code_is_a_float32_unit_vector():
    for person in people(0, 20):
        code = appearance_code(person)
        assert code.shape == (EMBEDDING_DIM,)
        assert code.dtype == np.float32
        assert np.linalg.norm(code) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("dim", [16, 64, 256])
def test_appearance_codes_are_well_spread(dim):
    codes = np.stack([appearance_code(person, dim) for person in people(1, 300)])
    cosines = (codes @ codes.T)[np.triu_indices(300, 1)]
    assert abs(np.median(cosines)) < 0.08
    assert np.percentile(cosines, 95) < 0.75


def test_a_code_needs_a_dimension():
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        appearance_code(people(0, 1)[0], 0)


def test_drawing_is_deterministic_with_and_without_a_varied_pose():
    person = people(5, 1)[0]
    for seed in (None, 9):
        first, second = (
            draw_person(
                person, 90, view=1.0, phase=0.3, rng=None if seed is None else np.random.default_rng(seed)
            )
            for _ in range(2)
        )
        assert np.array_equal(first[0], second[0])
        assert np.array_equal(first[1], second[1])


@pytest.mark.parametrize("height_px", [28, 61.5, 120, 360])
def test_a_figure_stands_on_its_origin_and_has_its_height(height_px):
    for person in people(6, 4):
        rgb, alpha = draw_person(person, height_px, view=0.4, phase=0.0)
        assert rgb.dtype == np.uint8
        assert rgb.shape == (*alpha.shape, 3)
        assert 0.0 <= alpha.min() < 0.01
        assert alpha.max() == pytest.approx(1.0)
        rows = np.flatnonzero((alpha > 0.4).any(axis=1))
        tall = 1 + rows[-1] - rows[0]
        assert tall == pytest.approx(person.height * height_px, rel=0.09, abs=2.5)
        assert rows[-1] == pytest.approx(sprite_origin(height_px)[1], abs=0.03 * height_px + 2)


def test_a_figure_never_touches_the_edge_of_its_sprite():
    rng = np.random.default_rng(7)
    for person in people(7, 60):
        _, alpha = draw_person(
            person, 60, view=rng.uniform(0, 6.3), phase=rng.random(), tilt=rng.random(), rng=rng
        )
        rim = np.concatenate([alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]])
        assert rim.max() < 0.4


def test_a_figure_is_narrower_from_the_side_when_it_stands():
    person = people(8, 1)[0]

    def width(view):
        solid = draw_person(person, 200, view=view, phase=0.0)[1] > 0.4
        shoulders = solid[int(0.36 * len(solid)) : int(0.4 * len(solid))]
        return shoulders.any(axis=0).sum()

    assert width(np.pi / 2) < 0.85 * width(0.0)


def test_a_camera_above_foreshortens_the_body():
    person = people(9, 1)[0]
    level, above = (
        np.flatnonzero((draw_person(person, 150, view=0.0, phase=0.0, tilt=tilt)[1] > 0.4).any(axis=1))
        for tilt in (0.0, 0.9)
    )
    assert len(above) < 0.9 * len(level)
