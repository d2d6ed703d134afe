"""The kernels around the network as PyTorch operators: psdiff::ddim_step and psdiff::letterbox; inference only.

On a CPU they are kernels.reference_frame, on CUDA the kernels of csrc. Legend: B images, N proposals, E embedding
dimension, h, w frame, H, W canvas.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference_frame
from .frame_launches import placed_size
from .ops import cuda_extension


@torch.library.custom_op("psdiff::ddim_step", mutates_args=())
def ddim_step_op(
    boxes_t: Tensor,
    emb_t: Tensor,
    logits: Tensor,
    deltas: Tensor,
    embeddings: Tensor,
    levels: Tensor,
    box_scale: float,
    embedding_scale: float,
) -> list[Tensor]:
    """Decode the heads and move both states: boxes_next, emb_next, boxes_xyxy, scores, unit embeddings, all float32.

    boxes_t (B, N, 4) and emb_t (B, N, E) float32; logits (B, N), deltas (B, N, 4), embeddings (B, N, E) of one
    floating type; levels (B, 4) float32, signal and noise at t, then at t_next. Raises ValueError on CUDA.
    """
    heads = logits.float(), deltas.float(), embeddings.float()
    scales = {"box_scale": box_scale, "embedding_scale": embedding_scale}
    return list(reference_frame.ddim_step((boxes_t, emb_t), heads, levels, **scales))


@ddim_step_op.register_kernel("cuda")
def _ddim_step_on_cuda(
    boxes_t: Tensor,
    emb_t: Tensor,
    logits: Tensor,
    deltas: Tensor,
    embeddings: Tensor,
    levels: Tensor,
    box_scale: float,
    embedding_scale: float,
) -> list[Tensor]:
    tensors = boxes_t, emb_t, logits, deltas, embeddings, levels
    return cuda_extension().ddim_step(*tensors, box_scale, embedding_scale)


@ddim_step_op.register_fake
def _ddim_step_shapes(
    boxes_t: Tensor,
    emb_t: Tensor,
    logits: Tensor,
    deltas: Tensor,
    embeddings: Tensor,
    levels: Tensor,
    box_scale: float,
    embedding_scale: float,
) -> list[Tensor]:
    like = (boxes_t, emb_t, boxes_t, logits.float(), emb_t)
    return [torch.empty_like(tensor) for tensor in like]


@torch.library.custom_op("psdiff::letterbox", mutates_args=())
def letterbox_op(frame: Tensor, width: int, height: int) -> Tensor:
    """(h, w, 3) uint8 RGB frame -> (height, width, 3) uint8 canvas: models.preprocess.Letterbox on a device."""
    canvas = reference_frame.letterbox(frame.numpy(), width, height)
    return torch.from_numpy(canvas).round().to(torch.uint8)


@letterbox_op.register_kernel("cuda")
def _letterbox_on_cuda(frame: Tensor, width: int, height: int) -> Tensor:
    placed = placed_size(frame.shape[1], frame.shape[0], width, height)
    return cuda_extension().letterbox(frame, width, height, *placed)


@letterbox_op.register_fake
def _letterbox_shape(frame: Tensor, width: int, height: int) -> Tensor:
    return frame.new_empty(height, width, 3)
