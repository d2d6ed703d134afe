"""The teacher's parts: network and file, memory, sampler, recipe."""

import math

import numpy as np
import pytest
import torch
from psdiff.models.backbone import InitialWeights
from psdiff.models.reid_teacher import (
    GeneralisedMean,
    ReidTeacher,
    TeacherConfig,
    load_body_weights,
    load_teacher,
    network_input,
    save_teacher,
    teacher_hash,
)
from psdiff.training.datasets.schema import UNLABELLED
from psdiff.training.recipe import RecipeError
from psdiff.training.teacher.memory import HybridMemory, MemorySettings, overlaps
from psdiff.training.teacher.recipe import TeacherRecipe, load_teacher_recipe
from psdiff.training.teacher.sampler import IdentitySampler
from torch.nn import functional as F
from torchvision.models import mobilenet_v2

SMALL = TeacherConfig(backbone="mobilenet_v2", embedding_dim=16, height=48, width=24)


def small_teacher(seed=0, **changes):
    torch.manual_seed(seed)
    return ReidTeacher(SMALL.model_copy(update=changes))


def random_crops(count, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3, SMALL.height, SMALL.width), np.uint8)
    return torch.from_numpy(pixels)


# The counts are those of HHCL's public code.
@pytest.mark.parametrize(("embedding_dim", "count"), [(256, 24_033_088), (None, 23_512_128)])
def test_the_resnet_teacher_has_the_published_number_of_parameters(embedding_dim, count):
    with torch.device("meta"):
        teacher = ReidTeacher(TeacherConfig(embedding_dim=embedding_dim))
    assert sum(parameter.numel() for parameter in teacher.parameters()) == count


@pytest.mark.parametrize(("backbone", "channels"), [("resnet50", 2048), ("mobilenet_v2", 320)])
def test_a_body_has_stride_16(backbone, channels):
    with torch.device("meta"):
        cells = ReidTeacher(TeacherConfig(backbone=backbone)).body(torch.zeros(1, 3, 256, 128))
    assert cells.shape == (1, channels, 16, 8)


@pytest.mark.parametrize(
    ("changes", "dim"), [({}, 16), ({"embedding_dim": None}, 320), ({"pooling": "gem"}, 16)]
)
def test_embeddings_are_unit_rows(changes, dim):
    teacher = small_teacher(**changes).eval()
    embeddings = teacher(random_crops(3))
    assert embeddings.shape == (3, dim) == (3, teacher.config.dim)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))


def test_the_bias_of_the_last_norm_stays_zero_while_the_rest_learns():
    teacher = small_teacher()
    before = teacher.norm.weight.detach().clone()
    optimizer = torch.optim.Adam([p for p in teacher.parameters() if p.requires_grad], lr=0.1)
    teacher(random_crops(4))[:, 0].sum().backward()
    optimizer.step()
    assert not teacher.norm.bias.any()
    assert not torch.equal(teacher.norm.weight, before)


def test_a_generalised_mean_lies_between_mean_and_maximum():
    cells = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
    # ((1 + 8 + 27 + 64) / 4) ** (1 / 3) = 25 ** (1 / 3)
    assert GeneralisedMean()(cells).item() == pytest.approx(2.924018, abs=1e-5)


def test_a_crop_and_its_mirror_image_have_one_embedding():
    teacher = small_teacher().eval()
    crops = random_crops(2)
    torch.testing.assert_close(teacher.embed(crops), teacher.embed(crops.flip(-1)))
    assert (teacher(crops) - teacher(crops.flip(-1))).abs().max() > 1e-4


def test_crops_of_any_size_become_network_input():
    image = np.full((7, 90, 3), (10, 120, 240), np.uint8)
    pixels = network_input(image[:, ::-1], SMALL)
    assert pixels.shape == (3, 48, 24)
    assert pixels.dtype == torch.uint8
    assert (pixels == torch.tensor([10, 120, 240])[:, None, None]).all()


def test_the_body_starts_from_a_classifier_with_any_number_of_classes():
    classifier = mobilenet_v2(num_classes=7)
    teacher = small_teacher()
    head = teacher.projection.weight.clone()
    load_body_weights(teacher, InitialWeights(classifier.state_dict(), (0, 0, 0), (1, 1, 1)))
    torch.testing.assert_close(teacher.body.state_dict(), classifier.features[:18].state_dict())
    assert torch.equal(teacher.projection.weight, head)


def test_a_teacher_is_read_back_as_it_was_written(tmp_path):
    teacher = small_teacher().eval()
    save_teacher(teacher, tmp_path / "teacher.safetensors", {"made_by": "a test"})
    read, notes = load_teacher(tmp_path / "teacher.safetensors")
    assert notes == {"made_by": "a test"}
    assert teacher_hash(read) == teacher_hash(teacher)
    assert not read.training
    assert torch.equal(read(random_crops(2)), teacher(random_crops(2)))
    assert [path.name for path in tmp_path.iterdir()] == ["teacher.safetensors"]


def test_the_hash_tells_weights_and_settings_apart():
    hashes = [
        teacher_hash(teacher)
        for teacher in (small_teacher(), small_teacher(seed=1), small_teacher(height=64), small_teacher())
    ]
    assert len(set(hashes)) == 3
    assert hashes[0] == hashes[3]


def test_a_file_that_is_no_teacher_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no weights here at all")
    with pytest.raises(ValueError, match=r"teacher must be written by psdiff teacher train, got .*text"):
        load_teacher(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="which does not exist"):
        load_teacher(tmp_path / "none.safetensors")


def test_altered_weights_are_refused(tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_teacher(small_teacher(), path, {})
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="teacher must have the weights of its hash"):
        load_teacher(path)


def unit_rows(count, dim=8, seed=0):
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def memory_of(features, labels, unlabelled=None, instances=2, **settings):
    if unlabelled is None:
        unlabelled = features[:0]
    return HybridMemory(
        features,
        torch.as_tensor(labels),
        unlabelled=unlabelled,
        instances=instances,
        settings=MemorySettings(**settings),
    )


def angles(*degrees):
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_identical_classes_cost_the_logarithm_of_their_number():
    memory = memory_of(unit_rows(1).repeat(10, 1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    loss = memory.loss(unit_rows(6, seed=1), torch.tensor([0, 1, 2, 3, 4, 4]))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-5)


def test_the_memory_starts_from_normalised_class_means_and_fills_short_classes_again():
    memory = memory_of(angles(0.0, 90.0, 180.0), [0, 0, 1], instances=3)
    torch.testing.assert_close(memory.centroids, angles(45.0, 180.0))
    torch.testing.assert_close(memory.instances[0], angles(0.0, 90.0, 0.0))
    torch.testing.assert_close(memory.instances[1], angles(180.0, 180.0, 180.0))


def test_hard_logits_are_the_farthest_own_and_the_nearest_other_instance():
    # The anchor stands at 0 degrees. Class 0 at 30 and 60, class 1 at 90 and 180, class 2 at -45 and 120.
    memory = memory_of(angles(30.0, 60.0, 90.0, 180.0, -45.0, 120.0), [0, 0, 1, 1, 2, 2])
    logits = memory.hard_logits(angles(0.0), torch.tensor([0]))
    expected = [math.cos(math.radians(value)) for value in (60, 90, 45)]
    torch.testing.assert_close(logits, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("weighting", "centroid_share", "hard_share"), [("paper", 0.25, 0.75), ("public_code", 0.1875, 0.25)]
)
def test_the_loss_weighs_centroids_and_hard_instances(weighting, centroid_share, hard_share):
    # mu = 1/4: the paper's 1/4 C + 3/4 I, and the public code's 1/4 (I + 3/4 C).
    memory = memory_of(
        angles(30.0, 60.0, 90.0, 180.0),
        [0, 0, 1, 1],
        weighting=weighting,
        centroid_share=0.25,
        temperature=1.0,
    )
    cosine = [math.cos(math.radians(value)) for value in (45, 135, 60, 90)]
    centroid = math.log(1 + math.exp(cosine[1] - cosine[0]))
    hard = math.log(1 + math.exp(cosine[3] - cosine[2]))
    loss = memory.loss(angles(0.0), torch.tensor([0])).item()
    assert loss == pytest.approx(centroid_share * centroid + hard_share * hard, abs=1e-6)


def test_the_queue_enlarges_the_denominator_and_nothing_else():
    # One class, at the anchor itself; a stranger at 60 degrees, whose cosine is 1/2.
    memory = memory_of(angles(0.0, 0.0), [0, 0], unlabelled=angles(60.0), temperature=0.5)
    loss = memory.loss(angles(0.0), torch.tensor([0])).item()
    assert loss == pytest.approx(math.log(1 + math.exp((0.5 - 1) / 0.5)), abs=1e-6)


def test_an_excluded_stranger_is_no_negative():
    features, strangers = unit_rows(6), unit_rows(3, seed=1)
    labels, anchors = torch.tensor([0, 0, 1, 1, 2, 2]), unit_rows(4, seed=2)
    excluded = torch.zeros(4, 3, dtype=torch.bool)
    excluded[:, 1:] = True
    some = memory_of(features, labels, unlabelled=strangers).loss(anchors, labels[:4], excluded)
    one = memory_of(features, labels, unlabelled=strangers[:1]).loss(anchors, labels[:4])
    none = memory_of(features, labels).loss(anchors, labels[:4])
    torch.testing.assert_close(some, one)
    assert one > none


def test_strangers_at_the_same_place_of_the_same_frame_overlap():
    anchor = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    # IoU 1/3, then 1/4, then 1 but in another frame.
    others = torch.tensor([[0.0, 5.0, 10.0, 15.0], [0.0, 6.0, 10.0, 16.0], [0.0, 0.0, 10.0, 10.0]])
    found = overlaps(torch.tensor([4]), anchor, torch.tensor([4, 4, 5]), others, min_iou=0.3)
    assert found.tolist() == [[True, False, False]]


def test_whole_crops_never_overlap():
    boxes = torch.tensor([[0.0, 0.0, math.inf, math.inf]] * 2)
    found = overlaps(torch.tensor([0, 1]), boxes, torch.tensor([2, 3]), boxes, min_iou=0.0)
    assert not found.any()


def test_an_update_moves_centroids_by_momentum_and_replaces_instances():
    memory = memory_of(angles(0.0, 0.0, 180.0, 180.0), [0, 0, 1, 1], momentum=0.25)
    memory.update(angles(60.0, 120.0), torch.tensor([0, 0]))
    # The mean of 60 and 120 degrees is (0, sin 60); 1/4 (1, 0) + 3/4 (0, .8660) = (.25, .6495).
    expected = F.normalize(torch.tensor([[0.25, 0.75 * math.sin(math.radians(60))]]), dim=1)
    torch.testing.assert_close(memory.centroids[:1], expected)
    torch.testing.assert_close(memory.instances[0], angles(60.0, 120.0))
    torch.testing.assert_close(memory.centroids[1:], angles(180.0))


def test_a_refresh_moves_the_seen_strangers_only():
    memory = memory_of(angles(0.0, 180.0), [0, 1], unlabelled=angles(0.0, 90.0, 180.0), momentum=0.5)
    memory.refresh(angles(90.0), torch.tensor([2]))
    torch.testing.assert_close(memory.queue, angles(0.0, 90.0, 135.0))


def gradient(with_update):
    memory = memory_of(unit_rows(6), [0, 0, 1, 1, 2, 2], unlabelled=unit_rows(3, seed=1))
    weight = torch.eye(8, requires_grad=True)
    features, labels = F.normalize(unit_rows(4, seed=2) @ weight, dim=1), torch.tensor([0, 1, 2, 0])
    loss = memory.loss(features, labels)
    loss.backward(retain_graph=True)
    if with_update:
        memory.update(features, labels)
        memory.refresh(features[:2], torch.tensor([0, 2]))
    return weight.grad, memory, loss


def test_an_update_after_backward_leaves_the_gradient_and_keeps_no_graph():
    plain, _, _ = gradient(with_update=False)
    updated, memory, _ = gradient(with_update=True)
    assert torch.equal(plain, updated)
    assert plain.abs().max() > 0
    assert not any(bank.requires_grad for bank in (memory.centroids, memory.instances, memory.queue))


def test_an_update_before_backward_is_an_error():
    _, _, loss = gradient(with_update=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def sampler_of(labels, cameras, **changes):
    settings = {"identities": 2, "instances": 4, "unlabelled_share": 0.25, "batches": 30, "seed": 0}
    return IdentitySampler(np.array(labels), np.array(cameras), **(settings | changes))


def test_a_batch_holds_people_times_views_and_the_unlabelled_share():
    labels = np.repeat([0, 1, 2, 3, UNLABELLED], 12)
    for batch in sampler_of(labels, np.arange(60) % 3, identities=3):
        found, counts = np.unique(labels[batch], return_counts=True)
        assert found[0] == UNLABELLED
        assert counts.tolist() == [4, 4, 4, 4]
        # Four strangers of sixteen crops, none twice: the queue is written once a place.
        strangers = [row for row in batch if labels[row] == UNLABELLED]
        assert len(set(strangers)) == 4


def test_views_come_from_other_cameras_than_the_anchor():
    # Each class has 5 views by camera 0 and 3 by camera 1.
    labels, cameras = np.repeat([0, 1], 8), np.tile([0, 0, 0, 0, 0, 1, 1, 1], 2)
    for batch in sampler_of(labels, cameras, unlabelled_share=0.0):
        for label in (0, 1):
            views = [row for row in batch if labels[row] == label]
            by_camera = sorted(np.bincount(cameras[views], minlength=2).tolist())
            assert by_camera == [1, 3]
            assert len(set(views)) == 4


def test_a_class_with_too_few_views_gives_some_twice():
    # Class 0 has one view by another camera, class 1 one camera, class 2 a single view.
    labels, cameras = [0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 0]
    cameras[2] = 5
    seen = {label: set() for label in range(3)}
    for batch in sampler_of(labels, cameras, identities=3, unlabelled_share=0.0):
        assert len(batch) == 12
        for row in batch:
            seen[labels[row]].add(row)
    assert seen == {0: {0, 1, 2}, 1: {3, 4}, 2: {5}}


def test_classes_and_strangers_take_turns():
    labels = np.array([0, 1, 2, 3, UNLABELLED, UNLABELLED, UNLABELLED, UNLABELLED])
    batches = list(sampler_of(labels, np.zeros(8), unlabelled_share=0.2, batches=2))
    rows = [row for batch in batches for row in batch]
    assert set(labels[rows]) == {UNLABELLED, 0, 1, 2, 3}
    assert sorted(row for row in rows if row >= 4) == [4, 5, 6, 7]


def test_fewer_people_than_wanted_and_no_strangers_make_smaller_batches():
    assert [len(batch) for batch in sampler_of([0, 0, 1, 1], [0, 1, 0, 1], identities=16, batches=2)] == [
        8,
        8,
    ]


def test_the_same_seed_draws_the_same_batches():
    labels, cameras = np.repeat([0, 1, 2, UNLABELLED], 5), np.arange(20) % 2
    first, again, other = (list(sampler_of(labels, cameras, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_default_recipe_is_the_published_one():
    recipe = TeacherRecipe()
    assert (recipe.epochs, recipe.iterations, recipe.decay_epochs) == (60, 200, 20)
    assert (recipe.identities, recipe.instances) == (16, 16)
    assert (recipe.learning_rate, recipe.weight_decay) == (3.5e-4, 5e-4)
    memory = recipe.memory
    assert (memory.temperature, memory.momentum, memory.centroid_share) == (0.05, 0.1, 0.5)
    assert (recipe.network.height, recipe.network.width) == (256, 128)


def test_a_recipe_is_read_and_a_wrong_one_is_told(tmp_path):
    path = tmp_path / "teacher.yaml"
    path.write_text("network: {backbone: mobilenet_v2}\nmemory: {momentum: 0.2}\n")
    recipe = load_teacher_recipe(path)
    assert (recipe.network.backbone, recipe.memory.momentum) == ("mobilenet_v2", 0.2)
    for text, message in [
        ("memory: {temprature: 1}", r"memory\.temprature must be a known key; did you mean temperature\?"),
        ("instances: 1", "instances: Input should be greater than 1, got 1"),
        ("epochs: [", "recipe must be YAML, got"),
    ]:
        path.write_text(text)
        with pytest.raises(RecipeError, match=message):
            load_teacher_recipe(path)
    with pytest.raises(RecipeError, match="which does not exist"):
        load_teacher_recipe(tmp_path / "nowhere.yaml")
