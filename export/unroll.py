"""One graph for a whole detection: the backbone and K denoising steps, laid out one after the other.

For servers that cannot loop (Triton's TensorRT backend, trtexec). Never an ONNX Loop: a CUDA graph cannot capture
one. The steps share their weights, and what depends on the image alone is there once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx
from onnx import helper

from ..models.sampling import FEATURES

INPUTS = ("image", "boxes_T", "emb_T")
OUTPUTS = ("boxes_xyxy", "scores", "embeddings")

# What a step makes of the state, and the names that the state starts under.
STATE_AFTER = {"boxes_t": "boxes_next", "emb_t": "emb_next"}
STATE_AT_START = {"boxes_t": "boxes_T", "emb_t": "emb_T"}


def unroll(backbone: onnx.ModelProto, step: onnx.ModelProto, grid: Sequence[int]) -> onnx.ModelProto:
    """Image, boxes_T, emb_T -> boxes_xyxy, scores, embeddings after the K timesteps of a grid.

    grid: descending; the step after the last goes to -1. B and N stay dynamic. Both graphs are left as they are.
    """
    keep = {name: name for name in ("image", *FEATURES)}
    weights = [
        *_prefixed(backbone.graph.initializer, "backbone/"),
        *_prefixed(step.graph.initializer, "step/"),
    ]
    nodes = list(_renamed(backbone.graph.node, keep, "backbone/"))
    once, repeated = _split(step)
    nodes += _renamed(once, keep, "step/")
    shared = keep | {name: f"step/{name}" for name in _made(once, step)}
    state = STATE_AT_START
    for k, (t, t_next) in enumerate(zip(grid, [*grid[1:], -1], strict=True)):
        prefix = f"step{k}/"
        nodes += _times(prefix, t, t_next)
        names = shared | state
        if k == len(grid) - 1:
            names |= {name: name for name in OUTPUTS}
        nodes += _renamed(repeated, names, prefix)
        state = {name: prefix + after for name, after in STATE_AFTER.items()}
    nodes = _needed(nodes, OUTPUTS)
    read = {name for node in nodes for name in node.input}
    weights = [tensor for tensor in weights if tensor.name in read]
    graph = helper.make_graph(nodes, f"e2e_k{len(grid)}", _inputs(backbone, step), _outputs(step), weights)
    return helper.make_model(
        graph, opset_imports=step.opset_import, ir_version=step.ir_version, functions=step.functions
    )


def _times(prefix: str, t: int, t_next: int) -> list[onnx.NodeProto]:
    """One number for all images of a batch: what is made of it alone is worked out when the graph is loaded."""
    return [
        helper.make_node("Constant", [], [f"{prefix}{name}"], value_ints=[value])
        for name, value in (("t", t), ("t_next", t_next))
    ]


def _split(step: onnx.ModelProto) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto]]:
    """The nodes that depend on the image and the weights alone, and those to repeat at each step."""
    changing = {value.name for value in step.graph.input} - set(FEATURES)
    once, repeated = [], []
    for node in step.graph.node:
        if changing.isdisjoint(node.input):
            once.append(node)
        else:
            repeated.append(_sized_by_boxes(node))
            changing.update(node.output)
    return once, repeated


def _sized_by_boxes(node: onnx.NodeProto) -> onnx.NodeProto:
    """Tracing may ask t for the number of images; in the unrolled graph t is one number, boxes_t knows."""
    if node.op_type != "Shape" or node.input[0] not in ("t", "t_next"):
        return node
    return helper.make_node("Shape", ["boxes_t"], list(node.output), name=node.name, start=0, end=1)


def _made(nodes: Iterable[onnx.NodeProto], step: onnx.ModelProto) -> set[str]:
    weights = {tensor.name for tensor in step.graph.initializer}
    return weights | {name for node in nodes for name in node.output}


def _prefixed(tensors: Iterable[onnx.TensorProto], prefix: str) -> Iterable[onnx.TensorProto]:
    for tensor in tensors:
        renamed = onnx.TensorProto()
        renamed.CopyFrom(tensor)
        renamed.name = prefix + tensor.name
        yield renamed


def _renamed(
    nodes: Iterable[onnx.NodeProto], names: Mapping[str, str], prefix: str
) -> Iterable[onnx.NodeProto]:
    """Copies of nodes whose values are called as in `names`, and with a prefix where they are not in there."""
    for node in nodes:
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        renamed.name = prefix + (node.name or node.output[0])
        for values in (renamed.input, renamed.output):
            # An input that is left out has no name.
            values[:] = [names.get(name, prefix + name) if name else "" for name in values]
        yield renamed


def _needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Without the nodes that no output depends on: the scores of all steps but the last, and the like."""
    wanted, kept = set(outputs), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def _inputs(backbone: onnx.ModelProto, step: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    state = [_called(_find(step.graph.input, name), start) for name, start in STATE_AT_START.items()]
    return [*backbone.graph.input, *state]


def _outputs(step: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    return [_find(step.graph.output, name) for name in OUTPUTS]


def _find(values: Iterable[onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    return next(value for value in values if value.name == name)


def _called(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    renamed = onnx.ValueInfoProto()
    renamed.CopyFrom(value)
    renamed.name = name
    return renamed
