"""The settings of a PSDiff network and its presets, which are data: models/presets/*.json."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

PRESETS = Path(__file__).parent / "presets"


class PSDiffConfig(BaseModel):
    """One network. The defaults are those of the paper's R50 model (arXiv:2309.11125)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: Literal["resnet50", "swin_b", "mobilenet_v2"] = "resnet50"
    height: int = Field(768, gt=0, multiple_of=32)
    """Canvas height in pixels; frames are letterboxed into the canvas."""
    width: int = Field(1344, gt=0, multiple_of=32)
    pixel_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted from 0..255 RGB; the value depends on what the initial weights were trained with."""
    pixel_std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    channels: int = Field(256, gt=0)
    """C, the width of the pyramid and of the denoising layer."""
    separable_fpn: bool = False
    """Depthwise-separable output convolutions in the pyramid, for small processors."""
    num_proposals: int = Field(300, gt=0)
    embedding_dim: int = Field(256, gt=0)
    pool_size: int = Field(7, gt=0)
    sampling_ratio: int = Field(2, gt=0)
    canonical_size: float = Field(224.0, gt=0)
    """Side in canvas pixels of a box that is pooled from p4."""
    num_heads: int = Field(8, gt=0)
    dynamic_dim: int = Field(8, gt=0)
    """D, the width between the two dynamic convolutions."""
    ffn_dim: int = Field(512, ge=0)
    """Hidden width of the feed-forward block after the dynamic convolution; 0 leaves the block out."""
    time_dim: int = Field(256, gt=0, multiple_of=2)
    time_hidden: int = Field(1024, gt=0)
    self_attention: Literal["intra", "inter", "none"] = "intra"
    """Among the tokens of a region, among the proposals of an image, or not at all."""
    dynamic_conv: bool = True
    cross_attention: bool = True
    position_code: bool = True
    """Learned code of the S x S cells; without it (and with the mean) a box cannot be localised."""
    reduction: Literal["squeeze", "linear", "mean"] = "squeeze"
    """How S*S tokens become one: squeeze channels then flatten, flatten, or average."""
    squeeze_dim: int = Field(24, gt=0)
    """Channels per token before flattening; 24 keeps the R50 model within 2.5 % of the paper's FLOPs."""
    head: Literal["cascaded", "parallel", "joint", "region"] = "cascaded"
    """What box and class are computed from: the embedding, the fused features, both, or the pooled region too."""
    embedding_gain: Literal["none", "wiener"] = "none"
    """Scale e_t by how much of it is signal, so that pure noise enters as zero."""
    box_scale: float = Field(2.0, gt=0)
    embedding_scale: float = Field(3.0, gt=0)
    num_timesteps: int = Field(1000, gt=1)
    grid_power: float = Field(1.0, gt=0)
    """Shape of the sampling grid, see models.sampling.sampling_timesteps; 1 is the paper's."""
    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_iou: float = Field(0.5, gt=0, le=1)


def preset_names() -> list[str]:
    """Names of the presets, in order."""
    return sorted(path.stem for path in PRESETS.glob("*.json"))


def load_preset(name: str) -> PSDiffConfig:
    """Return the preset of that name. Raises ValueError that names the closest one."""
    path = PRESETS / f"{name}.json"
    if not path.is_file():
        close = difflib.get_close_matches(name, preset_names(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"preset must be one of {', '.join(preset_names())}, got {name}{hint}")
    return PSDiffConfig.model_validate(json.loads(path.read_text(encoding="utf-8")))
