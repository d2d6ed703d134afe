"""What denoising steps cost on this machine, and which of them a site allows."""

from __future__ import annotations

import logging
import time
from collections.abc import Container

import numpy as np

from ..bundle import Manifest
from ..models.detector import PersonDetector
from .backends import TRITON
from .detector import backend_version
from .elastic_steps import CostTable, StepRange
from .frames import Picture
from .site_file import Site
from .verified import machine

# How often each cost is measured where the manifest has none for this machine; the fastest counts.
COST_CALLS = 3

logger = logging.getLogger(__name__)


def allowed_steps(site: Site, manifest: Manifest) -> StepRange:
    """The steps that the site allows and the model has."""
    steps, most = site.promise.steps, max(manifest.timesteps)
    if steps.min > most:
        raise ValueError(f"promise.steps.min must be at most {most}, the model's, got {steps.min}")
    return StepRange(steps.min, min(steps.max, most))


def cost_table(site: Site, manifest: Manifest, detector: PersonDetector) -> CostTable:
    """What steps cost on this machine: from psdiff bench --record, or else measured now, on an empty picture."""
    if site.model.backend != TRITON:
        try:
            return CostTable.of(manifest.latencies, backend_version(site.model.backend), machine())
        except ValueError:
            logger.info("the manifest tells no latencies of this machine: measuring them")
    return CostTable(measured_costs(detector, allowed_steps(site, manifest), site.model.max_batch))


def warm_up(detector: PersonDetector, steps: int) -> None:
    """Compute an empty picture: the first call compiles and allocates, and no camera shall wait for that."""
    settings = detector.settings
    if steps in settings.timesteps:
        detector.detect([_empty(settings.width, settings.height)], steps)


def measured_costs(
    detector: PersonDetector, allowed: StepRange, max_batch: int
) -> dict[tuple[int, int], float]:
    """(K, B) -> seconds of the fewest and the most steps, on one image and on a full batch."""
    settings = detector.settings
    picture = _empty(settings.width, settings.height)
    # Two different K make a line; where one alone is allowed the next one, or the one below, is measured as well.
    other = allowed.most if allowed.most > allowed.least else _neighbour(allowed.least, settings.timesteps)
    costs = {}
    for batch in sorted({1, max_batch}):
        for steps in sorted({allowed.least, other}):
            detector.detect([picture] * batch, steps)
            costs[steps, batch] = min(_seconds(detector, picture, batch, steps) for _ in range(COST_CALLS))
    return costs


def _empty(width: int, height: int) -> Picture:
    return np.full((height, width, 3), 114, np.uint8)


def _neighbour(steps: int, timesteps: Container[int]) -> int:
    return steps + 1 if steps + 1 in timesteps else steps - 1


def _seconds(detector: PersonDetector, picture: Picture, batch: int, steps: int) -> float:
    began = time.perf_counter()
    detector.detect([picture] * batch, steps)
    return time.perf_counter() - began
