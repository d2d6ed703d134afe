"""The re-identification network whose embeddings PSDiff learns to predict: a classifier's body, pooling, BN.

It is trained on true identities (HHCL, arXiv:2109.12333, in its supervised form) and then frozen.
Legend: B crops, H, W crop size, C channels of the body, E embedding dimension.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MobileNetV2, ResNet, mobilenet_v2, resnet50
from torchvision.models.resnet import Bottleneck
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

from .backbone import STAGE_CHANNELS, InitialWeights

# Start of the exponent of generalised-mean pooling (arXiv:1711.02512).
GEM_POWER = 3.0
GEM_SMALLEST = 1e-6

HASH_DIGITS = 12


class TeacherConfig(BaseModel):
    """One teacher. The defaults give the 256 values that PSDiff's embeddings have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Literal["resnet50", "mobilenet_v2"] = "resnet50"
    embedding_dim: int | None = Field(default=256, gt=0)
    """E; null leaves the linear layer out, and the embedding has the body's channels."""
    pooling: Literal["gap", "gem"] = "gap"
    """Mean over the cells, or generalised mean with a learned exponent."""
    height: int = Field(default=256, ge=32)
    """Crops are resized to height x width pixels, whatever their aspect ratio."""
    width: int = Field(default=128, ge=16)
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from 0..255 RGB; the value depends on what the initial weights were trained with."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    @property
    def dim(self) -> int:
        """E, also where there is no linear layer."""
        return self.embedding_dim or STAGE_CHANNELS[self.backbone][-1]


class ReidTeacher(nn.Module):
    """(B, 3, H, W) uint8 RGB crops -> (B, E) unit rows."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.body = _body(config.backbone)
        self.pool = GeneralisedMean() if config.pooling == "gem" else nn.AdaptiveAvgPool2d(1)
        self.projection = _projection(config)
        self.norm = nn.BatchNorm1d(config.dim)
        # A bias would move the origin from which cosines are measured (arXiv:1903.07071).
        self.norm.bias.requires_grad_(False)
        for name, value in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        """Return (B, E) unit rows of (B, 3, H, W) crops, 0..255 RGB."""
        x = (crops.float() - self.pixel_mean) / self.pixel_std
        x = self.pool(self.body(x)).flatten(1)
        return F.normalize(self.norm(self.projection(x)), dim=1)

    @torch.no_grad()
    def embed(self, crops: Tensor) -> Tensor:
        """Return (B, E) unit rows that a crop and its mirror image share: norm(f(x) + f(flip x)).

        crops: (B, 3, H, W) uint8 from `network_input`. The network must be in eval mode.
        """
        return F.normalize(self(crops) + self(crops.flip(-1)), dim=1)


class GeneralisedMean(nn.Module):
    """(B, C, h, w) -> (B, C, 1, 1), mean(x^p)^(1/p) with a learned p; p = 1 is the mean, p -> inf the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.tensor([GEM_POWER]))

    def forward(self, x: Tensor) -> Tensor:
        """Pool over the cells; values below GEM_SMALLEST count as it."""
        return x.clamp(min=GEM_SMALLEST).pow(self.power).mean((2, 3), keepdim=True).pow(1 / self.power)


def network_input(image: NDArray[np.uint8], config: TeacherConfig) -> Tensor:
    """Resize one crop, (h, w, 3) uint8 RGB of any size >= 1 x 1, to the network's (3, H, W) uint8."""
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return resize(pixels, [config.height, config.width], InterpolationMode.BICUBIC, antialias=True)


def load_body_weights(teacher: ReidTeacher, weights: InitialWeights) -> None:
    """Copy a classifier's weights into the body; the layers after it keep their random start."""
    teacher.body.load_state_dict(_body(teacher.config.backbone, weights.state_dict).state_dict())


def teacher_hash(teacher: ReidTeacher) -> str:
    """Short SHA-256 over config and weights: two teachers with the same hash give the same embeddings."""
    digest = hashlib.sha256(teacher.config.model_dump_json().encode())
    for name, value in sorted(teacher.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:HASH_DIGITS]


def save_teacher(teacher: ReidTeacher, path: Path, notes: Mapping[str, object]) -> None:
    """Write weights, config and hash to one .safetensors file, at once: readers never see a part.

    notes: how the weights came about, plain JSON values.
    """
    metadata = {
        "teacher_config": teacher.config.model_dump_json(),
        "teacher_hash": teacher_hash(teacher),
        "notes": json.dumps(notes),
    }
    temporary = path.with_name(f".{path.name}.partial")
    save_file(teacher.state_dict(), temporary, metadata=metadata)
    temporary.replace(path)


def load_teacher(path: Path) -> tuple[ReidTeacher, dict[str, Any]]:
    """Read a teacher in eval mode, and its notes. Raises ValueError where the file is none of ours or altered."""
    if not path.is_file():
        raise ValueError(f"teacher must be a .safetensors file, got {path}, which does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        teacher = ReidTeacher(TeacherConfig.model_validate_json(metadata["teacher_config"]))
        teacher.load_state_dict(state_dict)
        stored_hash = metadata["teacher_hash"]
    except (KeyError, RuntimeError, SafetensorError, ValidationError) as error:
        raise ValueError(f"teacher must be written by psdiff teacher train, got {path}: {error}") from None
    if teacher_hash(teacher) != stored_hash:
        raise ValueError(
            f"teacher must have the weights of its hash {stored_hash}, got {teacher_hash(teacher)} "
            f"in {path}; the file was altered, fetch or train it again"
        )
    return teacher.eval(), json.loads(metadata.get("notes", "{}"))


def _projection(config: TeacherConfig) -> nn.Module:
    if config.embedding_dim is None:
        return nn.Identity()
    linear = nn.Linear(STAGE_CHANNELS[config.backbone][-1], config.embedding_dim)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out")
    nn.init.zeros_(linear.bias)
    return linear


def _body(name: str, state_dict: Mapping[str, Tensor] | None = None) -> nn.Sequential:
    build, arrange = {
        "resnet50": (resnet50, _resnet50_body),
        "mobilenet_v2": (mobilenet_v2, _mobilenet_body),
    }[name]
    if state_dict is None:
        return arrange(build())
    net = build(num_classes=len(list(state_dict.values())[-1]))
    net.load_state_dict(state_dict)
    return arrange(net)


# Both bodies keep stride 16: twice the cells for a person who is four times smaller than an ImageNet object.
def _resnet50_body(net: ResNet) -> nn.Sequential:
    first = cast(Bottleneck, net.layer4[0])
    first.conv2.stride = (1, 1)
    cast(nn.Conv2d, cast(nn.Sequential, first.downsample)[0]).stride = (1, 1)
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.Sequential(stem, net.layer1, net.layer2, net.layer3, net.layer4)


def _mobilenet_body(net: MobileNetV2) -> nn.Sequential:
    last_stride = next(
        module for module in net.features[14].modules() if isinstance(module, nn.Conv2d) and module.groups > 1
    )
    last_stride.stride = (1, 1)
    # As in the detector, the last 1x1 convolution (320 -> 1280) belongs to the classifier.
    return net.features[:18]
