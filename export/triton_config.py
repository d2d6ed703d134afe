"""The configurations of Triton models: what they take and give, and how they batch, queue and warm up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bundle import Manifest, Precision, file_sha256
from ..plans import EnginesRecord
from ..runtime.triton_contract import BACKEND, INTERACTIVE, MANIFEST_SHA256, MODEL, STREAM, THREADS

# ONNX element types that cross the border of a graph.
TYPES = {1: "TYPE_FP32", 2: "TYPE_UINT8", 7: "TYPE_INT64"}

Dims = Sequence[int]
Tensors = dict[str, tuple[str, Dims]]
"""Name -> type and shape without the batch; -1 is any size."""


class RepositoryError(Exception):
    """The repository cannot be written from this bundle with these options."""


@dataclass(frozen=True)
class RepositoryOptions:
    """How the models serve."""

    backend: str = "onnxruntime"
    """What psdiff computes with; one of runtime.detector.BACKENDS."""
    threads: int | None = None
    """CPU threads of an instance; by default one a core."""
    instances: int = 1
    """Of psdiff, side by side in processes of their own."""
    max_batch: int = 8
    queue_delay_ms: float = 2.0
    """How long an image waits for others to share its batch."""
    queue_size: int = 64
    """Requests that wait; one more is refused at once."""
    queue_timeout_ms: float = 1000.0
    """A request that has waited as long is refused; requests may set a shorter time."""
    precision: Precision = "fp16"
    """Of the engines that become psdiff_k{K}."""
    version: int | None = None
    """By default one more than the highest there is."""

    def __post_init__(self) -> None:
        for name in ("instances", "max_batch", "queue_size"):
            if getattr(self, name) < 1:
                raise RepositoryError(f"{name} must be a whole number >= 1, got {getattr(self, name)}")
        if self.queue_delay_ms < 0 or self.queue_timeout_ms <= 0:
            raise RepositoryError(
                "queue_delay_ms must be >= 0 and queue_timeout_ms > 0, got "
                f"{self.queue_delay_ms:g} and {self.queue_timeout_ms:g}"
            )
        if self.version is not None and self.version < 1:
            raise RepositoryError(f"version must be a whole number >= 1, got {self.version}")


@dataclass(frozen=True)
class Plan:
    """An engine of K steps for one GPU."""

    sm: int
    path: Path
    record: EnginesRecord

    @property
    def file(self) -> str:
        """Its name in the repository."""
        return f"model_sm{self.sm}.plan"

    @property
    def capability(self) -> str:
        """As the server writes it: 8.7."""
        return f"{self.sm // 10}.{self.sm % 10}"


def psdiff_config(manifest: Manifest, manifest_sha256: str, options: RepositoryOptions) -> Any:  # noqa: ANN401
    """The configuration of psdiff, as the server's own message type."""
    config = _config(MODEL, options)
    config.backend = "python"
    canvas, embedding = [manifest.height, manifest.width, 3], manifest.embedding_dim
    _add(config.input, {"image": ("TYPE_UINT8", canvas)})
    _add(
        config.input,
        {
            "frame_size": ("TYPE_INT32", [2]),
            "boxes_t": ("TYPE_FP32", [-1, 4]),
            "emb_t": ("TYPE_FP32", [-1, embedding]),
            "given_boxes": ("TYPE_FP32", [-1, 4]),
            "query": ("TYPE_FP32", [embedding]),
        },
        optional=True,
    )
    _add(
        config.output,
        {
            "num": ("TYPE_INT32", [1]),
            "boxes_xyxy": ("TYPE_FP32", [-1, 4]),
            "scores": ("TYPE_FP32", [-1]),
            "embeddings": ("TYPE_FP32", [-1, embedding]),
            "similarity": ("TYPE_FP32", [-1]),
        },
    )
    group = config.instance_group.add(count=options.instances)
    group.kind = group.KIND_CPU
    told = {BACKEND: options.backend, THREADS: str(options.threads or 0), MANIFEST_SHA256: manifest_sha256}
    for name, value in told.items():
        config.parameters[name].string_value = value
    return config


def engine_config(
    graph: Path, manifest: Manifest, steps: int, plans: Sequence[Plan], options: RepositoryOptions
) -> Any:  # noqa: ANN401 - a message type of the server
    """The configuration of psdiff_k{K}; its inputs and outputs are those of the graph."""
    config = _config(f"{MODEL}_k{steps}", options)
    config.platform = "tensorrt_plan"
    most = min(_most_images(plan, steps) for plan in plans)
    config.max_batch_size = min(options.max_batch, most)
    inputs, outputs = graph_tensors(graph)
    _add(config.input, inputs)
    _add(config.output, outputs)
    group = config.instance_group.add(count=1)
    group.kind = group.KIND_GPU
    # One image has a profile of its own: see export.engines.profiles_of.
    group.profile.extend(["0", "1"])
    for plan in plans:
        config.cc_model_filenames[plan.capability] = plan.file
        config.parameters[f"psdiff.sha256.sm{plan.sm}"].string_value = file_sha256(plan.path)
    config.default_model_filename = plans[0].file
    config.optimization.cuda.graphs = True
    config.optimization.cuda.output_copy_stream = True
    sizes = {"image": [manifest.height, manifest.width, 3]}
    sizes |= {
        "boxes_T": [manifest.num_proposals, 4],
        "emb_T": [manifest.num_proposals, manifest.embedding_dim],
    }
    for batch in sorted({1, config.max_batch_size}):
        spec = config.optimization.cuda.graph_spec.add(batch_size=batch)
        warmup = config.model_warmup.add(name=f"batch_{batch}", batch_size=batch)
        for name, dims in sizes.items():
            spec.input[name].dim.extend(dims)
            sample = warmup.inputs[name]
            sample.data_type = config.input[list(inputs).index(name)].data_type
            sample.dims.extend(dims)
            if name == "image":
                sample.input_data_file = name
            else:
                sample.random_data = True
    return config


def graph_tensors(graph: Path) -> tuple[Tensors, Tensors]:
    """Inputs and outputs of an ONNX graph, without their first dimension, which is the batch."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    return _tensors(model.graph.input), _tensors(model.graph.output)


def _tensors(values: Any) -> Tensors:  # noqa: ANN401 - generated code without types
    kinds = {value.name: value.type.tensor_type for value in values}
    return {
        name: (TYPES[kind.elem_type], [dim.dim_value or -1 for dim in kind.shape.dim[1:]])
        for name, kind in kinds.items()
    }


def _config(name: str, options: RepositoryOptions) -> Any:  # noqa: ANN401 - a message type of the server
    """What both kinds of models share: batches, queue, priorities, versions."""
    config = _messages().ModelConfig(name=name, max_batch_size=options.max_batch)
    config.version_policy.latest.num_versions = 1
    batching = config.dynamic_batching
    batching.max_queue_delay_microseconds = round(options.queue_delay_ms * 1000)
    batching.priority_levels = STREAM
    batching.default_priority_level = STREAM
    for level in (INTERACTIVE, STREAM):
        _limit(batching.priority_queue_policy[level], options)
    _limit(batching.default_queue_policy, options)
    return config


def _limit(policy: Any, options: RepositoryOptions) -> None:  # noqa: ANN401 - a message type of the server
    policy.timeout_action = policy.REJECT
    policy.default_timeout_microseconds = round(options.queue_timeout_ms * 1000)
    policy.allow_timeout_override = True
    policy.max_queue_size = options.queue_size


def _messages() -> Any:  # noqa: ANN401 - generated code without types
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as error:
        raise RepositoryError(
            f"tritonclient must be installed, got {error}; run pip install psdiff[triton]"
        ) from None
    return model_config_pb2


def _add(fields: Any, tensors: Tensors, *, optional: bool = False) -> None:  # noqa: ANN401
    for name, (kind, dims) in tensors.items():
        tensor = fields.add(name=name, dims=dims)
        tensor.data_type = _messages().DataType.Value(kind)
        if optional:
            tensor.optional = True


def _most_images(plan: Plan, steps: int) -> int:
    profiles = plan.record.engines[f"e2e_k{steps}"].profiles
    return max(largest[0] for profile in profiles for _, _, largest in [profile["image"]])
