"""What a training step sees and minimises: the noise of each image, and the loss of a batch."""

import pytest
import torch
from psdiff.models.config import PSDiffConfig
from psdiff.models.denoiser import Prediction
from psdiff.models.diffusion import boxes_to_signal
from psdiff.training.matcher import Match, People
from psdiff.training.noising import image_generator, noisy_group, wrong_embeddings
from psdiff.training.objective import _image_cosine, denoising_objective
from tiny_run import TINY, tiny_model, tiny_recipe
from torch.nn import functional as F

CONFIG = PSDiffConfig.model_validate(TINY)
LAST = CONFIG.num_timesteps - 1


def people_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 0.5
    size = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
    embeddings = F.normalize(torch.randn(count, CONFIG.embedding_dim, generator=generator), dim=1)
    return People(torch.cat([corner, corner + size], dim=1), embeddings)


def noise_of(samples, people, recipe, max_timestep=1000):
    generators = [image_generator(recipe.seed, sample) for sample in samples]
    return noisy_group(CONFIG, people, recipe, generators, max_timestep=max_timestep)


RECIPE = tiny_recipe(padding="mixed", embedding_dropout=0.5, embedding_error=0.7)
IMAGES = [people_of(3, 0), people_of(0), people_of(1, 1), people_of(12, 2)]
SAMPLES = [4, 5, 9, 1_000_000_007]


def test_the_noise_of_an_image_does_not_depend_on_the_batch_it_is_in():
    batch = noise_of(SAMPLES, IMAGES, RECIPE)
    for row, (sample, people) in enumerate(zip(SAMPLES, IMAGES, strict=True)):
        for part, alone in zip(batch, noise_of([sample], [people], RECIPE), strict=True):
            assert torch.equal(part[row : row + 1], alone)


def test_each_image_and_each_seed_has_noise_of_its_own():
    people = [people_of(3)] * 3
    boxes = noise_of([0, 1, 2], people, RECIPE).boxes_norm
    other = noise_of([0, 1, 2], people, tiny_recipe(seed=1)).boxes_norm
    distances = torch.cdist(torch.cat([boxes, other]).flatten(1), torch.cat([boxes, other]).flatten(1))
    assert (distances + torch.eye(6) > 0.5).all()


def test_the_generator_tells_millions_of_images_apart():
    # PyTorch's generator on the CPU takes the lowest 32 bits of a seed.
    seeds = {image_generator(3, sample).initial_seed() % 2**32 for sample in range(0, 10**7, 997)}
    assert len(seeds) == len(range(0, 10**7, 997))


def test_pure_noise_is_the_last_timestep_for_boxes_and_embeddings():
    noise = noise_of(SAMPLES, IMAGES, tiny_recipe(pure_noise=True))
    assert noise.t.tolist() == noise.t_emb.tolist() == [LAST] * 4
    # The same noise on other people: what is left of them is sqrt(abar) = 5e-5 of the signal.
    others = [people_of(len(people.boxes_norm), seed=7) for people in IMAGES]
    other = noise_of(SAMPLES, others, tiny_recipe(pure_noise=True))
    assert (noise.emb_t - other.emb_t).abs().max() < 2 * CONFIG.embedding_scale * 4.93e-5
    assert (noise.boxes_norm - other.boxes_norm).abs().max() < 1e-3
    assert noise.emb_t.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("limit", [1, 10, 150, 1000])
def test_a_timestep_is_below_the_limit_of_its_group(limit):
    noise = noise_of(range(200), [people_of(1)] * 200, RECIPE, max_timestep=limit)
    assert noise.t.min() >= 0
    assert noise.t.max() < limit
    assert noise.t.double().mean().item() == pytest.approx((limit - 1) / 2, abs=0.08 * limit)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_images_has_pure_noise_for_embeddings(share):
    noise = noise_of(range(400), [people_of(1)] * 400, tiny_recipe(embedding_dropout=share))
    dropped = noise.t_emb != noise.t
    assert set(noise.t_emb[dropped].tolist()) <= {LAST}
    assert dropped.double().mean().item() == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("people", IMAGES, ids=lambda people: f"{len(people.boxes_norm)} people")
def test_each_proposal_knows_the_person_it_was_made_from(people):
    # At t = 0 the noise is 0.0064 of the signal: the person can be read from box and embedding.
    recipe = tiny_recipe(padding="mixed", num_proposals=20)
    boxes, emb_t, _, _, origin = (part[0] for part in noise_of([4], [people], recipe, max_timestep=1))
    made = origin >= 0
    assert made.sum() == (10 if len(people.boxes_norm) else 0)
    clean = boxes_to_signal(people.boxes_norm[origin[made]], CONFIG.box_scale)
    assert (boxes_to_signal(boxes[made], CONFIG.box_scale) - clean).abs().lt(0.04).all()
    assert (F.cosine_similarity(emb_t[made], people.embeddings[origin[made]], dim=1) > 0.99).all()
    assert (emb_t[~made].norm(dim=1) < 0.1).all()


def test_repeating_shares_the_proposals_evenly():
    recipe = tiny_recipe(padding="repeat", num_proposals=20)
    origin = noise_of([0], [people_of(3)], recipe).origin[0]
    assert sorted(origin.bincount().tolist()) == [6, 7, 7]


def test_wrong_embeddings_are_unit_vectors_within_the_error():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(500, 64, generator=generator), dim=1)
    wrong = wrong_embeddings(true, 0.7)
    cosine = (true * wrong).sum(1)
    torch.testing.assert_close(wrong.norm(dim=1), torch.ones(500))
    assert cosine.min() >= 0.3 - 1e-4
    assert cosine.mean().item() == pytest.approx(0.65, abs=0.05)


def test_an_embedding_that_nobody_knows_stays_unknown():
    true = F.normalize(torch.randn(6, 64), dim=1)
    true[[1, 4]] = 0
    wrong = wrong_embeddings(true, 0.7)
    assert wrong.norm(dim=1).tolist() == pytest.approx([1, 0, 1, 1, 0, 1], abs=1e-5)


def objective(model, images, people, recipe, samples):
    features = model.backbone(images)
    generators = [image_generator(recipe.seed, sample) for sample in samples]
    return denoising_objective(model.denoiser, features, people, recipe, generators)


FULL = tiny_recipe(
    matching="simota",
    padding="mixed",
    dense_iou=0.5,
    dense_max_timestep=150,
    embedding_dropout=0.5,
    embedding_error=0.7,
)


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (4, 96, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("matching", ["hungarian", "simota", "origin"])
@pytest.mark.parametrize("head", ["cascaded", "parallel", "joint", "region"])
def test_every_weight_learns_under_every_matching_and_head(images, matching, head):
    model = tiny_model(head=head)
    recipe = FULL.model_copy(update={"matching": matching})
    objective(model, images, IMAGES, recipe, SAMPLES).loss.total.backward()
    # A weight without a gradient would stop DistributedDataParallel.
    assert [
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None
    ] == []
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.requires_grad)


def test_a_batch_without_people_teaches_that_nobody_is_there(images):
    model = tiny_model()
    found = objective(model, images[:2], [people_of(0)] * 2, FULL, [0, 1])
    found.loss.total.backward()
    assert found.image_cosine is None
    assert found.loss.l1 == found.loss.giou == found.loss.reid == 0
    assert found.loss.classification > 0
    assert [
        name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None
    ] == []


def test_the_dense_group_is_a_second_row_of_each_image_with_little_noise(images):
    model, seen = tiny_model(), []
    model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    objective(model, images, IMAGES, FULL.model_copy(update={"dense_max_timestep": 20}), SAMPLES)
    objective(model, images, IMAGES, FULL.model_copy(update={"dense_max_timestep": None}), SAMPLES)
    (features, boxes, emb_t, t, _), alone = seen
    assert all(torch.equal(level[:4], level[4:]) for level in features)
    for both, first in zip((boxes, emb_t, t), alone[1:4], strict=True):
        assert torch.equal(both[:4], first)
        assert len(both) == 8
    assert t[:4].max() >= 20 > t[4:].max()


def test_people_whose_embedding_nobody_knows_teach_boxes_alone(images):
    model = tiny_model()
    unknown = [people._replace(embeddings=torch.zeros_like(people.embeddings)) for people in IMAGES]
    found = objective(model, images, unknown, FULL, SAMPLES)
    assert found.loss.reid == 0
    assert found.loss.l1 > 0
    # Nothing of a stranger's embedding enters: what is noised is zero.
    noise = noise_of(SAMPLES, unknown, FULL, max_timestep=1)
    assert noise.emb_t[noise.t_emb == 0].abs().max() < 0.05
    assert found.image_cosine is None


def test_the_image_cosine_counts_known_people_under_pure_noise_only():
    truth = People(torch.rand(3, 4), torch.eye(4)[:3] * torch.tensor([[1.0], [0.0], [1.0]]))
    predicted = torch.tensor([[[3.0, 4, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]] * 2)
    prediction = Prediction(torch.zeros(2, 3, 4), torch.zeros(2, 3), predicted)
    match = Match(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    # Person 0 at a cosine of 3/5, person 1 unknown, person 2 at 0; the second image had no pure noise.
    cosine = _image_cosine(prediction, [truth, truth], [match, match], [True, False])
    assert cosine == pytest.approx(0.3, abs=1e-6)
    assert _image_cosine(prediction, [truth, truth], [match, match], [False, False]) is None


def test_loss_and_gradient_do_not_depend_on_the_order_of_the_batch(images):
    model, order = tiny_model(), [2, 0, 3, 1]
    first = objective(model, images, IMAGES, FULL, SAMPLES).loss
    second = objective(
        model, images[order], [IMAGES[i] for i in order], FULL, [SAMPLES[i] for i in order]
    ).loss
    torch.testing.assert_close(torch.stack(list(first)), torch.stack(list(second)), rtol=1e-5, atol=1e-6)
