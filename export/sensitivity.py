"""Which nodes stay float32: by the harm that each does alone, as many as it takes until the bundle is proven."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from ..models.verification import Comparison, Tolerance
from .quantizable import NodeId


def harm(comparisons: Sequence[Comparison], tolerance: Tolerance) -> float:
    """The largest difference of a proof, in units of what is tolerated; infinite where there is no number."""
    ratios = [
        ratio
        for each in comparisons
        for ratio in (
            each.box_px / tolerance.box_px,
            (1 - each.cosine) / (1 - tolerance.cosine),
            each.score / tolerance.score,
        )
    ]
    return math.inf if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def passes(comparisons: Sequence[Comparison], tolerance: Tolerance) -> bool:
    """Whether enough proposals agree at every K."""
    return all(each.matched >= tolerance.matched for each in comparisons)


def harm_of_each(
    nodes: Sequence[NodeId],
    prove: Callable[[Sequence[NodeId]], Sequence[Comparison]],
    tolerance: Tolerance,
    on_node: Callable[[int], None] = lambda count: None,
) -> dict[NodeId, float]:
    """Quantise one node at a time. prove: compares the bundle with these nodes in 8 bits."""
    harms = {}
    for count, node in enumerate(nodes, start=1):
        harms[node] = harm(prove([node]), tolerance)
        on_node(count)
    return harms


def most_that_pass(harms: Mapping[NodeId, float], prove: Callable[[Sequence[NodeId]], bool]) -> list[NodeId]:
    """The longest run of nodes, the least harmful first, with which the proof holds, found by bisection.

    prove: whether it holds with these nodes in 8 bits. What is returned was proven, or is empty.
    """
    ordered = sorted(harms, key=lambda node: harms[node])
    # Nearly all of them, or nearly none, are the usual answers: a node that fails alone fails in company.
    good, bad = 0, sum(harms[node] < math.inf for node in ordered) + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        if prove(ordered[:middle]):
            good = middle
        else:
            bad = middle
    return ordered[:good]
