"""The processes that share a run under torchrun; without torchrun there is one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """The number of this process, also before the processes have met."""
    return dist.get_rank() if dist.is_initialized() else _launched_with("RANK", 0)


def count() -> int:
    """How many processes share the run, also before they have met."""
    return dist.get_world_size() if dist.is_initialized() else _launched_with("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


@contextmanager
def together(device: str) -> Iterator[torch.device]:
    """Meet the other processes for the time of a run; gives the device of this one.

    device: cpu or cuda, of which each process takes the one of its local rank.
    """
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", _launched_with("LOCAL_RANK", 0))
        torch.cuda.set_device(place)
    meets = dist.is_torchelastic_launched() and not dist.is_initialized()
    if meets:
        # Gradients are averaged where they are, counts on the CPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    yield place
    # Not after an error: this would wait for processes that may be gone.
    if meets:
        dist.destroy_process_group()


def mean(values: Tensor) -> Tensor:
    """Mean over all processes of a tensor that each has."""
    values = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= count()
    return values


def of_first(value: float) -> float:
    """The first process's value, on all."""
    if count() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(shared, src=0)
    return shared.item()


def _launched_with(name: str, default: int) -> int:
    return int(os.environ[name]) if dist.is_torchelastic_launched() else default
