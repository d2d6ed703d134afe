"""The loop, its recipe and its noise: a run from start to checkpoint, and what stops it."""

import json

import pytest
import torch
from psdiff.models.config import PSDiffConfig
from psdiff.models.person_search import PSDiff, load_checkpoint, save_checkpoint, torch_detector
from psdiff.training import train as training
from psdiff.training.dataset import FramePool, StreetFrames, mirrored
from psdiff.training.losses import set_loss
from psdiff.training.matcher import People, add_overlapping, match
from psdiff.training.noising import noisy_group, wrong_embeddings
from psdiff.training.recipe import Recipe, RecipeError, Stage, load_recipe

TINY = {
    "backbone": "mobilenet_v2",
    "height": 96,
    "width": 160,
    "channels": 32,
    "separable_fpn": True,
    "num_proposals": 30,
    "embedding_dim": 64,
    "canonical_size": 56.0,
    "num_heads": 4,
    "dynamic_dim": 4,
    "ffn_dim": 64,
    "time_dim": 32,
    "time_hidden": 64,
    "head": "joint",
    "embedding_gain": "wiener",
    "grid_power": 3.0,
}


def tiny_recipe(**changes):
    stage = {"width": 160, "height": 96, "batch_size": 2, "iterations": 3}
    settings = {"stages": [stage], "frames": 4, "loader_workers": 0, "num_proposals": 10}
    return Recipe.model_validate(settings | changes)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "start.safetensors"
    save_checkpoint(PSDiff(PSDiffConfig.model_validate(TINY)), path, {"made_by": "a test"})
    return path


def test_a_run_writes_a_checkpoint_a_log_and_its_notes(tmp_path, tiny_checkpoint):
    seen = []
    stages = [
        {"width": 96, "height": 64, "batch_size": 2, "iterations": 2},
        {"width": 160, "height": 96, "batch_size": 2, "iterations": 2},
    ]
    path = training.train(
        tiny_recipe(stages=stages), tmp_path / "run", init=tiny_checkpoint, on_progress=seen.append
    )
    model, notes = load_checkpoint(path)
    assert (model.config.width, model.config.height, model.config.canonical_size) == (160, 96, 56.0)
    assert notes["made_by"] == "a test"
    assert [stage["iterations"] for stage in notes["stages"]] == [2, 2]
    assert notes["frames"] == 8
    assert [(p.stage, p.iteration) for p in seen] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == [0, 1]
    before, _ = load_checkpoint(tiny_checkpoint)
    assert not torch.equal(model.denoiser.heads.logit.weight, before.denoiser.heads.logit.weight)


def test_the_same_seed_gives_the_same_weights(tmp_path, tiny_checkpoint):
    runs = [
        training.train(
            tiny_recipe(), tmp_path / name, init=tiny_checkpoint, frames_folder=tmp_path / "frames"
        )
        for name in ("a", "b")
    ]
    first, second = (load_checkpoint(path)[0].state_dict() for path in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_frozen_stages_do_not_move(tmp_path, tiny_checkpoint):
    path = training.train(tiny_recipe(frozen_stages=2), tmp_path / "run", init=tiny_checkpoint)
    after, before = (load_checkpoint(p)[0].backbone.stages for p in (path, tiny_checkpoint))
    moved = [
        any(not torch.equal(a, b) for a, b in zip(x.parameters(), y.parameters(), strict=True))
        for x, y in zip(after, before, strict=True)
    ]
    assert moved == [False, False, True, True]


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(tmp_path):
    torch.manual_seed(0)
    model = PSDiff(PSDiffConfig.model_validate(TINY))
    with torch.no_grad():
        model.denoiser.heads.logit.bias.fill_(float("nan"))
    save_checkpoint(model, tmp_path / "broken.safetensors", {})
    with pytest.raises(training.NonFiniteLossError, match="loss must be finite"):
        training.train(tiny_recipe(), tmp_path / "run", init=tmp_path / "broken.safetensors")
    assert (tmp_path / "run" / "non_finite_batch.pt").is_file()


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
    all_of_them = StreetFrames(pool, range(4), width=160, height=96)
    second_rank = StreetFrames(pool, range(1, 4, 2), width=160, height=96)
    image, people = second_rank[1]
    assert torch.equal(image, all_of_them[3][0])
    assert torch.equal(people.boxes_norm, all_of_them[3][1].boxes_norm)


def test_mirroring_twice_is_the_original(tmp_path):
    image, boxes, _ = FramePool(tmp_path, seed=3, size=4).frame(0)
    once = mirrored(image, boxes)
    twice = mirrored(*once)
    assert (twice[0] == image).all()
    assert abs(twice[1] - boxes).max() < 1e-4 if len(boxes) else True
    assert (once[0] != image).any()


def test_wrong_embeddings_are_unit_vectors_within_the_error():
    generator = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(500, 64, generator=generator), dim=1)
    wrong = wrong_embeddings(true, 0.7)
    cosine = (true * wrong).sum(1)
    torch.testing.assert_close(wrong.norm(dim=1), torch.ones(500))
    assert cosine.min() >= 0.3 - 1e-4
    assert cosine.mean().item() == pytest.approx(0.65, abs=0.05)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "stages: [{width: 320, height: 192}]\nmaching: simota",
            r"maching must be a known key; did you mean matching\?",
        ),
        ("stages: [{width: 320, height: 190}]", "multiple of 32, got 190"),
        ("stages: []", "at least 1 item"),
        ("stages: [", "recipe must be YAML"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_the_shipped_recipe_loads():
    from psdiff.training import recipe

    folder = recipe.RECIPES
    assert [load_recipe(path).preset for path in sorted(folder.glob("*.yaml"))] == ["psdiff_mobile"]


@pytest.mark.slow
def test_one_image_is_learnt_by_heart():
    """After 300 iterations on one image: loss down by 80 %, and every person described."""
    torch.manual_seed(0)
    model = PSDiff(PSDiffConfig.model_validate(TINY))
    image = torch.full((1, 96, 160, 3), 90, dtype=torch.uint8)
    boxes = torch.tensor([[20.0, 20, 44, 80], [70, 10, 100, 90], [120, 40, 140, 88]])
    for (x1, y1, x2, y2), colour in zip(
        boxes.int().tolist(), ((250, 30, 30), (30, 250, 30), (60, 60, 250)), strict=True
    ):
        image[0, y1:y2, x1:x2] = torch.tensor(colour, dtype=torch.uint8)
    embeddings = torch.nn.functional.normalize(torch.randn(3, 64), dim=1)
    people = [People(boxes / torch.tensor([160.0, 96, 160, 96]), embeddings)] * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    recipe = Recipe(stages=(Stage(width=160, height=96),), num_proposals=30, embedding_error=0.2)
    losses = []
    for iteration in range(300):
        features = [feature.repeat(4, 1, 1, 1) for feature in model.backbone(image)]
        group = noisy_group(model, people, recipe, max_timestep=1000 if iteration % 2 else 300)
        prediction = model.denoiser(features, group.boxes_norm, group.emb_t, group.t, group.t_emb)
        rows = [type(prediction)(*(part[i].detach() for part in prediction)) for i in range(4)]
        matches = [
            add_overlapping(
                match(rows[i], people[i], "simota"), group.boxes_norm[i], people[i].boxes_norm, 0.5
            )
            for i in range(4)
        ]
        loss = set_loss(prediction, people, matches).total
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.2 * losses[0]
    described = torch_detector(model).embed(image[0].numpy(), boxes.numpy(), steps=2)
    assert (torch.from_numpy(described) * embeddings).sum(1).min() > 0.9
