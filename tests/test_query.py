import logging

import numpy as np
import pytest
from conftest import BLUE, RED, scene
from PIL import Image
from psdiff.runtime.frames import ImageError
from psdiff.runtime.query import CROP_HEIGHT, BestHits, Hit, QueryError, crop_person, load_query

LEFT, RIGHT = (20, 20, 40, 70), (90, 20, 110, 70)


@pytest.fixture
def picture(tmp_path):
    def save(people, name="person.png", **options):
        Image.fromarray(scene(people)).save(tmp_path / name, **options)
        return tmp_path / name

    return save


def direction(colour):
    vector = np.array(colour, float) - 128
    return vector / np.linalg.norm(vector)


def test_the_only_person_is_the_query(detector, picture, caplog):
    query = load_query(detector, picture([(LEFT, RED)]), steps=2)
    assert query.name == "person"
    assert query.box == pytest.approx(LEFT, abs=1)
    assert query.embedding @ direction(RED) == pytest.approx(1, abs=1e-3)
    assert caplog.text == ""


def test_the_best_of_several_people_is_taken_and_the_others_are_listed(detector, picture, caplog):
    with caplog.at_level(logging.WARNING, "psdiff"):
        query = load_query(detector, picture([(LEFT, RED), (RIGHT, BLUE)]), steps=2)
    assert query.box == pytest.approx(LEFT, abs=1)
    assert "shows 2 people" in caplog.text
    assert "--box 90,20,110,70" in caplog.text


def test_a_box_chooses_the_person(detector, picture, caplog):
    query = load_query(detector, picture([(LEFT, RED), (RIGHT, BLUE)]), (90, 20, 110, 70), 2)
    assert query.embedding @ direction(BLUE) == pytest.approx(1, abs=1e-3)
    assert query.embedding.shape == (3,)
    assert caplog.text == ""


def test_a_box_over_the_edge_is_clipped(detector, picture):
    assert load_query(detector, picture([(LEFT, RED)]), (-5, 20, 40, 500), 2).box == (0, 20, 40, 96)


@pytest.mark.parametrize(
    "box",
    [(40, 20, 20, 70), (20, 20, 20, 70), (200, 20, 220, 70), (0, -9, 5, -1), (float("nan"), 0, 5, 5)],
    ids=["turned", "empty", "right of the image", "above the image", "nan"],
)
def test_a_wrong_box_is_refused(detector, picture, box):
    with pytest.raises(QueryError, match=r"box must be x1,y1,x2,y2 .* inside the 160x96 image .*, got "):
        load_query(detector, picture([(LEFT, RED)]), box, 2)


def test_an_image_without_a_person_asks_for_a_box(detector, picture):
    with pytest.raises(
        QueryError, match=r"query must be an image with a person, got no detection in .*--box"
    ):
        load_query(detector, picture([]), steps=2)


def test_the_image_is_turned_upright_first(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned = Image.fromarray(scene([(LEFT, RED)])).rotate(180)
    turned.save(tmp_path / "a.png", exif=exif)
    assert load_query(detector, tmp_path / "a.png", steps=2).box == pytest.approx(LEFT, abs=1)


def test_grey_and_transparent_images_are_read(detector, tmp_path):
    image = Image.fromarray(scene([(LEFT, (240, 240, 240))]))
    for mode in ("L", "RGBA", "P"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
        assert load_query(detector, tmp_path / f"{mode}.png", steps=2).image.shape == (96, 160, 3)


def test_steps_are_checked(detector, picture):
    with pytest.raises(ValueError, match="steps must be a whole number from 1 to 4, got 0"):
        load_query(detector, picture([(LEFT, RED)]), steps=0)


def test_a_missing_or_damaged_image_is_named(detector, picture, tmp_path):
    with pytest.raises(ImageError, match=r"query must be an existing image file, got .*no\.png"):
        load_query(detector, tmp_path / "no.png")
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ImageError, match=r"query must be an image, got .*text\.png"):
        load_query(detector, tmp_path / "text.png")
    path = picture([(LEFT, RED)], "cut.png")
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(ImageError, match=r"query must be a whole image, got a damaged one in .*cut\.png"):
        load_query(detector, path)
    with pytest.raises(ImageError, match="query must be"):
        load_query(detector, tmp_path)


# Hits ---------------------------------------------------------------------------------------------------


def hit(cos, moment_s, camera="a", seq=None):
    seq = round((moment_s or 0) * 10) if seq is None else seq
    return Hit(camera, seq, moment_s, (0, 0, 9, 9), 0.9, cos, cos > 0.7, scene())


def cosines(hits):
    return [found.cos for found in hits]


def test_the_best_hit_of_a_passage_stays():
    best = BestHits()
    for cos, moment in [(0.5, 0.0), (0.8, 0.5), (0.6, 1.2), (0.7, 3.0)]:
        best.offer(hit(cos, moment))
    assert cosines(best.ranked()) == [0.8, 0.7]


def test_a_hit_between_two_passages_replaces_both_only_when_it_beats_both():
    best = BestHits()
    for cos, moment in [(0.5, 0.0), (0.7, 1.5), (0.6, 0.8)]:
        best.offer(hit(cos, moment))
    assert cosines(best.ranked()) == [0.7, 0.5]
    best.offer(hit(0.9, 0.8))
    assert cosines(best.ranked()) == [0.9]


def test_cameras_do_not_share_passages():
    best = BestHits()
    best.offer(hit(0.5, 0.0, "a"))
    best.offer(hit(0.6, 0.0, "b"))
    assert cosines(best.ranked()) == [0.6, 0.5]
    assert best.best_of("a").cos == 0.5
    assert best.best_of("c") is None


def test_without_times_each_frame_is_a_passage():
    best = BestHits()
    for cos, seq in [(0.5, 0), (0.6, 0), (0.7, 1)]:
        best.offer(hit(cos, None, seq=seq))
    assert cosines(best.ranked()) == [0.7, 0.6]


def test_memory_is_bounded_and_the_best_survive():
    best = BestHits(per_camera=3)
    for i in range(200):
        best.offer(hit((i * 37 % 200) / 200, i * 2.0))
    assert cosines(best.ranked()) == [0.995, 0.99, 0.985]
    assert cosines(best.ranked(2)) == [0.995, 0.99]


def test_a_crop_has_a_margin_stays_in_the_frame_and_is_bounded():
    image = scene([((0, 0, 50, 90), RED)])
    crop = crop_person(image, (0, 0, 50, 90))
    assert crop.shape == (96, 54, 3)
    assert not np.shares_memory(crop, image)
    assert crop_person(scene(width=2000, height=2000), (0, 0, 1000, 1900)).shape[0] == CROP_HEIGHT
    assert crop_person(image, (159.2, 95.2, 159.9, 95.9)).size > 0


def test_a_box_on_the_edge_of_the_frame_still_gives_a_crop():
    image = np.zeros((60, 80, 3), np.uint8)
    assert crop_person(image, (80.0, 10.0, 80.0, 50.0)).size > 0
    assert crop_person(image, (10.0, 60.0, 40.0, 60.0)).size > 0
