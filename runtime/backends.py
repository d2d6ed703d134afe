"""Names of what computes; apart from the engines, so that a file or an option is checked without loading one."""

from __future__ import annotations

# What computes on this machine; TRITON is asked over the network.
BACKENDS = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bf16", "tensorrt")
# Those that compute in 8 bits, where a bundle has the graphs for it.
INT8_BACKENDS = ("onnxruntime-int8",)
TRITON = "triton"
DEFAULT_SERVER = "localhost:8001"
