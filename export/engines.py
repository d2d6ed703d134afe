"""TensorRT engines of a bundle: graphs compiled for one GPU, in plans/<target>/ with a sidecar that says for what."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from ..bundle import Manifest, Precision, QuantizedForm, file_sha256, graph_file, load_manifest
from ..kernels.driver import CudaError, DriverNotFoundError
from ..kernels.launch import open_driver
from ..models.config import PSDiffConfig
from ..models.sampling import FEATURES
from ..plans import PLANS, PLUGIN_LIBRARY, SIDECAR, EnginePrecision, EngineRecord, EnginesRecord
from .layer_table import kinds
from .tensorrt_plan import (
    RTX,
    EngineError,
    PlanOptions,
    Profile,
    Shapes,
    build_plan,
    load_plugins,
    tensorrt_module,
)

TIMING_CACHE = "timing.cache"
STRIDES = (4, 8, 16, 32)

# With a multiple of eight channels, channels last in vectors of eight are the bytes of (B, h, w, C), which is what
# ROIAlign reads. TensorRT has that format for half precision alone.
CHANNELS_PER_VECTOR = 8


@dataclass(frozen=True)
class EngineOptions:
    """For what engines are built."""

    sm: int
    """Compute capability of the GPU times ten: 87 Orin, 89 L4, 90 H100 and H200, 110 Thor."""
    precision: EnginePrecision = "fp16"
    max_batch: int = 8
    max_proposals: int = 500
    """An image may bring more proposals than the model's own number: those of a query, or of the frame before."""
    unrolled: Sequence[int] = (1, 2, 4)
    """The K for which K steps are built in one piece too, for servers that cannot loop; not in int8."""
    plugin_library: Path | None = None
    """libpsdiff_trt.so; without it TensorRT compiles the functions of the graph."""
    use_plugins: bool = False
    """Take plugins that the process has registered itself."""
    workspace_bytes: int | None = None
    """The most scratch memory that a kernel may take; None leaves it to TensorRT."""


def build_engines(
    bundle: Path, options: EngineOptions, on_step: Callable[[str], None] = lambda step: None
) -> Path:
    """Compile the graphs of a bundle. Returns plans/<target>, which is replaced at once, when all of it is there.

    Raises EngineError (no TensorRT, another GPU, a graph that it refuses) and BundleError (a bundle not whole).
    """
    manifest = load_manifest(bundle)
    trt = tensorrt_module()
    check_target(trt, options.sm)
    if options.plugin_library is not None:
        load_plugins(trt, options.plugin_library)
    folder = bundle / PLANS / target_name(trt, options)
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        made = Path(temporary) / folder.name
        made.mkdir()
        if (folder / TIMING_CACHE).is_file():
            shutil.copy(folder / TIMING_CACHE, made)
        if options.plugin_library is not None:
            shutil.copy(options.plugin_library, made / PLUGIN_LIBRARY)
        record = _record(trt, options, manifest)
        for part in parts_of(options):
            what = f"building {part} for sm_{options.sm} in {options.precision}"
            on_step(what)
            record.engines[part] = _build_part(
                trt,
                bundle,
                manifest,
                part,
                options,
                made,
                lambda phase, what=what: on_step(f"{what}: {phase}"),
            )
        (made / SIDECAR).write_text(record.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    return folder


def parts_of(options: EngineOptions) -> list[str]:
    """The graphs that become engines. A quantised bundle holds no unrolled ones: each would bring its own weights."""
    unrolled = [] if options.precision == "int8" else options.unrolled
    return ["backbone", "denoise_step", *(f"e2e_k{steps}" for steps in unrolled)]


def target_name(trt: ModuleType, options: EngineOptions) -> str:
    """Folder of a target: GPU, what built the engines, precision."""
    maker = "rtx" if trt.__name__ == RTX else "trt"
    return f"sm{options.sm}-{maker}{trt.__version__}-{options.precision}"


def sm_of_this_machine() -> int:
    """Compute capability of the first GPU, times ten. Raises EngineError where there is none."""
    try:
        return int(open_driver().arch.removeprefix("sm_"))
    except (DriverNotFoundError, CudaError) as error:
        raise EngineError(f"sm must be given on a machine without a GPU, got none: {error}") from None


def check_target(trt: ModuleType, sm: int) -> None:
    """Raise EngineError unless engines for the GPU can be built here."""
    if trt.__name__ == RTX:
        known = [
            name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")
        ]
        if str(sm) not in known:
            raise EngineError(
                f"sm must be one of {', '.join(known)} with {RTX} {trt.__version__}, got {sm}; engines for "
                "other GPUs are built on the machine that has one, with tensorrt"
            )
        return
    own = sm_of_this_machine()
    if sm != own:
        raise EngineError(f"sm must be {own}, that of this machine's GPU, with tensorrt, got {sm}")


def channels_last(part: str, manifest: Manifest, precision: EnginePrecision) -> tuple[str, ...]:
    """The maps of a graph that lie (B, h, w, C) in memory: what ROIAlign reads.

    TensorRT leaves them so in half precision alone, where eight channels are a vector.
    """
    is_vector = precision in ("fp16", "bf16") and _channels(manifest) % CHANNELS_PER_VECTOR == 0
    return FEATURES if is_vector and part in ("backbone", "denoise_step") else ()


def profiles_of(part: str, manifest: Manifest, options: EngineOptions) -> list[Profile]:
    """One image with up to the model's own number of proposals, and any batch with any number up to the largest.

    The first is not one fixed shape, since TensorRT-RTX 1.7.1 fails where one profile leaves nothing free and
    another does.
    """
    usual = manifest.num_proposals
    most = (options.max_batch, max(options.max_proposals, usual))
    sizes = [((1, 1), (1, usual), (1, usual)), ((1, 1), (options.max_batch, usual), most)]
    profiles = []
    for triple in sizes:
        smallest, opt, largest = (_input_shapes(part, manifest, options.precision, *size) for size in triple)
        profiles.append({name: (smallest[name], opt[name], largest[name]) for name in smallest})
    return profiles


def _input_shapes(
    part: str, manifest: Manifest, precision: EnginePrecision, images: int, proposals: int
) -> dict[str, list[int]]:
    """Shapes of a graph's inputs for B images of N proposals."""
    image = {"image": [images, manifest.height, manifest.width, 3]}
    if part == "backbone":
        return image
    boxes, embeddings = [images, proposals, 4], [images, proposals, manifest.embedding_dim]
    if part != "denoise_step":
        return {**image, "boxes_T": boxes, "emb_T": embeddings}
    shapes = {}
    for name, stride in zip(FEATURES, STRIDES, strict=True):
        size, channels = [manifest.height // stride, manifest.width // stride], [_channels(manifest)]
        is_last = name in channels_last(part, manifest, precision)
        shapes[name] = [images, *size, *channels] if is_last else [images, *channels, *size]
    return {**shapes, "boxes_t": boxes, "emb_t": embeddings, "t": [images], "t_next": [images]}


def _build_part(
    trt: ModuleType,
    bundle: Path,
    manifest: Manifest,
    part: str,
    options: EngineOptions,
    folder: Path,
    on_progress: Callable[[str], None],
) -> EngineRecord:
    form: Precision | QuantizedForm = "int8-trt" if options.precision == "int8" else options.precision
    graph = graph_file(part, form)
    if graph not in manifest.files:
        how = "--target int8 --frames ..." if options.precision == "int8" else f"--precision {form}"
        raise EngineError(f"bundle must hold {graph}, got {bundle} without it; export with {how}")
    maps_last = channels_last(part, manifest, options.precision)
    profiles = profiles_of(part, manifest, options)
    plan = build_plan(
        trt,
        bundle / graph,
        PlanOptions(
            sm=options.sm,
            profiles=profiles,
            channels_last=maps_last,
            use_plugins=options.use_plugins or options.plugin_library is not None,
            workspace_bytes=options.workspace_bytes,
            timing_cache=folder / TIMING_CACHE,
            on_progress=on_progress,
        ),
    )
    path = folder / f"{part}.plan"
    path.write_bytes(plan.data)
    return EngineRecord(
        file=path.name,
        sha256=file_sha256(path),
        graph=graph,
        graph_sha256=manifest.files[graph],
        kernels=kinds(plan.layers),
        scratch_bytes=plan.scratch_bytes,
        stream_capturable=plan.is_capturable,
        profiles=[{name: _lists(shapes) for name, shapes in profile.items()} for profile in profiles],
        channels_last=list(maps_last),
    )


def _lists(shapes: Shapes) -> tuple[list[int], list[int], list[int]]:
    smallest, usual, largest = (list(shape) for shape in shapes)
    return smallest, usual, largest


def _record(trt: ModuleType, options: EngineOptions, manifest: Manifest) -> EnginesRecord:
    return EnginesRecord(
        sm=options.sm,
        tensorrt=f"{trt.__name__} {trt.__version__}",
        precision=options.precision,
        embedding_space=manifest.embedding_space,
        plugin_sha256=file_sha256(options.plugin_library) if options.plugin_library else None,
        engines={},
    )


def _channels(manifest: Manifest) -> int:
    return PSDiffConfig.model_validate(manifest.model).channels
