"""A PyTorch module as an ONNX graph: the one place that calls torch.onnx.export."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

OPSET = 20


def to_onnx(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    dynamic_shapes: tuple[Any, ...],
    translations: Mapping[Any, Callable[..., Any]] | None = None,
) -> onnx.ModelProto:
    """Trace a module. inputs: examples; a size that is to stay free must be neither 0 nor 1 in them.

    dynamic_shapes: per input {axis: torch.export.Dim}, or None. translations: how custom operations are written.
    """
    with warnings.catch_warnings():
        # The exporter warns of its own deprecated calls; nothing a user could act on.
        warnings.simplefilter("ignore")
        for name in ("torch.onnx", "onnxscript"):
            logging.getLogger(name).setLevel(logging.ERROR)
        program = torch.onnx.export(
            module.eval(),
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=dict(translations or {}),
            verbose=False,
        )
    assert program is not None
    return _without_notes(program.model_proto)


def _without_notes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Drop the stack traces that the exporter pins to every node: two thirds of a graph without its weights."""
    for noted in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.functions):
        del noted.metadata_props[:]
    for node in model.graph.node:
        node.doc_string = ""
    return model
