"""Matching and the set loss: known values and hand-made cases."""

import math

import pytest
import torch
from psdiff.models.denoiser import PRIOR_LOGIT, Prediction
from psdiff.training.losses import reid_distance, set_loss
from psdiff.training.matcher import Match, People, add_overlapping, match, matching_cost
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss


def prediction(boxes, logits, embeddings):
    return Prediction(torch.tensor(boxes), torch.tensor(logits), torch.tensor(embeddings))


def anyhow(count):
    """Origins of proposals that were made from nobody; only `origin` looks at them."""
    return torch.full((count,), -1)


def pairs(matched):
    """Proposal -> person."""
    return dict(zip(matched.proposals.tolist(), matched.people.tolist(), strict=True))


TWO_PEOPLE = People(
    torch.tensor([[0.1, 0.1, 0.3, 0.5], [0.6, 0.2, 0.8, 0.7]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
)

# Three proposals: one on the second person, one near the first, one on nothing.
THREE = prediction(
    [[0.6, 0.2, 0.8, 0.7], [0.12, 0.1, 0.32, 0.5], [0.4, 0.8, 0.5, 0.9]],
    [2.0, 1.0, -3.0],
    [[0.0, 2.0], [3.0, 0.3], [1.0, 1.0]],
)


@pytest.mark.parametrize(
    ("probability", "cost"), [(0.01, 1.128381), (0.1, 0.465483), (0.5, -0.086643), (0.9, -1.398557)]
)
def test_the_class_cost_has_its_known_values(probability, cost):
    box, unit = torch.tensor([[0.1, 0.1, 0.4, 0.4]]), torch.tensor([[1.0, 0.0]])
    logit = torch.logit(torch.tensor([probability]))
    total = matching_cost(Prediction(box, logit, unit), People(box, unit))
    # The other terms of a perfect pair: no L1, GIoU 1 at a weight of -2, no distance of embeddings.
    assert total.item() == pytest.approx(2 * cost - 2, abs=1e-3)


@pytest.mark.parametrize(
    ("other", "giou"), [([1, 1, 3, 3], -0.079365), ([4, 4, 6, 6], -0.777778), ([0, 0, 2, 2], 1.0)]
)
def test_giou_has_its_known_values(other, giou):
    boxes = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([other], dtype=torch.float32)
    assert generalized_box_iou(*boxes).item() == pytest.approx(giou, abs=1e-6)


@pytest.mark.parametrize(
    ("logit", "positive", "negative"),
    [(0.0, 0.0433217, 0.1299651), (PRIOR_LOGIT, 1.1283818, 7.5377e-7), (2.0, 4.5089e-4, 1.2375586)],
)
def test_the_focal_loss_has_its_known_values(logit, positive, negative):
    logits = torch.tensor([logit])
    assert sigmoid_focal_loss(logits, torch.ones(1)).item() == pytest.approx(positive, rel=1e-3)
    assert sigmoid_focal_loss(logits, torch.zeros(1)).item() == pytest.approx(negative, rel=1e-3)


@pytest.mark.parametrize(("cosine", "distance"), [(1.0, 0.0), (0.0, 1.414214), (-1.0, 2.0)])
def test_the_reid_distance_has_its_known_values(cosine, distance):
    other = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]]) * 5
    assert reid_distance(torch.tensor([[3.0, 0.0]]), other).item() == pytest.approx(distance, abs=1e-5)


def test_hungarian_gives_each_person_the_cheapest_proposal():
    assert pairs(match(THREE, TWO_PEOPLE, "hungarian", anyhow(3))) == {1: 0, 0: 1}


def test_hungarian_minimises_the_sum_and_not_each_person():
    # Both people want proposal 0 at costs that differ by the embedding alone; 1 is worse by 5 for person 0.
    people = People(torch.tensor([[0.2, 0.2, 0.4, 0.6]] * 2), torch.eye(3)[:2])
    proposals = prediction([[0.2, 0.2, 0.4, 0.6]] * 2, [0.0, 0.0], [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    distances = (matching_cost(proposals, people) - matching_cost(proposals, people).min()) / 5
    # 2 sin 22.5 degrees, and the square root of 2, above the smallest.
    apart = 2**0.5 - 2 * (0.5 - 0.5**1.5) ** 0.5
    torch.testing.assert_close(distances, torch.tensor([[0.0, 0], [apart, 0]]), atol=1e-5, rtol=0)
    assert pairs(match(proposals, people, "hungarian", anyhow(2))) == {0: 0, 1: 1}


def test_hungarian_leaves_people_out_where_there_are_more_than_proposals():
    alone = Prediction(*(part[:1] for part in THREE))
    assert pairs(match(alone, TWO_PEOPLE, "hungarian", anyhow(1))) == {0: 1}


def test_the_origin_decides_whatever_the_prediction():
    assert pairs(match(THREE, TWO_PEOPLE, "origin", torch.tensor([0, -1, 1]))) == {0: 0, 2: 1}
    assert pairs(match(THREE, TWO_PEOPLE, "origin", torch.tensor([1, 1, -1]))) == {0: 1, 1: 1}


def test_the_cost_adds_up_its_four_terms():
    # Proposal 1 and person 0: |dx| = .02 twice; IoU .18/.22; the logit 1; embeddings at atan(.1).
    p = 1 / (1 + math.exp(-1))
    focal = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p**2 * -math.log(1 - p)
    expected = 2 * focal + 5 * 0.04 - 2 * 0.18 / 0.22 + 5 * 2 * math.sin(math.atan(0.1) / 2)
    assert matching_cost(THREE, TWO_PEOPLE)[1, 0].item() == pytest.approx(expected, abs=1e-5)


def test_simota_leaves_nobody_empty_and_gives_a_proposal_to_one_person_only():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        corner = torch.rand(5, 2, generator=generator) * 0.6
        people = People(torch.cat([corner, corner + 0.3], dim=1), torch.eye(5))
        start = torch.rand(20, 2, generator=generator) * 0.6
        proposals = Prediction(
            torch.cat([start, start + 0.25], dim=1),
            torch.randn(20, generator=generator),
            torch.randn(20, 5, generator=generator),
        )
        matched = match(proposals, people, "simota", anyhow(20))
        assert set(matched.people.tolist()) == set(range(5))
        assert len(set(matched.proposals.tolist())) == len(matched.proposals)


def test_simota_gives_a_person_several_good_proposals():
    person = People(torch.tensor([[0.2, 0.2, 0.4, 0.6]]), torch.tensor([[1.0, 0.0]]))
    shifted = [[0.2 + d, 0.2, 0.4 + d, 0.6] for d in (0.0, 0.01, 0.02, 0.3, 0.5)]
    proposals = prediction(shifted, [0.0] * 5, [[1.0, 0.0]] * 5)
    # Three boxes overlap by 1, .90 and .82: k = int(2.72) = 2 cheapest.
    assert match(proposals, person, "simota", anyhow(5)).proposals.tolist() == [0, 1]


def test_simota_takes_fewer_proposals_than_candidates():
    person = People(torch.tensor([[0.2, 0.2, 0.4, 0.6]]), torch.tensor([[1.0, 0.0]]))
    alone = prediction([[0.2, 0.2, 0.4, 0.6]], [0.0], [[1.0, 0.0]])
    assert match(alone, person, "simota", anyhow(1)).proposals.tolist() == [0]


# Two people who stand close, each with one proposal to give (the IoUs sum up to 1.81 and 1.64). Both find 0 the
# cheapest; 1 has the wrong embedding and a low score, 2 is far away with the embedding of the first.
CLOSE = People(torch.tensor([[0.2, 0.2, 0.4, 0.6], [0.22, 0.2, 0.42, 0.6]]), torch.eye(2))
CONTESTED = prediction(
    [[0.21, 0.2, 0.41, 0.6], [0.19, 0.2, 0.39, 0.6], [0.8, 0.8, 0.9, 0.9]],
    [2.0, -2.0, 2.0],
    [[0.5, 0.75**0.5], [-1.0, 0.0], [1.0, 0.0]],
)


def test_simota_gives_a_proposal_that_two_claim_to_the_cheaper_and_the_other_the_best_free_one():
    cost = matching_cost(CONTESTED, CLOSE)
    assert cost[:2].argmin(0).tolist() == [0, 0]
    assert cost[0, 1] < cost[0, 0]
    assert pairs(match(CONTESTED, CLOSE, "simota", anyhow(3))) == {0: 1, 1: 0}


def test_simota_leaves_a_person_out_where_no_proposal_is_free():
    alone = Prediction(*(part[:1] for part in CONTESTED))
    assert pairs(match(alone, CLOSE, "simota", anyhow(1))) == {0: 1}


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        # The centre in the person's box, against a centre beside it, in the window around.
        ([0.10, 0.10, 0.20, 0.18], [0.22, 0.10, 0.32, 0.20]),
        # In the window (the centre within .25 of .15), against outside of it.
        ([0.30, 0.30, 0.40, 0.40], [0.75, 0.75, 0.85, 0.85]),
    ],
)
def test_simota_prefers_a_near_centre_to_a_good_embedding(inner, outer):
    person = People(torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[1.0, 0.0]]))
    proposals = prediction([outer, inner], [2.0, -2.0], [[1.0, 0.0], [-1.0, 0.0]])
    assert matching_cost(proposals, person)[:, 0].argmin() == 0
    assert pairs(match(proposals, person, "simota", anyhow(2))) == {1: 0}


@pytest.mark.parametrize("matching", ["hungarian", "simota"])
@pytest.mark.parametrize("part", ["boxes_norm", "logits", "embeddings"])
def test_a_prediction_that_is_no_number_does_not_stop_the_matching(matching, part):
    broken = getattr(THREE, part).clone()
    broken[2] = math.nan
    matched = match(THREE._replace(**{part: broken}), TWO_PEOPLE, matching, anyhow(3))
    assert pairs(matched) == {0: 1, 1: 0}
    nothing_left = match(THREE._replace(**{part: broken * math.nan}), TWO_PEOPLE, matching, anyhow(3))
    assert set(nothing_left.people.tolist()) == {0, 1}


@pytest.mark.parametrize("matching", ["hungarian", "simota", "origin"])
def test_nobody_matches_nothing(matching):
    nobody = People(torch.zeros(0, 4), torch.zeros(0, 2))
    matched = match(THREE, nobody, matching, anyhow(3))
    assert len(matched.proposals) == 0
    assert len(add_overlapping(matched, THREE.boxes_norm, nobody.boxes_norm, 0.5).proposals) == 0


def test_proposals_that_began_on_a_person_are_added_once():
    matched = Match(torch.tensor([1]), torch.tensor([0]))
    added = add_overlapping(matched, THREE.boxes_norm, TWO_PEOPLE.boxes_norm, 0.5)
    assert list(zip(added.proposals.tolist(), added.people.tolist(), strict=True)) == [(1, 0), (0, 1)]


def test_the_set_loss_is_the_sum_over_pairs_divided_by_their_number():
    batch = Prediction(*(torch.stack([part, part]) for part in THREE))
    nobody = People(torch.zeros(0, 4), torch.zeros(0, 2))
    nothing = torch.zeros(0, dtype=torch.int64)
    matches = [Match(torch.tensor([1, 0]), torch.tensor([0, 1])), Match(nothing, nothing)]
    loss = set_loss(batch, [TWO_PEOPLE, nobody], matches)
    assert loss.l1.item() == pytest.approx(0.04 / 2, abs=1e-6)
    cosine = 3 / (9 + 0.09) ** 0.5
    assert loss.reid.item() == pytest.approx((2 - 2 * cosine) ** 0.5 / 2, abs=1e-4)
    overlap = (0.18 * 0.4) / (0.22 * 0.4)
    assert loss.giou.item() == pytest.approx((1 - overlap) / 2, abs=1e-5)
    is_person = torch.tensor([[1.0, 1, 0], [0, 0, 0]])
    focal = sigmoid_focal_loss(batch.logits, is_person, reduction="sum").item() / 2
    assert loss.classification.item() == pytest.approx(focal, rel=1e-5)
    total = 2 * focal + 5 * loss.l1.item() + 2 * loss.giou.item() + 5 * loss.reid.item()
    assert loss.total.item() == pytest.approx(total, rel=1e-5)


def test_a_batch_without_people_has_a_finite_loss():
    nothing = torch.zeros(0, dtype=torch.int64)
    nobody = People(torch.zeros(0, 4), torch.zeros(0, 2))
    loss = set_loss(Prediction(*(part[None] for part in THREE)), [nobody], [Match(nothing, nothing)])
    assert loss.total.isfinite()
    assert loss.l1.item() == loss.reid.item() == 0


def test_processes_divide_by_the_number_of_pairs_they_are_given():
    batch = Prediction(*(part[None] for part in THREE))
    matches = [Match(torch.tensor([1, 0]), torch.tensor([0, 1]))]
    own, shared = (set_loss(batch, [TWO_PEOPLE], matches, pairs=pairs) for pairs in (None, 5.0))
    for part, other in zip([own.total, *own], [shared.total, *shared], strict=True):
        assert other.item() == pytest.approx(part.item() * 2 / 5, rel=1e-5)


def test_an_embedding_that_nobody_knows_has_no_loss_and_no_gradient():
    embeddings = THREE.embeddings[None].clone().requires_grad_()
    batch = Prediction(THREE.boxes_norm[None], THREE.logits[None], embeddings)
    people = TWO_PEOPLE._replace(embeddings=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    loss = set_loss(batch, [people], [Match(torch.tensor([1, 0]), torch.tensor([0, 1]))])
    # The pair still counts in what the sums are divided by.
    assert loss.reid.item() == pytest.approx(2 * math.sin(math.atan(0.1) / 2) / 2, abs=1e-5)
    loss.total.backward()
    assert embeddings.grad[0].ne(0).any(dim=1).tolist() == [False, True, False]


def test_the_reid_loss_has_a_finite_gradient_where_both_agree():
    predicted = torch.tensor([[2.0, 0.0]], requires_grad=True)
    reid_distance(predicted, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert predicted.grad.isfinite().all()
