"""The two ONNX graphs that a model is made of: the backbone, run once a frame, and one denoising step, run K times.

Legend: B images, H, W canvas, N proposals, E embedding dimension, M = B*N, C channels, S pool size.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim

from ..models.person_search import PSDiff
from ..models.sampling import BACKBONE_INPUTS, FEATURES, STEP_INPUTS, StepOutput
from . import functions
from .tracing import to_onnx


class DenoiseStep(nn.Module):
    """PSDiff.denoise_step with the pyramid as four arguments, as a graph wants them."""

    def __init__(self, model: PSDiff) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        p2: Tensor,
        p3: Tensor,
        p4: Tensor,
        p5: Tensor,
        boxes_t: Tensor,
        emb_t: Tensor,
        t: Tensor,
        t_next: Tensor,
    ) -> tuple[Tensor, ...]:
        """The arguments are the inputs of the graph, the results its outputs."""
        return self.model.denoise_step((p2, p3, p4, p5), boxes_t, emb_t, t, t_next)


def backbone_graph(model: PSDiff) -> onnx.ModelProto:
    """Image u8 [B,H,W,3] -> p2..p5 [B,C,H/s,W/s]; B is dynamic."""
    inputs, shapes = backbone_example(model)
    return to_onnx(model.backbone, inputs, BACKBONE_INPUTS, FEATURES, shapes)


def backbone_example(model: PSDiff) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs of the backbone for tracing it, and which of their axes are dynamic."""
    images = torch.zeros(2, model.config.height, model.config.width, 3, dtype=torch.uint8)
    return (images,), ({0: Dim("batch")},)


def denoise_step_graph(model: PSDiff) -> onnx.ModelProto:
    """p2..p5, boxes_t, emb_t, t, t_next -> the fields of StepOutput; B and N are dynamic."""
    inputs, shapes = step_example(model)
    graph = to_onnx(
        DenoiseStep(model), inputs, STEP_INPUTS, StepOutput._fields, shapes, functions.translations()
    )
    functions.add_functions(graph, model.config, next(model.parameters()).dtype)
    return graph


def step_example(model: PSDiff) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """Inputs of DenoiseStep for tracing it, and which of their axes are dynamic."""
    config, batch, dtype = model.config, Dim("batch"), next(model.parameters()).dtype
    # Two images and an odd number of proposals: sizes that export cannot mistake for constants.
    images, proposals = 2, config.num_proposals + 1
    pyramid = [
        torch.zeros(images, config.channels, config.height // stride, config.width // stride, dtype=dtype)
        for stride in (4, 8, 16, 32)
    ]
    state = (torch.randn(images, proposals, 4), torch.randn(images, proposals, config.embedding_dim))
    times = (torch.full((images,), 999), torch.full((images,), 499))
    per_proposal = {0: batch, 1: Dim("num_proposals")}
    shapes = (*({0: batch} for _ in FEATURES), per_proposal, per_proposal, {0: batch}, {0: batch})
    return (*pyramid, *state, *times), shapes
