"""The teacher at work: crops, a run that learns, the cache of embeddings, and the commands around them."""

import json

import cv2
import numpy as np
import pytest
import torch
from psdiff.__main__ import app
from psdiff.models.reid_teacher import ReidTeacher, TeacherConfig, load_teacher, save_teacher, teacher_hash
from psdiff.training.city.sets import write_set
from psdiff.training.city.writing import Plan
from psdiff.training.datasets.load import load_person_search
from psdiff.training.datasets.schema import UNLABELLED, Crop, LabelledImage, PersonSearchSet, Query, ReidSet
from psdiff.training.teacher.cache import CacheError, load_cache, truth_cache, write_cache
from psdiff.training.teacher.crops import TrainingCrops, cut, table_of_images
from psdiff.training.teacher.embedding import embed_table, score_teacher
from psdiff.training.teacher.recipe import TeacherRecipe
from psdiff.training.teacher.train import NonFiniteTeacherLossError, _Trainer, train_teacher
from typer.testing import CliRunner

NETWORK = {"backbone": "mobilenet_v2", "embedding_dim": 16, "height": 48, "width": 24}
SMALL = TeacherConfig.model_validate(NETWORK)
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))


def small_recipe(**changes):
    settings = {
        "network": NETWORK,
        "epochs": 1,
        "iterations": 2,
        "identities": 2,
        "instances": 2,
        "padding": 2,
        "loader_workers": 0,
    }
    return TeacherRecipe.model_validate(settings | changes)


def small_teacher(seed=0):
    torch.manual_seed(seed)
    return ReidTeacher(SMALL).eval()


def write_rgb(path, image):
    cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    return path


def labelled(path, boxes, pids, camera=0):
    return LabelledImage(path.stem, path, np.array(boxes, np.float32), np.array(pids, np.int64), camera)


@pytest.fixture
def frames(tmp_path):
    """Three frames of 60 x 40 noise: two named people in each, in the first two a stranger beside them."""
    rng = np.random.default_rng(0)
    paths = [
        write_rgb(tmp_path / f"f{i}.png", rng.integers(0, 256, (40, 60, 3)).astype(np.uint8))
        for i in range(3)
    ]
    boxes = [[2, 3, 14, 30], [30, 5, 45, 35], [15, 3, 25, 30]]
    pids = [40, 70, UNLABELLED]
    return [
        labelled(path, boxes[:count], pids[:count], camera=i)
        for i, (path, count) in enumerate(zip(paths, (3, 3, 2), strict=True))
    ]


def search_set(images):
    first = images[0]
    query = Query(0, first.boxes_xyxy[0], int(first.pids[0]), np.array([1, 2]), {1: images[1].boxes_xyxy[:1]})
    return PersonSearchSet("tiny", images, images, [query])


def test_a_cut_holds_every_pixel_that_the_box_touches():
    image = np.arange(10 * 20 * 3, dtype=np.uint8).reshape(10, 20, 3)
    assert np.array_equal(cut(image, np.array([3.2, 1.0, 6.1, 4.5], np.float32)), image[1:5, 3:7])
    assert np.array_equal(cut(image, np.array([-5, -5, 4, 40], np.float32)), image[:, :4])
    assert np.array_equal(cut(image, np.array([0, 0, np.inf, np.inf], np.float32)), image)


@pytest.mark.parametrize(
    "box", [[5, 5, 6, 9], [5, 5, 9, 6], [19, 0, 30, 9], [-9, 0, 1, 9], [25, 0, 40, 9], [-9, -9, -1, -1]]
)
def test_a_box_that_shows_less_than_two_pixels_cuts_nothing(box):
    assert cut(np.zeros((10, 20, 3), np.uint8), np.array(box, np.float32)) is None


def test_a_table_lists_every_box_with_consecutive_classes(frames):
    table = table_of_images(frames)
    assert table.frames.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert table.labels().tolist() == [0, 1, UNLABELLED, 0, 1, UNLABELLED, 0, 1]
    assert table.cameras.tolist() == table.frames.tolist()
    kept = table.rows(table.pids != 40)
    assert kept.labels().tolist() == [0, UNLABELLED, 0, UNLABELLED, 0]
    assert kept.frames.tolist() == [0, 0, 1, 1, 2]


def test_a_frame_counts_as_a_camera_where_none_is_told(tmp_path):
    images = [labelled(tmp_path / name, [[0, 0, 9, 9]] * 2, [1, 2], camera=-1) for name in "ab"]
    assert table_of_images(images).cameras.tolist() == [0, 0, 1, 1]


def test_training_crops_are_disturbed_and_keep_their_size(frames):
    crops = TrainingCrops(table_of_images(frames), SMALL, padding=4, erasing=1.0)
    torch.manual_seed(0)
    views = [crops[3] for _ in range(4)]
    assert all(view.shape == (3, 48, 24) and row == 3 for view, row in views)
    assert len({view.numpy().tobytes() for view, _ in views}) == 4
    # An erased rectangle has the mean colour of the pixels that the network subtracts.
    mean = torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]
    assert all((view == mean).all(dim=0).float().mean() > 0.015 for view, _ in views)


def test_embeddings_do_not_depend_on_what_is_embedded_beside_them(frames):
    teacher = small_teacher()
    together = embed_table(teacher, table_of_images(frames))
    alone = embed_table(teacher, table_of_images(frames[1:2]))
    torch.testing.assert_close(together[3:6], alone)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(8))


def test_embedding_leaves_a_network_in_training_as_it_was(frames):
    teacher, table = small_teacher(), table_of_images(frames)
    expected = embed_table(teacher, table)
    torch.testing.assert_close(embed_table(teacher.train(), table), expected)
    assert teacher.training
    assert teacher_hash(teacher) == teacher_hash(small_teacher())


def coloured_person(rng, pid):
    image = np.full((48, 24, 3), rng.integers(60, 196), np.uint8)
    image[12:36, 6:18] = np.clip(np.array(COLOURS[pid]) * rng.uniform(0.6, 1.2), 0, 255)
    return np.clip(image + rng.normal(0, 10, image.shape), 0, 255).astype(np.uint8)


def coloured_crops(folder, views, seed):
    folder.mkdir()
    rng = np.random.default_rng(seed)
    return [
        Crop(write_rgb(folder / f"{pid}_{view}.png", coloured_person(rng, pid)), pid, camera=view % 2)
        for pid in range(3)
        for view in range(views)
    ]


@pytest.mark.slow
def test_a_run_learns_to_tell_people_apart_whatever_the_light(tmp_path):
    held_out = coloured_crops(tmp_path / "held-out", 4, seed=2)
    data = ReidSet("colours", coloured_crops(tmp_path / "train", 6, seed=1), held_out, held_out)
    settings = {"epochs": 2, "iterations": 15, "identities": 3, "instances": 3, "learning_rate": 0.01}
    recipe = small_recipe(**settings, erasing=0.0, threads=torch.get_num_threads())
    before = score_teacher(small_teacher(recipe.seed), data)
    path = train_teacher(recipe, data, tmp_path / "run", device="cpu")
    teacher, notes = load_teacher(path)
    after = score_teacher(teacher, data)
    assert before.map < 0.75
    assert after.map > 0.85
    assert notes["scores"] == {"map": after.map, "top1": after.top(1), "queries": 12}


def test_a_run_on_frames_writes_a_checkpoint_a_log_and_its_scores(tmp_path, frames):
    seen = []
    recipe = small_recipe(epochs=2, memory={"momentum": 0.2})
    path = train_teacher(recipe, search_set(frames), tmp_path / "run", device="cpu", on_progress=seen.append)
    teacher, notes = load_teacher(path)
    assert [(p.epoch, p.iteration) for p in seen] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(p.loss > 0 and p.images_per_s > 0 for p in seen)
    assert (notes["data"], notes["identities"], notes["crops"], notes["epochs"]) == ("tiny", 2, 8, 2)
    assert notes["recipe"]["memory"]["momentum"] == 0.2
    assert notes["scores"]["queries"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    assert teacher_hash(teacher) != teacher_hash(small_teacher(recipe.seed))


def test_a_step_moves_what_it_saw_and_an_epoch_starts_from_class_means(tmp_path, frames):
    # The stranger of the first frame, row 2, stands where row 0 does; row 5 stands apart in the second frame.
    crowd = labelled(frames[0].path, [[2, 3, 14, 30], [30, 5, 45, 35], [3, 3, 15, 30]], [40, 70, UNLABELLED])
    trainer = _Trainer(small_teacher(), small_recipe(), table_of_images([crowd, *frames[1:]]), out=tmp_path)
    rows = torch.tensor([0, 1, 3, 4, 5])
    assert trainer._excluded(rows[:4]).tolist() == [[True, False]] + [[False, False]] * 3
    memory = trainer._memory()
    before = [bank.clone() for bank in (memory.centroids, memory.queue)]
    crops = TrainingCrops(trainer.table, SMALL, padding=2, erasing=0.5)
    trainer._step(memory, torch.stack([crops[row][0] for row in rows.tolist()]), rows)
    assert (memory.centroids != before[0]).any(dim=1).all()
    assert (memory.queue != before[1]).any(dim=1).tolist() == [False, True]
    features = embed_table(trainer.teacher, trainer.table, with_mirror=False)
    means = torch.stack([features[[0, 3, 6]].mean(dim=0), features[[1, 4, 7]].mean(dim=0)])
    fresh = trainer._memory()
    torch.testing.assert_close(fresh.centroids, torch.nn.functional.normalize(means, dim=1))
    torch.testing.assert_close(fresh.queue, features[[2, 5]])


def test_the_same_seed_gives_the_same_teacher(tmp_path, frames):
    paths = [
        train_teacher(small_recipe(), search_set(frames), tmp_path / name, device="cpu") for name in "ab"
    ]
    first, second = (teacher_hash(load_teacher(path)[0]) for path in paths)
    assert first == second


def test_a_run_goes_on_from_a_teacher(tmp_path, frames):
    save_teacher(small_teacher(seed=5), tmp_path / "first.safetensors", {})
    # A learning rate this small changes next to nothing.
    recipe = small_recipe(learning_rate=1e-12, seed=1)
    path = train_teacher(
        recipe, search_set(frames), tmp_path / "run", init=tmp_path / "first.safetensors", device="cpu"
    )
    torch.testing.assert_close(
        load_teacher(path)[0].projection.state_dict(), small_teacher(seed=5).projection.state_dict()
    )


def test_boxes_that_show_nobody_take_no_part(tmp_path, frames):
    outside = labelled(
        frames[0].path, [[2, 3, 14, 30], [70, 5, 80, 35], [30, 5, 31, 35]], [40, 99, UNLABELLED]
    )
    data = PersonSearchSet("tiny", [outside, *frames[1:]], [], [])
    notes = load_teacher(train_teacher(small_recipe(), data, tmp_path / "run", device="cpu"))[1]
    assert (notes["identities"], notes["crops"]) == (2, 6)
    assert "scores" not in notes


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_batch(tmp_path, frames):
    with pytest.raises(
        NonFiniteTeacherLossError, match=r"loss must be finite, got nan; .*lower learning_rate"
    ):
        train_teacher(small_recipe(learning_rate=1e30), search_set(frames), tmp_path / "run", device="cpu")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["non_finite_batch.pt"]


def test_a_set_without_names_trains_no_teacher(tmp_path, frames):
    strangers = [labelled(frame.path, frame.boxes_xyxy, [UNLABELLED] * len(frame.pids)) for frame in frames]
    with pytest.raises(ValueError, match="data must have at least two labelled people to train on, got 0"):
        train_teacher(small_recipe(), search_set(strangers), tmp_path / "run", device="cpu")


def test_crops_of_people_are_ranked_against_the_gallery(tmp_path):
    crops = coloured_crops(tmp_path / "people", 2, seed=3)
    scores = score_teacher(small_teacher(), ReidSet("x", crops, crops[::2], crops[1::2]))
    assert scores.num_queries == 3
    assert score_teacher(small_teacher(), ReidSet("x", crops)) is None


@pytest.fixture
def cached(tmp_path, frames):
    teacher = small_teacher()
    return write_cache(tmp_path / "cache", teacher, frames, dataset="tiny"), teacher_hash(teacher)


def test_a_cache_is_read_by_image_and_box_in_any_order(frames, cached):
    path, teacher = cached
    assert [file.name for file in path.parent.iterdir()] == [f"tiny_{teacher}.npz"]
    cache = load_cache(path, [frames[2], frames[0]], teacher)
    assert cache.dim == 16
    expected = embed_table(small_teacher(), table_of_images(frames)).numpy()
    np.testing.assert_allclose(cache.embeddings(frames[0]), expected[:3], atol=1e-6)
    np.testing.assert_allclose(cache.embeddings(frames[2]), expected[6:], atol=1e-6)
    assert cache.known(frames[0]).all()


def test_a_cache_of_another_teacher_is_refused(frames, cached):
    path, teacher = cached
    with pytest.raises(
        CacheError,
        match=f"must be of teacher 000000000000, got {teacher} in .*; make it again with psdiff teacher embed",
    ):
        load_cache(path, frames, "000000000000")


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (
            [[2, 3, 14, 30], [30, 5, 46, 35]],
            r"box 1 of f2 must be \[30.0, 5.0, 46.0, 35.0\] as in the data set, got \[30.0, 5.0, 45.0, 35.0\]",
        ),
        ([[30, 5, 45, 35], [2, 3, 14, 30]], "box 0 of f2 must be"),
        ([[2, 3, 14, 30]], "f2 must have the 1 boxes of the data set, got 2"),
    ],
)
def test_a_cache_of_other_boxes_is_refused(frames, cached, boxes, message):
    path, teacher = cached
    changed = labelled(frames[2].path, boxes, [40] * len(boxes))
    with pytest.raises(CacheError, match=f"{message}.*psdiff teacher embed"):
        load_cache(path, [*frames[:2], changed], teacher)


def test_a_cache_without_an_image_is_refused(tmp_path, frames, cached):
    path, teacher = cached
    unknown = labelled(tmp_path / "f9.png", [[0, 0, 9, 9]], [1])
    with pytest.raises(CacheError, match=r"must hold the image f9, got .*tiny_.* without; make it again"):
        load_cache(path, [*frames, unknown], teacher)


def test_a_file_that_is_no_cache_is_refused(tmp_path, frames):
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "other.npz", names=np.array(["f0"]))
    for name, message in [("text", "must hold"), ("other", "must hold"), ("none", "which does not exist")]:
        with pytest.raises(CacheError, match=message):
            load_cache(tmp_path / f"{name}.npz", frames, "0" * 12)


def test_a_mirrored_image_has_the_same_embeddings(tmp_path, frames):
    image = cv2.imread(str(frames[0].path))
    path = tmp_path / "mirrored.png"
    cv2.imwrite(str(path), image[:, ::-1])
    boxes = frames[0].boxes_xyxy + np.float32(0.3)
    x1, y1, x2, y2 = boxes.T
    mirrored = labelled(path, np.stack([60 - x2, y1, 60 - x1, y2], axis=1), frames[0].pids)
    original = labelled(frames[0].path, boxes, frames[0].pids)
    found = embed_table(small_teacher(), table_of_images([original, mirrored]))
    torch.testing.assert_close(found[:3], found[3:], atol=1e-5, rtol=0)


def test_a_box_that_shows_nobody_has_a_zero_row_and_is_unknown(tmp_path, frames):
    image = labelled(
        frames[0].path, [[2, 3, 14, 30], [5, 5, 6, 30], [58.5, 3, 90, 30], [70, 0, 80, 9]], [1, 2, 3, 4]
    )
    teacher = small_teacher()
    cache = load_cache(
        write_cache(tmp_path, teacher, [image], dataset="tiny"), [image], teacher_hash(teacher)
    )
    assert cache.known(image).tolist() == [True, False, True, False]
    assert not cache.embeddings(image)[[1, 3]].any()
    np.testing.assert_allclose(np.linalg.norm(cache.embeddings(image)[[0, 2]], axis=1), 1, atol=1e-5)


def test_an_image_without_people_has_no_rows(tmp_path, frames):
    empty = labelled(frames[1].path, np.zeros((0, 4)), [])
    teacher = small_teacher()
    path = write_cache(tmp_path, teacher, [frames[0], empty], dataset="tiny")
    assert load_cache(path, [empty], teacher_hash(teacher)).embeddings(empty).shape == (0, 16)


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """A PRW-like set of a few frames of the synthetic city."""
    root = tmp_path_factory.mktemp("city") / "prw"
    write_set("prw", root, Plan(images=18, people=4, width=320, height=192))
    return root


def test_the_truth_of_the_city_reads_as_a_perfect_teacher(city):
    data = load_person_search("prw", city)
    cache = truth_cache(city / "truth.npz", [*data.train, *data.test])
    named = {}
    for image in data.train:
        for pid, code in zip(image.pids.tolist(), cache.embeddings(image), strict=True):
            named.setdefault(pid, []).append(code)
    named.pop(UNLABELLED)
    assert len(named) == data.num_train_pids
    for codes in named.values():
        np.testing.assert_allclose(codes, [codes[0]] * len(codes), atol=1e-6)
    moved = LabelledImage(data.train[0].name, city, data.train[0].boxes_xyxy + 1, data.train[0].pids)
    with pytest.raises(CacheError, match="draw the city again with psdiff synth"):
        truth_cache(city / "truth.npz", [moved])


def psdiff(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_teacher_is_trained_and_describes_a_data_set_from_the_command_line(tmp_path, city):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(small_recipe().model_dump_json())
    trained = psdiff("teacher", "train", "prw", city, "--recipe", recipe, "--out", tmp_path)
    assert trained.exit_code == 0, trained.output
    assert "mAP" in trained.stdout
    checkpoint = tmp_path / "teacher.safetensors"
    arguments = (checkpoint, "prw", city, "--out", tmp_path, "--workers", 0)
    embedded = psdiff("teacher", "embed", *arguments)
    assert embedded.exit_code == 0, embedded.output
    images = load_person_search("prw", city).train
    teacher = teacher_hash(load_teacher(checkpoint)[0])
    cache = load_cache(tmp_path / f"prw_{teacher}.npz", images, teacher)
    assert all(cache.known(image).all() for image in images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nowhere", "."], "dataset must be one of cuhk-sysu, prw"),
        (["train", "prw", "nowhere"], "nowhere must exist"),
        (["train", "prw", ".", "--recipe", "nowhere.yaml"], "recipe must be a YAML file, got nowhere.yaml"),
        (["embed", "nowhere.safetensors", "prw", "."], "teacher must be a .safetensors file, got nowhere"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(arguments, message):
    result = psdiff("teacher", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
