"""A teacher at work: embeddings of a whole table of people, and how well they tell people apart.

Legend: n rows, E embedding dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...models.reid_teacher import ReidTeacher
from ..datasets.schema import PersonSearchSet, ReidSet
from ..evaluation.reid import DescribedCrops, ReidScores, evaluate_reid
from .crops import CropTable, SourceCrops, table_of_crops, table_of_images

# Images read ahead at once, and crops that pass the network at once.
SOURCES_AT_ONCE = 16
CROPS_AT_ONCE = 128


def default_device() -> str:
    """The GPU if there is one, otherwise the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@torch.no_grad()
def embed_table(
    teacher: ReidTeacher,
    table: CropTable,
    *,
    workers: int = 0,
    with_mirror: bool = True,
    on_progress: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """(n, E) float32 unit rows on the teacher's device, from undisturbed crops; zero where a box shows nobody.

    with_mirror: average with the mirror image, so that one row serves a frame and its mirror.
    on_progress: told how many rows are done.
    """
    device = teacher.norm.weight.device
    features = torch.zeros(len(table), teacher.config.dim, device=device)
    was_training = teacher.training
    teacher.eval()
    loader = DataLoader(
        SourceCrops(table, teacher.config),
        batch_size=SOURCES_AT_ONCE,
        num_workers=workers,
        collate_fn=_joined,
    )
    call = teacher.embed if with_mirror else teacher
    done = 0
    for rows, crops in loader:
        for part, chunk in zip(rows.split(CROPS_AT_ONCE), crops.split(CROPS_AT_ONCE), strict=True):
            if len(part):
                features[part.to(device)] = call(chunk.to(device))
            done += len(part)
            on_progress(done)
    teacher.train(was_training)
    return features


def score_teacher(
    teacher: ReidTeacher, data: ReidSet | PersonSearchSet, *, workers: int = 0
) -> ReidScores | None:
    """Rank the test people of a data set by the metric of Market-1501; None for a set without queries.

    Of a person search set, true boxes are ranked: its queries against every box of the test images.
    """
    if isinstance(data, ReidSet):
        if not data.query:
            return None
        parts = (table_of_crops(data.query), table_of_crops(data.gallery))
        return evaluate_reid(*(_described(teacher, part, workers) for part in parts))
    table = table_of_images(data.test)
    wanted = {(query.image, query.pid) for query in data.queries}
    pairs = zip(table.frames.tolist(), table.pids.tolist(), strict=True)
    is_query = np.array([pair in wanted for pair in pairs], bool)
    if not is_query.any():
        return None
    everyone = _described(teacher, table, workers)
    return evaluate_reid(
        DescribedCrops(everyone.embeddings[is_query], table.pids[is_query], table.cameras[is_query]), everyone
    )


def _described(teacher: ReidTeacher, table: CropTable, workers: int) -> DescribedCrops:
    return DescribedCrops(
        embed_table(teacher, table, workers=workers).cpu().numpy(), table.pids, table.cameras
    )


def _joined(sources: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    rows, crops = zip(*sources, strict=True)
    return torch.cat(rows), torch.cat(crops)
