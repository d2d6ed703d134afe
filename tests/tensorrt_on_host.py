"""TensorRT and a GPU that are none: real sidecars and plans, device memory in host memory, onnxruntime for the rest.

A plan stands for the graph that its sidecar names, and takes and gives bytes as the engine does: maps channels last
where the sidecar says so. What it does not show is what TensorRT computes.
"""

import ctypes
import hashlib
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper
from psdiff.kernels.driver import Memory, OwnedStream
from psdiff.plans import EnginesRecord

TYPES = {"uint8": "UINT8", "float16": "HALF", "float32": "FLOAT", "int64": "INT64"}
STREAM = 4096


class HostDriver:
    """kernels.driver.Driver over NumPy arrays; counts what it is asked for."""

    arch = "sm_86"

    def __init__(self):
        self.allocations, self.streams = 0, set()
        self._arrays = {}

    def allocate(self, num_bytes):
        array = np.full(num_bytes, 0xFF, np.uint8)  # NaN in every float type
        self.allocations += 1
        self._arrays[array.ctypes.data] = array
        return Memory(array.ctypes.data, num_bytes, lambda: self._arrays.pop(array.ctypes.data))

    def create_stream(self):
        return OwnedStream(STREAM, lambda: None)

    def copy(self, destination, source, num_bytes, *, stream=0):
        self.streams.add(stream.handle)
        ends = (end.ctypes.data if isinstance(end, np.ndarray) else end for end in (destination, source))
        ctypes.memmove(*ends, num_bytes)


def stand_in(bundle, target, version, name="tensorrt_rtx", **changes):
    """A module like TensorRT that knows the plans of one target; changes: of the tensors' names and types."""
    record = EnginesRecord.model_validate_json((target / "engines.json").read_text())
    parts = {engine.sha256: (part, engine) for part, engine in record.engines.items()}
    seen = SimpleNamespace(profiles=[], streams=set(), libraries=[])

    class Runtime:
        def __init__(self, log):
            pass

        def deserialize_cuda_engine(self, data):
            part, engine = parts[hashlib.sha256(data).hexdigest()]
            graph = onnx.load(bundle / engine.graph, load_external_data=False)
            return Engine(bundle / engine.graph, graph, engine, seen, changes.get(part, {}))

    class Registry:
        def load_library(self, path):
            seen.libraries.append(path)
            return changes.get("library", object())

    def logger(severity):
        return severity

    logger.ERROR = 1
    return SimpleNamespace(
        __name__=name,
        __version__=version,
        Runtime=Runtime,
        Logger=logger,
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
        get_plugin_registry=Registry,
        seen=seen,
    )


class Engine:
    """trt.ICudaEngine, as far as the runtime asks it."""

    def __init__(self, path, graph, record, seen, changes):
        self.path, self.graph, self.record, self.seen, self.changes = path, graph, record, seen, changes
        self.modes = {value.name: "input" for value in graph.graph.input}
        self.modes |= {value.name: "output" for value in graph.graph.output}
        values = {value.name: value for value in (*graph.graph.input, *graph.graph.output)}
        self.dtypes = {
            name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for name, value in values.items()
        }
        self.sides = {
            name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
            for name, value in values.items()
        }
        self.num_io_tensors = len(self.modes)

    def get_tensor_name(self, index):
        name = list(self.modes)[index]
        return self.changes.get("names", {}).get(name, name)

    def get_tensor_mode(self, name):
        return self.modes.get(name, "input")

    def get_tensor_dtype(self, name):
        own = self.changes.get("types", {}).get(name)
        return SimpleNamespace(name=own or TYPES[self.dtypes.get(name, np.dtype("uint8")).name])

    def create_execution_context(self):
        return None if self.changes.get("out_of_memory") else Context(self)


class Context:
    """trt.IExecutionContext: shapes are refused outside of the profile, and so is an inference without addresses."""

    def __init__(self, engine):
        self.engine, self.profile, self.shapes, self.addresses = engine, 0, {}, {}
        options = ort.SessionOptions()
        options.log_severity_level = 4
        self.session = ort.InferenceSession(engine.path, options, providers=["CPUExecutionProvider"])

    def set_optimization_profile_async(self, index, stream):
        self.engine.seen.profiles.append(index)
        self.engine.seen.streams.add(stream)
        self.profile, self.shapes = index, {}
        return True

    def set_input_shape(self, name, shape):
        smallest, _, largest = self.engine.record.profiles[self.profile][name]
        self.shapes[name] = shape
        return all(low <= side <= high for low, side, high in zip(smallest, shape, largest, strict=True))

    def get_tensor_shape(self, name):
        images = next(iter(self.shapes.values()))[0]
        proposals = self.shapes.get("boxes_t", (0, 0))[1]
        sides = self.engine.sides[name]
        return [
            side if isinstance(side, int) else (images, proposals)[axis] for axis, side in enumerate(sides)
        ]

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        engine = self.engine
        engine.seen.streams.add(stream)
        if set(self.addresses) != set(engine.modes):
            return False
        inputs = {}
        for name, shape in self.shapes.items():
            array = self._array(name, shape).copy()
            # The engine of a step reads (B, h, w, C) where its graph reads (B, C, h, w).
            inputs[name] = array.transpose(0, 3, 1, 2) if name in engine.record.channels_last else array
        names = [name for name, mode in engine.modes.items() if mode == "output"]
        for name, value in zip(names, self.session.run(names, inputs), strict=True):
            value = value.transpose(0, 2, 3, 1) if name in engine.record.channels_last else value
            self._array(name, value.shape)[...] = value
        return True

    def _array(self, name, shape):
        dtype = self.engine.dtypes[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.addresses[name]))
            .view(dtype)
            .reshape(shape)
        )
