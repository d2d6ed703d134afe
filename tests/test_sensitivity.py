"""Which nodes stay float32, by the harm that each does."""

import math

import pytest
from psdiff.export.quantizable import NodeId
from psdiff.export.sensitivity import harm, harm_of_each, most_that_pass
from psdiff.models.verification import INT8_TOLERANCE, Comparison


def comparison(matched=1.0, box_px=0.0, cosine=1.0, score=0.0):
    return Comparison(1, matched, box_px, cosine, score)


@pytest.mark.parametrize(
    ("worst", "expected"),
    [
        ({"box_px": 1.0}, 2),
        ({"cosine": 0.96}, 4),
        ({"score": 0.06}, 3),
        ({"box_px": math.nan}, math.inf),
    ],
)
def test_harm_is_the_largest_difference_in_units_of_the_tolerance(worst, expected):
    assert harm([comparison(), comparison(**worst)], INT8_TOLERANCE) == pytest.approx(expected)


def test_the_least_harmful_nodes_are_quantised_until_the_proof_would_fail():
    nodes = [NodeId("backbone", f"conv{i}") for i in range(9)]
    costs = dict(zip(nodes, (0.4, 9, 0.1, math.nan, 0.3, 0.2, 3, 0.1, 7), strict=True))
    trials = []

    def prove(chosen):
        trials.append(chosen)
        return [comparison(box_px=0.5 * sum(costs[node] for node in chosen))]

    harms = harm_of_each(nodes, prove, INT8_TOLERANCE)
    assert [len(each) for each in trials] == [1] * 9
    found = most_that_pass(harms, lambda chosen: sum(costs[node] for node in chosen) <= 1)
    assert sorted(costs[node] for node in found) == [0.1, 0.1, 0.2, 0.3]
    assert most_that_pass(harms, lambda chosen: not chosen) == []
