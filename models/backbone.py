"""From a frame to a feature pyramid: torchvision's backbones and FPN, brought to one form.

Legend: B images, H, W canvas, C channels of the pyramid.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import (
    MobileNet_V2_Weights,
    MobileNetV2,
    ResNet,
    ResNet50_Weights,
    Swin_B_Weights,
    SwinTransformer,
    mobilenet_v2,
    resnet50,
    swin_b,
)
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d, Permute

from .config import PSDiffConfig

# Channels at strides 4, 8, 16 and 32.
STAGE_CHANNELS = {
    "resnet50": (256, 512, 1024, 2048),
    "swin_b": (128, 256, 512, 1024),
    "mobilenet_v2": (24, 32, 96, 320),
}

TORCHVISION_WEIGHTS = {
    "resnet50": ResNet50_Weights.IMAGENET1K_V2,
    "swin_b": Swin_B_Weights.IMAGENET1K_V1,
    "mobilenet_v2": MobileNet_V2_Weights.IMAGENET1K_V1,
}


class Backbone(nn.Module):
    """Four stages and a feature pyramid: (B, H, W, 3) uint8 RGB -> p2..p5, each (B, C, H/s, W/s), s = 4..32."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: PSDiffConfig) -> None:
        super().__init__()
        self.stages = _stages(config.backbone)
        self.fpn = FeaturePyramidNetwork(list(STAGE_CHANNELS[config.backbone]), config.channels)
        if config.separable_fpn:
            self.fpn.layer_blocks = nn.ModuleList(_separable_conv(config.channels) for _ in range(4))
        for name, value in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return p2, p3, p4, p5 of (B, H, W, 3) uint8 RGB images; H and W must be multiples of 32."""
        # TensorRT takes bytes as an input, but does nothing with them except to cast them.
        x = (images.float().permute(0, 3, 1, 2) - self.pixel_mean) / self.pixel_std
        x = x.to(next(self.stages.parameters()).dtype)
        stages: OrderedDict[str, Tensor] = OrderedDict()
        for i, stage in enumerate(self.stages):
            x = stage(x)
            stages[str(i)] = x
        return tuple(self.fpn(stages).values())


def freeze_stages(backbone: Backbone, count: int) -> None:
    """Stop training of the first `count` stages (0..4); the stem belongs to the first."""
    for stage in list(backbone.stages)[:count]:
        stage.requires_grad_(False)


class InitialWeights(NamedTuple):
    """Classification weights to start from, and the normalisation that they were trained with."""

    state_dict: Mapping[str, Tensor]
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]


def initial_weights(name: str, source: str) -> InitialWeights:
    """Weights of a classifier with torchvision's key names.

    name: a backbone. source: `imagenet` for torchvision's own (downloads once), or the path of a .pth file.
    A file with 1001 classes follows TensorFlow-Slim, whose pixels are value / 127.5 - 1.
    Raises ValueError where there is no such file.
    """
    if source == "imagenet":
        weights = TORCHVISION_WEIGHTS[name]
        transforms = weights.transforms()
        mean, std = ([255 * value for value in part] for part in (transforms.mean, transforms.std))
        return InitialWeights(weights.get_state_dict(progress=True), _triple(mean), _triple(std))
    if not Path(source).is_file():
        raise ValueError(f"backbone weights must be imagenet or the path of a .pth file, got {source}")
    state_dict = torch.load(source, map_location="cpu", weights_only=True)
    if len(state_dict["classifier.1.weight" if name == "mobilenet_v2" else "fc.weight"]) == 1001:
        return InitialWeights(state_dict, (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))
    defaults = TORCHVISION_WEIGHTS[name].transforms()
    mean, std = ([255 * value for value in part] for part in (defaults.mean, defaults.std))
    return InitialWeights(state_dict, _triple(mean), _triple(std))


def load_initial_weights(backbone: Backbone, name: str, weights: InitialWeights) -> None:
    """Copy classification weights into the stages; the pyramid keeps its random start."""
    backbone.stages.load_state_dict(_stages(name, weights.state_dict).state_dict())


def _triple(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return red, green, blue


def _stages(name: str, state_dict: Mapping[str, Tensor] | None = None) -> nn.ModuleList:
    build, arrange = {
        "resnet50": (lambda **kwargs: resnet50(norm_layer=FrozenBatchNorm2d, **kwargs), _resnet50_stages),
        "swin_b": (swin_b, _swin_stages),
        "mobilenet_v2": (mobilenet_v2, _mobilenet_stages),
    }[name]
    if state_dict is None:
        return _mobilenet_stages(build(), is_random=True) if name == "mobilenet_v2" else arrange(build())
    net = build(num_classes=len(list(state_dict.values())[-1]))
    net.load_state_dict(state_dict)
    return arrange(net)


def _resnet50_stages(net: ResNet) -> nn.ModuleList:
    # Batch statistics of the few images that fit on a GPU are worse than ImageNet's: they stay frozen.
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool)
    return nn.ModuleList([nn.Sequential(stem, net.layer1), net.layer2, net.layer3, net.layer4])


def _swin_stages(net: SwinTransformer) -> nn.ModuleList:
    features = list(net.features)
    stages = [nn.Sequential(*features[i : i + 2]) for i in (0, 2, 4, 6)]
    return nn.ModuleList(
        _SwinStage(stage, channels) for stage, channels in zip(stages, STAGE_CHANNELS["swin_b"], strict=True)
    )


class _SwinStage(nn.Module):
    """A Swin stage that takes and gives (B, C, h, w), with its own LayerNorm at the exit."""

    def __init__(self, body: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.body = body
        self.norm = nn.LayerNorm(channels)
        self.to_channels_first = Permute([0, 3, 1, 2])
        # The first stage begins with the patch embedding, which takes images as they are.
        self.takes_images = isinstance(cast(nn.Module, body[0]), nn.Sequential)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.takes_images else x.permute(0, 2, 3, 1)
        return self.to_channels_first(self.norm(self.body(x)))


def _mobilenet_stages(net: MobileNetV2, *, is_random: bool = False) -> nn.ModuleList:
    # The last 1x1 convolution (320 -> 1280) serves the classifier alone.
    features = list(net.eval().features)[:18]
    for block in features:
        fold_batch_norm(block)
        if is_random:
            _keep_variance(block)
    bounds = ((0, 4), (4, 7), (7, 14), (14, 18))
    return nn.ModuleList(nn.Sequential(*features[start:end]) for start, end in bounds)


def _keep_variance(module: nn.Module) -> None:
    """Draw convolutions so that activations keep their variance where no BatchNorm restores it (fan-in).

    torchvision's start counts on BatchNorm: folded, the signal falls by 10^-8 on its way to the last stage.
    """
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_in")


def fold_batch_norm(module: nn.Module) -> None:
    """Fold every BatchNorm that follows a convolution into it, in place.

    The statistics are frozen anyway; folded, a training step on a CPU saves a pass over every activation.
    """
    children = list(module.named_children())
    for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            setattr(module, conv_name, fuse_conv_bn_eval(conv.eval(), norm.eval()))
            setattr(module, norm_name, nn.Identity())
    for child in module.children():
        fold_batch_norm(child)


def _separable_conv(channels: int) -> nn.Sequential:
    depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    return nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1))
