"""Plugins that TensorRT can build with but not run: names, fields, types and shapes of the real ones, in Python.

The real library needs TensorRT's headers; these let every machine with tensorrt-rtx see how a graph with psdiff's
nodes becomes an engine. Their rules repeat kernels/csrc/plugin_logic.h, which tests/test_plugin.py pins.
"""

import numpy as np
import tensorrt_rtx as trt

TOKENS = 49


class StandIn(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
    """What both have in common: one output, row-major tensors, nothing to run."""

    def __init__(self, fields):
        for part in (
            trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime,
        ):  # fmt: skip
            part.__init__(self)
        self.plugin_name, self.plugin_version, self.plugin_namespace = self.NAME, "1", ""
        self.num_outputs = 1
        self.fields = fields

    def get_capability_interface(self, kind):
        return self

    def get_output_data_types(self, input_types):
        return [input_types[0]]

    def supports_format_combination(self, position, tensors, num_inputs):
        description = tensors[position].desc
        if description.format != trt.TensorFormat.LINEAR:
            return False
        if position in self.ALWAYS_FLOAT32:
            return description.type == trt.float32
        if position == 0:
            return description.type in (trt.float32, trt.float16, trt.bfloat16)
        return description.type == tensors[0].desc.type

    def configure_plugin(self, inputs, outputs):
        pass

    def get_valid_tactics(self):
        return [1]

    def set_tactic(self, tactic):
        pass

    def on_shape_change(self, inputs, outputs):
        pass

    def get_workspace_size(self, inputs, outputs):
        return 0

    def get_fields_to_serialize(self):
        return trt.PluginFieldCollection(
            [
                trt.PluginField(name, np.array([value], dtype), kind)
                for name, (value, dtype, kind) in self.fields.items()
            ]
        )

    def attach_to_context(self, context):
        return self.clone()

    def clone(self):
        return type(self)(dict(self.fields))


class RoiAlign(StandIn):
    NAME = "PSRoiAlignCL"
    ALWAYS_FLOAT32 = (4,)

    def get_output_shapes(self, inputs, shape_inputs, builder):
        images, proposals = inputs[4][0], inputs[4][1]
        shape = trt.DimsExprs(3)
        shape[0] = builder.operation(trt.DimensionOperation.PROD, images, proposals)
        shape[1] = builder.constant(TOKENS)
        shape[2] = inputs[0][3]
        return [shape]


class DynamicConv(StandIn):
    NAME = "PSDynamicConv"
    ALWAYS_FLOAT32 = (2, 3, 4, 5)

    def get_output_shapes(self, inputs, shape_inputs, builder):
        return [trt.DimsExprs(inputs[0])]


INT32, FLOAT32 = (np.int32, trt.PluginFieldType.INT32), (np.float32, trt.PluginFieldType.FLOAT32)
FIELDS = {
    RoiAlign: {"sampling_ratio": INT32, "canonical_size": FLOAT32},
    DynamicConv: {"epsilon": FLOAT32, "mean_only": INT32},
}


class Creator(trt.IPluginCreatorV3One):
    """Makes stand-ins, and remembers the fields that each node brought."""

    def __init__(self, plugin):
        super().__init__()
        self.plugin, self.seen = plugin, []
        self.name, self.plugin_namespace, self.plugin_version = plugin.NAME, "", "1"
        self.field_names = trt.PluginFieldCollection(
            [
                trt.PluginField(name, np.array([], dtype), kind)
                for name, (dtype, kind) in FIELDS[plugin].items()
            ]
        )

    def create_plugin(self, name, fields, phase):
        values = {field.name: field.data[0] for field in fields if len(field.data)}
        self.seen.append(values)
        known = FIELDS[self.plugin]
        return self.plugin({key: (value, *known[key]) for key, value in values.items()})


def register():
    """Register both with TensorRT; returns their creators, which must outlive every engine build."""
    registry = trt.get_plugin_registry()
    creators = {plugin.NAME: Creator(plugin) for plugin in FIELDS}
    for creator in creators.values():
        assert registry.register_creator(creator, "")
    return creators
