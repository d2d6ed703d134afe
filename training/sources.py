"""From a recipe's data to the examples of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..models.config import PSDiffConfig
from ..models.reid_teacher import load_teacher, teacher_hash
from .dataset import FramePool, FrameSource, SearchFrames
from .datasets.load import load_person_search
from .datasets.schema import LabelledImage
from .recipe import Data, Recipe, RecipeError
from .teacher.cache import EmbeddingCache, load_cache, truth_cache


def open_source(recipe: Recipe, frames_folder: Path) -> FrameSource:
    """Open what a recipe learns from; frames of the street are kept in frames_folder.

    Raises RecipeError where keys are missing, DatasetError and CacheError where the files are not what they say.
    """
    data = recipe.data
    if data.format == "street":
        return FramePool(frames_folder, recipe.seed, data.frames)
    root = _required(data.root, "data.root", f"--data with the folder of {data.format}")
    embeddings = _required(
        data.embeddings, "data.embeddings", "--embeddings with the file that psdiff teacher embed wrote"
    )
    images = load_person_search(data.format, root).train
    return SearchFrames(images, _cache(data, embeddings, images), recipe.seed)


def check_embedding_dim(source: FrameSource, config: PSDiffConfig) -> None:
    """Raise RecipeError where a network cannot learn the embeddings of a source."""
    if source.embedding_dim != config.embedding_dim:
        raise RecipeError(
            f"embedding_dim of the network must be {source.embedding_dim} as in the data's embeddings, got "
            f"{config.embedding_dim}; choose another preset, or embed with another teacher"
        )


def _cache(data: Data, path: Path, images: Sequence[LabelledImage]) -> EmbeddingCache:
    """Embeddings by the given teacher, or the truth of a synthetic city where there is none."""
    if data.teacher is None:
        return truth_cache(path, images)
    try:
        teacher, _ = load_teacher(data.teacher)
    except ValueError as error:
        raise RecipeError(f"data.teacher: {error}") from None
    return load_cache(path, images, teacher_hash(teacher))


def _required(path: Path | None, key: str, remedy: str) -> Path:
    if path is None:
        raise RecipeError(f"{key} must be given, got nothing; set it in the recipe, or add {remedy}")
    return path
