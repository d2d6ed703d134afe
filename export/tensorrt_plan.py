"""One graph into one TensorRT plan.

Networks are strongly typed: what computes in half precision is written in the graph, so TensorRT 10 and 11 agree.
Names are those that TensorRT 10.3 to 11.x share. Where `tensorrt` is absent, `tensorrt-rtx` compiles the same graphs
for the GPUs that it knows, on a machine without any.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import helper

from .layer_table import Layer, read_layers, read_memory

RTX = "tensorrt_rtx"
# functions.ROI_ALIGN, which cannot be imported where there is no torch.
ROI_ALIGN = "PSRoiAlignCL"

Shapes = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Smallest, usual and largest shape of an input."""

Profile = Mapping[str, Shapes]


class EngineError(Exception):
    """No engine can be built here, or TensorRT refused a graph."""


@dataclass(frozen=True)
class Plan:
    """A serialised engine, and what the builder said of it."""

    data: bytes
    layers: list[Layer]
    """Empty where the builder's log holds no table: only TensorRT-RTX writes one."""
    scratch_bytes: int
    """At the largest profile."""
    weight_bytes: int

    @property
    def is_capturable(self) -> bool | None:
        """Whether a CUDA graph can hold an inference; None where the plan does not say."""
        for answer in (True, False):
            if b"stream_capturable=%d" % answer in self.data:
                return answer
        return None


@dataclass(frozen=True)
class PlanOptions:
    """How a graph is compiled."""

    sm: int
    """Compute capability of the GPU times ten."""
    profiles: Sequence[Profile]
    """Each a range of shapes that the engine has kernels for."""
    channels_last: Sequence[str] = ()
    """(B, C, h, w) inputs and outputs that lie (B, h, w, C) in memory; C must be a multiple of eight."""
    use_plugins: bool = False
    """Take the plugins that are registered in place of the functions of the graph."""
    workspace_bytes: int | None = None
    """The most scratch memory a kernel may take; None leaves it to TensorRT."""
    timing_cache: Path | None = None
    """Measured times of kernels: read if it is there, and written back. TensorRT-RTX measures nothing."""
    on_progress: Callable[[str], None] | None = None
    """Told of the phase that TensorRT is in, and how far that is."""


def tensorrt_module() -> ModuleType:
    """`tensorrt`, or else `tensorrt_rtx`. Raises EngineError that says how to install one."""
    for name in ("tensorrt", RTX):
        if find_spec(name) is not None:
            module = import_module(name)
            if name == RTX:
                _check_rtx_parser()
            return module
    raise EngineError(
        "tensorrt must be installed to build engines, got neither it nor tensorrt_rtx; run pip install tensorrt on "
        "the machine that will serve (a Jetson has it from JetPack), or pip install tensorrt-rtx elsewhere"
    )


def _check_rtx_parser() -> None:
    """The ONNX parser of TensorRT-RTX opens libtensorrt_rtx.so, which the wheel holds under another name only.

    Without that name the process would end at the first graph that holds a plugin.
    """
    folder = Path(import_module("tensorrt_rtx_libs").__file__ or "").parent
    link = folder / "libtensorrt_rtx.so"
    if link.exists():
        return
    try:
        link.symlink_to("libtensorrt_rtx.so.1")
    except OSError as error:
        raise EngineError(
            f"{folder} must hold a link libtensorrt_rtx.so to libtensorrt_rtx.so.1, got none: {error}; "
            "make it as the owner of that folder"
        ) from None


def load_plugins(trt: ModuleType, library: Path) -> None:
    """Register the plugins of libpsdiff_trt.so. Raises EngineError."""
    if not library.is_file():
        raise EngineError(f"plugin library must be a file, got {library}; make trt-plugin writes one")
    log = _log(trt)
    log.clear()
    # TensorRT speaks to the logger of the first builder; without one it prints.
    trt.Builder(log)
    if trt.get_plugin_registry().load_library(str(library.resolve())) is None:
        raise EngineError(
            f"{library} must hold plugins for {trt.__name__} {trt.__version__}, got: {log.first_error()}; "
            "build it again with this version's headers: make trt-plugin TENSORRT_INCLUDE=..."
        )


def build_plan(trt: ModuleType, graph: Path, options: PlanOptions) -> Plan:
    """Compile a graph. Raises EngineError with TensorRT's first complaint."""
    log = _log(trt)
    log.clear()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, network, graph, options)
    for i in range(network.num_outputs):
        if network.get_output(i).name in options.channels_last:
            # Vectors of eight channels, channels last: with a multiple of eight these are the plain bytes.
            network.get_output(i).allowed_formats = 1 << int(trt.TensorFormat.HWC8)
    config = _config(trt, builder, options)
    if options.on_progress is not None:
        config.progress_monitor = _monitor(trt, options.on_progress)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise EngineError(f"{graph.name} must compile for sm_{options.sm}, got: {log.first_error()}")
    _save_timing_cache(trt, config, options.timing_cache)
    scratch, weights = read_memory(log.messages)
    return Plan(bytes(data), read_layers(log.messages), scratch, weights)


def _parse(trt: ModuleType, network: Any, path: Path, options: PlanOptions) -> None:  # noqa: ANN401
    parser = trt.OnnxParser(network, _log(trt))
    try:
        graph = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise EngineError(f"{path} must be an ONNX graph, got: {error}") from None
    inputs_channels_last(graph, options.channels_last)
    sums_for_products(graph)
    override = getattr(trt.OnnxParserFlag, "ENABLE_PLUGIN_OVERRIDE", None)
    if options.use_plugins and override is not None:
        parser.set_flag(override)
    elif options.use_plugins:
        # Before TensorRT 10.15 a function goes before the plugin of its name.
        del graph.functions[:]
    if not parser.parse(graph.SerializeToString(), str(path)):
        complaint = parser.get_error(0).desc() if parser.num_errors else _log(trt).first_error()
        raise EngineError(
            f"{path} must be a graph that {trt.__name__} {trt.__version__} reads, got: {complaint}"
        )


def sums_for_products(graph: onnx.ModelProto) -> None:
    """Write the product in ROIAlign's function, weights (L, 1, R) by rows (L, R, C), as a weighted sum, in place.

    float32 graphs hold the product since CPUs want it (see functions.py). TensorRT fuses the sum with the gather
    of the rows: 1.1 GB of scratch memory instead of 2.5 (psdiff_r50, 4 images of 500 proposals, fp32).
    """
    for function in (each for each in graph.functions if each.name == ROI_ALIGN):
        for place, node in enumerate(function.node):
            if node.op_type != "MatMul":
                continue
            weights, rows = node.input
            turned, weighted, axis = (f"{node.output[0]}_{part}" for part in ("turned", "weighted", "axis"))
            nodes = [
                helper.make_node("Transpose", [weights], [turned], perm=[0, 2, 1]),
                helper.make_node("Mul", [rows, turned], [weighted]),
                helper.make_node("Constant", [], [axis], value_ints=[1]),
                helper.make_node("ReduceSum", [weighted, axis], list(node.output), keepdims=1),
            ]
            rest = [*function.node[:place], *nodes, *function.node[place + 1 :]]
            del function.node[:]
            function.node.extend(rest)
            break


def inputs_channels_last(graph: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give inputs (B, C, h, w) the shape (B, h, w, C), in place, and drop the transpositions behind them.

    An input of an engine may lie in the format of vectors of eight, too, but then a plugin gets a copy of it.
    """
    inputs = {value.name: value for value in graph.graph.input if value.name in names}
    for name, value in inputs.items():
        readers = [node for node in graph.graph.node if name in node.input]
        if any(
            node.op_type != "Transpose" or list(node.attribute[0].ints) != [0, 2, 3, 1] for node in readers
        ):
            raise EngineError(
                f"{name} must be read channels last alone, got {[node.op_type for node in readers]}"
            )
        for node in readers:
            node.CopyFrom(helper.make_node("Identity", [name], list(node.output), name=node.name))
        batch, channels, height, width = value.type.tensor_type.shape.dim
        value.type.tensor_type.shape.CopyFrom(onnx.TensorShapeProto(dim=[batch, height, width, channels]))


def _config(trt: ModuleType, builder: Any, options: PlanOptions) -> Any:  # noqa: ANN401
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for shapes in options.profiles:
        profile = builder.create_optimization_profile()
        for name, (smallest, usual, largest) in shapes.items():
            profile.set_shape(name, tuple(smallest), tuple(usual), tuple(largest))
        config.add_optimization_profile(profile)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if trt.__name__ == RTX:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{options.sm}"), 0)
    elif options.timing_cache is not None:
        known = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    return config


def _save_timing_cache(trt: ModuleType, config: Any, path: Path | None) -> None:  # noqa: ANN401
    if trt.__name__ != RTX and path is not None:
        path.write_bytes(bytes(config.get_timing_cache().serialize()))


def _monitor(trt: ModuleType, on_progress: Callable[[str], None]) -> Any:  # noqa: ANN401
    class Monitor(trt.IProgressMonitor):
        """Tells of the phase that TensorRT is in, and how far that is."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.totals: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, num_steps: int) -> None:
            self.totals[name] = num_steps

        def step_complete(self, name: str, step: int) -> bool:
            on_progress(f"{name.lower()}, {step + 1} of {self.totals[name]}")
            return True

        def phase_finish(self, name: str) -> None:
            self.totals.pop(name, None)

    return Monitor()


@functools.cache
def _log(trt: ModuleType) -> Any:  # noqa: ANN401
    """The logger of the process: TensorRT keeps the first one that it is given."""

    class Log(trt.ILogger):
        """Keeps what TensorRT says, and prints nothing."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            self.messages.append(message)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def clear(self) -> None:
            self.messages.clear()
            self.errors.clear()

        def first_error(self) -> str:
            return self.errors[0] if self.errors else "no reason given"

    return Log()
