"""Pictures to calibrate with, and parts of graphs to check errors on."""

import numpy as np
import onnx
from conftest import BLUE, RED, scene


def pictures(count, height=128, width=192):
    """Canvases with noise, edges and people in them."""
    rng = np.random.default_rng(3)
    people = ((20, 30, 40, 90), RED), ((90, 20, 115, 110), BLUE)
    made = [scene(people, width, height) for _ in range(count)]
    return [np.clip(image + rng.normal(0, 25, image.shape), 0, 255).astype(np.uint8) for image in made]


def prefix(model, outputs):
    """The part of a model that the outputs need."""
    makers = {name: node for node in model.graph.node for name in node.output}
    needed, to_visit = set(), list(outputs)
    while to_visit:
        node = makers.get(to_visit.pop())
        if node is not None and id(node) not in needed:
            needed.add(id(node))
            to_visit += node.input
    nodes = [node for node in model.graph.node if id(node) in needed]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = onnx.helper.make_graph(nodes, "prefix", model.graph.input, made, model.graph.initializer)
    return onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
