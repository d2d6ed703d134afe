"""The engines of a bundle in TensorRT, on the GPU that they were built for; no torch.

Features stay on the device between the backbone and the steps. What psdiff export --target trt built is taken
where it fits this device, and refused before it is loaded where it does not: see plans.choose_plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from ..bundle import BundleError, Manifest
from ..kernels.driver import CudaError, Driver, DriverNotFoundError
from ..kernels.launch import open_driver
from ..models.detections import Float32Array
from ..models.sampling import FEATURES, STEP_INPUTS, Features, StepOutput
from ..plans import LOOPED, Device, Plans, choose_plans
from .tensorrt_network import DeviceTensor, Gpu, Network

# What each call hands over and gets; the type of the maps is the engine's own (None).
BACKBONE_TYPES: dict[str, str | None] = {"image": "UINT8"}
FEATURE_TYPES: dict[str, str | None] = dict.fromkeys(FEATURES)
STEP_TYPES: dict[str, str | None] = {
    **FEATURE_TYPES,
    "boxes_t": "FLOAT",
    "emb_t": "FLOAT",
    "t": "INT64",
    "t_next": "INT64",
}
OUTPUT_TYPES: dict[str, str | None] = dict.fromkeys(StepOutput._fields, "FLOAT")


class TensorRtEngine:
    """Backbone and denoising step of a bundle on a GPU. Used by one thread at a time."""

    def __init__(
        self, folder: Path, manifest: Manifest, *, trt: ModuleType | None = None, driver: Driver | None = None
    ) -> None:
        """trt, driver: stand-ins for TensorRT and the first GPU.

        Raises ValueError where TensorRT, or a GPU and a library that calls it, is missing; BundleError where the
        bundle has no engines for this device, or they cannot be loaded.
        """
        trt, driver = trt or tensorrt_module(), driver or _first_gpu()
        plans = choose_plans(folder, manifest, device_of(trt, driver))
        # Before the engines: they look for their plugins when they are loaded.
        _load_plugins(trt, plans)
        gpu = Gpu(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), driver, driver.create_stream())
        self._backbone, self._denoise_step = (
            Network(gpu, plans.path(part), plans.record.engines[part]) for part in LOOPED
        )
        self._backbone.check(BACKBONE_TYPES, FEATURE_TYPES)
        self._denoise_step.check(STEP_TYPES, OUTPUT_TYPES)
        self._check_maps(plans)

    def backbone(self, images: NDArray[np.uint8]) -> Features:
        """(B, H, W, 3) uint8 RGB canvases -> p2..p5, which stay on the device."""
        maps = self._backbone.run({"image": images})
        return [maps[name] for name in FEATURES]

    def denoise_step(
        self,
        features: Features,
        boxes_t: Float32Array,
        emb_t: Float32Array,
        t: NDArray[np.int64],
        t_next: NDArray[np.int64],
    ) -> StepOutput:
        """Move (B, N, 4) boxes and (B, N, E) embeddings from timestep t (B,) to t_next (B,)."""
        inputs: Sequence[NDArray[np.generic] | DeviceTensor] = [*features, boxes_t, emb_t, t, t_next]
        outputs = self._denoise_step.run(dict(zip(STEP_INPUTS, inputs, strict=True)))
        return StepOutput(*(self._denoise_step.download(outputs[name]) for name in StepOutput._fields))

    def _check_maps(self, plans: Plans) -> None:
        for name in FEATURES:
            made, read = (network.tensors[name].dtype for network in (self._backbone, self._denoise_step))
            if made != read:
                raise BundleError(
                    f"{name} must be of one type in both engines of {plans.folder}, got {made} and {read}; "
                    "build the engines again"
                )


def tensorrt_module() -> ModuleType:
    """`tensorrt`, or else `tensorrt_rtx`. Raises ValueError that says how to install one."""
    for name in ("tensorrt", "tensorrt_rtx"):
        if find_spec(name) is not None:
            return import_module(name)
    raise ValueError(
        "backend tensorrt must have the package tensorrt or tensorrt_rtx, got neither; a Jetson has it from JetPack, "
        "elsewhere run pip install tensorrt. It must be the version that built the engines"
    )


def device_of(trt: ModuleType, driver: Driver) -> Device:
    """What the sidecar of engines for this device says."""
    return Device(int(driver.arch.removeprefix("sm_")), f"{trt.__name__} {trt.__version__}")


def tensorrt_version() -> str:
    """TensorRT and the GPU that it computes on. Raises ValueError where one of them is missing."""
    trt = tensorrt_module()
    return f"{trt.__name__} {trt.__version__} {_first_gpu().arch}"


def _first_gpu() -> Driver:
    try:
        return open_driver()
    except (DriverNotFoundError, CudaError) as error:
        raise ValueError(f"backend tensorrt must have a GPU, got none: {error}") from None


def _load_plugins(trt: ModuleType, plans: Plans) -> None:
    library = plans.plugin_library
    if library is not None and trt.get_plugin_registry().load_library(str(library.resolve())) is None:
        raise BundleError(
            f"{library} must hold plugins for {trt.__name__} {trt.__version__}, got a library that it refuses; "
            "TensorRT's own log says why. Build it again (make trt-plugin) and the engines with it"
        )
