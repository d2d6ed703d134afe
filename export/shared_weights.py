"""One file of weights for PyTorch and for every graph: graphs point at the bytes inside weights.safetensors.

A bundle holds a dozen graphs of one network. ONNX lets a tensor lie in another file, at an offset (external data);
a .safetensors file is a header and then the plain bytes of each tensor (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import NamedTuple

import onnx
from onnx.external_data_helper import set_external_data

# A pointer costs about 100 bytes.
SMALLEST_SHARED = 1024


class _Place(NamedTuple):
    offset: int
    length: int


def point_into(graph: onnx.ModelProto, weights: Path) -> int:
    """Let every initializer whose bytes lie in the file point there; returns how many bytes that saved.

    The graph must then be saved beside the file. What was transposed or cut on export keeps its own bytes.
    """
    places, saved = _places(weights), 0
    for initializer in graph.graph.initializer:
        content = initializer.raw_data
        place = places.get(hashlib.sha256(content).digest())
        if place is None:
            continue
        set_external_data(initializer, weights.name, place.offset, place.length)
        initializer.ClearField("raw_data")
        saved += len(content)
    return saved


def _places(weights: Path) -> dict[bytes, _Place]:
    """SHA-256 of each tensor's bytes -> where they lie in the file."""
    content = weights.read_bytes()
    (header_length,) = struct.unpack_from("<Q", content)
    start = 8 + header_length
    places = {}
    for name, entry in json.loads(content[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if last - first >= SMALLEST_SHARED:
            digest = hashlib.sha256(content[start + first : start + last]).digest()
            places[digest] = _Place(start + first, last - first)
    return places
