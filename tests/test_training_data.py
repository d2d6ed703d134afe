"""What a run reads: drawn frames, or a data set with the embeddings of its people."""

import numpy as np
import pytest
import torch
from psdiff.models.reid_teacher import ReidTeacher, TeacherConfig, save_teacher, teacher_hash
from psdiff.training import train as training
from psdiff.training.city.sets import write_set
from psdiff.training.city.writing import Plan
from psdiff.training.dataset import CanvasFrames, FramePool, SearchFrames, frame_batches, mirrored
from psdiff.training.datasets.images import read_image
from psdiff.training.datasets.schema import DatasetError
from psdiff.training.recipe import RecipeError
from psdiff.training.sources import check_embedding_dim, open_source
from psdiff.training.teacher.cache import CacheError
from tiny_run import assert_same, tiny_model, tiny_recipe, tiny_stage, weights, write_tiny_checkpoint


def test_the_pool_gives_the_same_frame_again_and_wraps_around(tmp_path):
    pool = FramePool(tmp_path, seed=3, size=2)
    image, boxes, embeddings = pool.frame(1)
    again = FramePool(tmp_path, seed=3, size=2).frame(3)
    assert (image == again[0]).all()
    assert (boxes == again[1]).all()
    assert embeddings.shape == (len(boxes), 64)
    assert len(list(tmp_path.glob("frames-3/*.npz"))) == 1


def test_items_of_the_data_set_do_not_depend_on_how_they_are_shared_out(tmp_path):
    pool = FramePool(tmp_path, seed=3, size=4)
    all_of_them = CanvasFrames(pool, range(4), seed=3, width=160, height=96)
    second_rank = CanvasFrames(pool, range(1, 4, 2), seed=3, width=160, height=96)
    image, people, index = second_rank[1]
    assert index == 3
    assert torch.equal(image, all_of_them[3][0])
    assert torch.equal(people.boxes_norm, all_of_them[3][1].boxes_norm)


def test_half_of_the_images_are_mirrored_and_their_boxes_with_them():
    class OneBox:
        embedding_dim = 2

        def frame(self, index):
            image = np.zeros((96, 160, 3), np.uint8)
            image[:, :40] = 255
            return image, np.array([[0, 0, 40, 96]], np.float32), np.eye(2, dtype=np.float32)[:1]

    frames = CanvasFrames(OneBox(), range(200), seed=0, width=160, height=96)
    left = 0
    for image, people, _ in frames:
        bright = image[48, :, 0].numpy().nonzero()[0]
        assert people.boxes_norm[0, [0, 2]].mul(160).tolist() == [bright[0], bright[-1] + 1]
        left += bright[0] == 0
    assert 75 < left < 125


def test_mirroring_twice_is_the_original(tmp_path):
    image, boxes, _ = FramePool(tmp_path, seed=3, size=4).frame(0)
    once = mirrored(image, boxes)
    twice = mirrored(*once)
    assert (twice[0] == image).all()
    assert abs(twice[1] - boxes).max() < 1e-4 if len(boxes) else True
    assert (once[0] != image).any()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_keep_the_order_of_the_images(tmp_path, workers):
    frames = CanvasFrames(FramePool(tmp_path, seed=3, size=3), range(7, 12), seed=3, width=64, height=32)
    batches = list(frame_batches(frames, batch_size=2, workers=workers))
    assert [batch.samples for batch in batches] == [[7, 8], [9, 10], [11]]
    assert batches[0].images.shape == (2, 32, 64, 3)
    assert torch.equal(batches[0].images[1], frames[1][0])


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A PRW of 12 frames, 7 of them for training, with the truth in the place of a teacher."""
    root = tmp_path_factory.mktemp("city") / "prw"
    write_set("prw", root, Plan(images=12, people=4, width=160, height=96))
    return root


def on_city(city, **changes):
    data = {"format": "prw", "root": city, "embeddings": city / "truth.npz"} | changes
    return tiny_recipe(data=data, stages=[tiny_stage(iterations=2)])


def test_a_run_learns_from_a_data_set(city, tmp_path):
    start, seen = write_tiny_checkpoint(tmp_path), []
    path = training.train(on_city(city), tmp_path / "run", init=start, on_progress=seen.append)
    assert [p.iteration for p in seen] == [1, 2]
    before, after = weights(start), weights(path)
    assert not torch.equal(before["denoiser.heads.logit.weight"], after["denoiser.heads.logit.weight"])
    assert not (tmp_path / "run" / "frames-0").exists()
    with_workers = on_city(city).model_copy(update={"loader_workers": 2})
    assert_same(weights(training.train(with_workers, tmp_path / "second", init=start)), after)


def test_every_image_is_read_once_an_epoch_and_every_epoch_in_another_order(city, tmp_path):
    source = open_source(on_city(city), tmp_path)
    assert isinstance(source, SearchFrames)
    count = len(source.images)
    assert count == 7
    epochs = [[number(source, epoch * count + i) for i in range(count)] for epoch in range(4)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(count))] * 4
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other_seed = SearchFrames(source.images, source.cache, source.seed + 1)
    assert [number(other_seed, i) for i in range(count)] != epochs[0]


def number(source, index):
    """Which of the images an example is, by its pixels."""
    [found] = [
        i for i, image in enumerate(source.images) if (read_image(image) == source.frame(index)[0]).all()
    ]
    return found


def test_an_example_has_the_embeddings_of_its_own_boxes(city, tmp_path):
    source = open_source(on_city(city), tmp_path)
    truth = np.load(city / "truth.npz")
    for index in range(len(source.images)):
        _, boxes, embeddings = source.frame(index)
        row = truth["names"].tolist().index(source.images[number(source, index)].name)
        rows = slice(*truth["offsets"][row : row + 2])
        np.testing.assert_array_equal(boxes, truth["boxes_xyxy"][rows])
        np.testing.assert_array_equal(embeddings, truth["embeddings"][rows])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"root": None},
            RecipeError,
            "data.root must be given, got nothing; set it in the recipe, or add --data",
        ),
        (
            {"embeddings": None},
            RecipeError,
            "data.embeddings must be given, got nothing; .* add --embeddings",
        ),
        ({"root": "nowhere"}, DatasetError, "nowhere"),
        ({"teacher": "nowhere.safetensors"}, RecipeError, "data.teacher: .*nowhere.safetensors"),
        ({"embeddings": "nowhere.npz"}, CacheError, "embedding cache must be an .npz file, got nowhere.npz"),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(city, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        training.train(on_city(city, **changes), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_embeddings_of_other_boxes_are_refused(city, tmp_path):
    truth = dict(np.load(city / "truth.npz"))
    truth["boxes_xyxy"] = truth["boxes_xyxy"] + 1
    np.savez(tmp_path / "truth.npz", **truth)
    with pytest.raises(CacheError, match=r"box 0 of .* must be .* as in the data set"):
        open_source(on_city(city, embeddings=tmp_path / "truth.npz"), tmp_path)


def test_embeddings_of_another_size_are_refused_before_anything_is_written(city, tmp_path):
    with pytest.raises(
        RecipeError, match=r"embedding_dim of the network must be 64 as in the data's .* got 256"
    ):
        training.train(on_city(city).model_copy(update={"preset": "psdiff_r50"}), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    source = open_source(on_city(city), tmp_path)
    check_embedding_dim(source, tiny_model().config)


def test_embeddings_of_another_teacher_are_refused(city, tmp_path):
    config = TeacherConfig(backbone="mobilenet_v2", height=64, width=32, embedding_dim=64)
    teachers = {name: ReidTeacher(config) for name in ("own", "other")}
    for name, teacher in teachers.items():
        save_teacher(teacher, tmp_path / f"{name}.safetensors", {})
    cache = tmp_path / "cache.npz"
    np.savez(cache, teacher_hash=teacher_hash(teachers["own"]), **np.load(city / "truth.npz"))
    source = open_source(on_city(city, embeddings=cache, teacher=tmp_path / "own.safetensors"), tmp_path)
    assert len(source.frame(0)[2]) == len(source.frame(0)[1])
    with pytest.raises(CacheError, match=r"embedding cache must be of teacher .*; make it again with psdiff"):
        open_source(on_city(city, embeddings=cache, teacher=tmp_path / "other.safetensors"), tmp_path)
