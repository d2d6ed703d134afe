"""The TensorRT plugins: every rule of kernels/csrc/plugin_logic.h, compiled by g++, against hand-written answers.

With TENSORRT_INCLUDE (the folder of NvInferRuntime.h) and nvcc the plugin library itself is built, and called as
TensorRT calls it; no kernel is started, so that needs no GPU.
"""

import ctypes
import os
import re
import shutil
import subprocess

import pytest
from kernels_on_host import CSRC, HOST, missing_compiler
from psdiff.kernels.launches import DeviceArray, dynamic_conv_launch, roi_align_launch

ROI_ALIGN, DYNAMIC_CONV = 0, 1
F32, F16, BF16, OTHER = range(4)
DTYPES = {F32: "f32", F16: "f16", BF16: "bf16"}
INT32, FLOAT32, ANOTHER = range(3)
SOURCE = HOST / "plugin_logic_test.cpp"
UNKNOWN = -1


def run(command, timeout=500):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{command}\n{done.stderr[-3000:]}"
    return done.stdout


def text_functions(path):
    """A library whose functions answer with text, raising what they refuse."""
    library = ctypes.CDLL(str(path))

    def call(name, *arguments):
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        answer = function(*arguments).decode()
        if answer.startswith("refused: "):
            raise ValueError(answer.removeprefix("refused: "))
        return answer

    return call


@pytest.fixture(scope="module")
def logic(tmp_path_factory):
    if missing_compiler():
        pytest.skip(missing_compiler())
    path = tmp_path_factory.mktemp("plugin") / "plugin_logic.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    run(["g++", *flags, "-I", CSRC, SOURCE, "-o", path])
    return text_functions(path)


def int32s(values):
    return (ctypes.c_int * len(values))(*values)


def in_c(shapes):
    """Shapes as (ranks, sizes)."""
    sizes = [size for shape in shapes for size in shape]
    return int32s([len(shape) for shape in shapes]), (ctypes.c_int64 * len(sizes))(*sizes)


def pyramid(batch=2, boxes=5, channels=64, height=16, width=20):
    """The five inputs of PSRoiAlignCL."""
    levels = [(batch, height >> k, width >> k, channels) for k in range(4)]
    return [*levels, (batch, boxes, 4)]


def regions(count=300, channels=256, width=64):
    """The six inputs of PSDynamicConv."""
    return [
        (count, 49, channels),
        (count, 2 * channels * width),
        (width,),
        (width,),
        (channels,),
        (channels,),
    ]


def replaced(shapes, position, shape):
    return [shape if place == position else old for place, old in enumerate(shapes)]


# ---- names ----


def test_names_inputs_and_fields_are_those_of_the_exported_nodes(logic):
    assert logic("describe", ROI_ALIGN).split("|") == [
        "PSRoiAlignCL",
        "1",
        "",
        "p2 p3 p4 p5 boxes_xyxy ",
        "sampling_ratio:int32 canonical_size:float32 ",
    ]
    assert logic("describe", DYNAMIC_CONV).split("|") == [
        "PSDynamicConv",
        "1",
        "",
        "tokens params weight1 bias1 weight2 bias2 ",
        "epsilon:float32 mean_only:int32 ",
    ]


def test_the_sizes_of_the_plugin_are_those_of_the_kernels(logic):
    source = (CSRC / "entries.cu").read_text(encoding="utf-8")
    [line] = [
        line for line in source.splitlines() if re.match(r"#define PSD_EACH_DYNAMIC_CONV\(X\) X\(\d", line)
    ]
    built = re.findall(r"X\((\d+), (\d+)\)", line)
    assert built == [tuple(size.split(",")) for size in logic("conv_sizes").split()]


# ---- types ----


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(
    ("op", "always_f32"), [(ROI_ALIGN, (4,)), (DYNAMIC_CONV, (2, 3, 4, 5))], ids=["roi_align", "dynamic_conv"]
)
def test_tensors_share_one_type_but_boxes_and_norms_are_fp32(logic, op, always_f32, dtype):
    inputs = 5 if op == ROI_ALIGN else 6
    good = [F32 if position in always_f32 else dtype for position in range(inputs)] + [dtype]
    for position in range(inputs + 1):
        for offered in range(4):
            types = int32s([*good[:position], offered])
            is_right = offered != OTHER if position == 0 else offered == good[position]
            assert logic("takes", op, position, types, 1) == ("yes" if is_right else "no"), (
                position,
                offered,
            )
        assert logic("takes", op, position, int32s(good), 0) == "no", "only row-major tensors are taken"
    assert logic("takes", op, inputs + 1, int32s([*good, dtype]), 1) == "no"


@pytest.mark.parametrize(
    ("op", "types", "message"),
    [
        (ROI_ALIGN, [OTHER, F16, F16, F16, F32], "p2 must be fp32, fp16 or bf16, got another type"),
        (ROI_ALIGN, [F16, F16, BF16, F16, F32], "p4 must be fp16, got bf16"),
        (ROI_ALIGN, [F16, F16, F16, F16, F16], "boxes_xyxy must be fp32, got fp16"),
        (ROI_ALIGN, [F16] * 4, "inputs of PSRoiAlignCL must be 5, got 4"),
        (DYNAMIC_CONV, [BF16, F32, F32, F32, F32, F32], "params must be bf16, got fp32"),
        (DYNAMIC_CONV, [F16, F16, F32, F32, F16, F32], "weight2 must be fp32, got fp16"),
    ],
)
def test_a_wrong_type_is_named(logic, op, types, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        logic("type_of_output", op, int32s(types), len(types))


@pytest.mark.parametrize(("dtype", "name"), [(F32, "fp32"), (F16, "fp16"), (BF16, "bf16")])
def test_the_output_has_the_type_of_the_first_input(logic, dtype, name):
    assert logic("type_of_output", ROI_ALIGN, int32s([dtype] * 4 + [F32]), 5) == name
    assert logic("type_of_output", DYNAMIC_CONV, int32s([dtype] * 2 + [F32] * 4), 6) == name


# ---- fields ----


def round_trip(logic, op, *fields):
    """Read fields of (name, kind, ctypes value), write them as a plan does, read them again: name -> text."""
    names = (ctypes.c_char_p * len(fields))(*[name.encode() for name, _, _ in fields])
    data = (ctypes.c_void_p * len(fields))(*[ctypes.addressof(value) for _, _, value in fields])
    counts = int32s([getattr(value, "_length_", 1) for _, _, value in fields])
    text = logic("round_trip", op, len(fields), names, int32s([kind for _, kind, _ in fields]), data, counts)
    return dict(pair.split("=") for pair in text.split())


def number(value):
    return ctypes.c_int32(value) if isinstance(value, int) else ctypes.c_float(value)


def test_fields_that_a_node_leaves_out_keep_their_defaults(logic):
    assert round_trip(logic, ROI_ALIGN) == {"sampling_ratio": "2", "canonical_size": "224"}
    settings = round_trip(logic, DYNAMIC_CONV)
    assert settings["mean_only"] == "0"
    assert float(settings["epsilon"]) == pytest.approx(1e-5, rel=1e-6)


def test_fields_survive_a_plan_in_any_order(logic):
    fields = [("canonical_size", FLOAT32, number(96.5)), ("sampling_ratio", INT32, number(1))]
    assert round_trip(logic, ROI_ALIGN, *fields) == {"sampling_ratio": "1", "canonical_size": "96.5"}
    fields = [("mean_only", INT32, number(1)), ("epsilon", FLOAT32, number(0.25))]
    assert round_trip(logic, DYNAMIC_CONV, *fields) == {"epsilon": "0.25", "mean_only": "1"}


@pytest.mark.parametrize(
    ("op", "name", "kind", "value", "message"),
    [
        (ROI_ALIGN, "sampling_ratio", INT32, 3, "sampling_ratio must be 1 or 2, got 3"),
        (ROI_ALIGN, "sampling_ratio", INT32, 0, "sampling_ratio must be 1 or 2, got 0"),
        (ROI_ALIGN, "sampling_ratio", FLOAT32, 2.0, "sampling_ratio must be one int32, got another type"),
        (ROI_ALIGN, "canonical_size", FLOAT32, 0.0, "canonical_size must be a number above 0, got 0"),
        (
            ROI_ALIGN,
            "canonical_size",
            FLOAT32,
            float("nan"),
            "canonical_size must be a number above 0, got nan",
        ),
        (
            ROI_ALIGN,
            "canonical_size",
            FLOAT32,
            float("inf"),
            "canonical_size must be a number above 0, got inf",
        ),
        (ROI_ALIGN, "canonical_size", ANOTHER, 224.0, "canonical_size must be one float32, got another type"),
        (
            ROI_ALIGN,
            "epsilon",
            FLOAT32,
            1.0,
            "field of PSRoiAlignCL must be sampling_ratio or canonical_size, got epsilon",
        ),
        (DYNAMIC_CONV, "epsilon", FLOAT32, -1.0, "epsilon must be a number above 0, got -1"),
        (DYNAMIC_CONV, "mean_only", INT32, 2, "mean_only must be 0 or 1, got 2"),
    ],
)
def test_a_wrong_field_is_named(logic, op, name, kind, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        round_trip(logic, op, (name, kind, number(value)))


def test_a_field_of_several_values_is_refused(logic):
    with pytest.raises(ValueError, match="sampling_ratio must be one int32, got 2 values"):
        round_trip(logic, ROI_ALIGN, ("sampling_ratio", INT32, (ctypes.c_int32 * 2)(1, 1)))


# ---- shapes ----


@pytest.mark.parametrize(
    ("op", "mean_only", "shapes", "answer"),
    [
        (ROI_ALIGN, 0, pyramid(), "boxes_xyxy[0]*boxes_xyxy[1], 49, p2[3]|10, 49, 64"),
        (DYNAMIC_CONV, 0, regions(), "tokens[0], 49, tokens[2]|300, 49, 256"),
        (DYNAMIC_CONV, 1, regions(7, 128, 8), "tokens[0], tokens[2]|7, 128"),
    ],
)
def test_the_shape_of_the_output_follows_from_the_inputs(logic, op, mean_only, shapes, answer):
    assert logic("shape_of_output", op, mean_only, *in_c(shapes)) == answer


def test_sizes_may_be_unknown_while_an_engine_is_built(logic):
    levels = pyramid(UNKNOWN, UNKNOWN)
    answer = logic("shape_of_output", ROI_ALIGN, 0, *in_c(levels))
    assert answer.startswith("boxes_xyxy[0]*boxes_xyxy[1], 49, p2[3]|")
    everything = [tuple(UNKNOWN for _ in shape) for shape in levels]
    logic("shape_of_output", ROI_ALIGN, 0, *in_c(everything))
    tokens = replaced(replaced(regions(), 0, (UNKNOWN, 49, 256)), 1, (UNKNOWN, 32768))
    logic("shape_of_output", DYNAMIC_CONV, 0, *in_c(tokens))
    with pytest.raises(ValueError, match=re.escape("p2 must be of known sizes, got (?, 16, 20, 64)")):
        logic("launch", ROI_ALIGN, 2, F16, *in_c(levels))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (replaced(pyramid(), 0, (2, 16, 64)), "p2 must be of 4 dimensions, got (2, 16, 64)"),
        (replaced(pyramid(), 1, (2, 8, 10, 32)), "p3 must be of shape (2, 8, 10, 64), got (2, 8, 10, 32)"),
        (replaced(pyramid(), 3, (1, 2, 2, 64)), "p5 must be of shape (2, 2, 2, 64), got (1, 2, 2, 64)"),
        (replaced(pyramid(), 2, (2, 0, 5, 64)), "p4 must be of 1 to 2147483647 cells, got (2, 0, 5, 64)"),
        (
            replaced(pyramid(), 0, (2, 65536, 32768, 64)),
            "p2 must be of 1 to 2147483647 cells, got (2, 65536, 32768, 64)",
        ),
        (pyramid(channels=60), "channels must be a multiple of 8 in fp16, got 60"),
        (pyramid(channels=0), "channels must be a multiple of 8 in fp16, got 0"),
        (replaced(pyramid(), 4, (2, 5, 5)), "boxes_xyxy must be of shape (2, 5, 4), got (2, 5, 5)"),
        (replaced(pyramid(), 4, (3, 5, 4)), "boxes_xyxy must be of shape (2, 5, 4), got (3, 5, 4)"),
        (pyramid(boxes=2**19 + 1), "boxes_xyxy must be of at most 1048576 regions, got 1048578"),
        (pyramid(boxes=2**62), f"boxes_xyxy must be of at most 1048576 regions, got {2**62}"),
    ],
)
def test_a_wrong_shape_for_roi_align_is_named(logic, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        logic("launch", ROI_ALIGN, 2, F16, *in_c(shapes))


SIZES = "(96, 8) or (128, 8) or (128, 64) or (256, 8) or (256, 64)"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            replaced(regions(), 0, (300, 64, 256)),
            "tokens must be of shape (300, 49, 256), got (300, 64, 256)",
        ),
        (replaced(regions(), 1, (299, 32768)), "params must be of shape (300, 32768), got (299, 32768)"),
        (replaced(regions(), 1, (300, 32767)), "params must be of shape (300, 32768), got (300, 32767)"),
        (replaced(regions(), 1, (300, 256, 128)), "params must be of 2 dimensions, got (300, 256, 128)"),
        (replaced(regions(), 3, (63,)), "bias1 must be of shape (64), got (63)"),
        (replaced(regions(), 4, (64,)), "weight2 must be of shape (256), got (64)"),
        (replaced(regions(), 5, (255,)), "bias2 must be of shape (256), got (255)"),
        (regions(300, 192, 8), f"(channels, width) must be {SIZES}, got (192, 8)"),
        (regions(300, 96, 64), f"(channels, width) must be {SIZES}, got (96, 64)"),
        (regions(300, UNKNOWN, 16), f"(channels, width) must be {SIZES}, got (?, 16)"),
        (regions(2**20 + 1), "tokens must be of at most 1048576 regions, got 1048577"),
    ],
)
def test_a_wrong_shape_for_the_dynamic_conv_is_named(logic, shapes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        logic("launch", DYNAMIC_CONV, 2, F16, *in_c(shapes))


def test_a_pointer_that_vectors_cannot_load_from_is_refused(logic):
    assert logic("check_aligned", ctypes.c_int64(4096)) == ""
    with pytest.raises(ValueError, match="p2 must be at a multiple of 16 bytes, got 8 bytes behind one"):
        logic("check_aligned", ctypes.c_int64(4104))


# ---- launches: the same as those of kernels.launches, which the kernels are tested with ----


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize(("batch", "boxes", "channels"), [(1, 1, 8), (2, 5, 64), (4, 300, 256), (3, 7, 264)])
def test_roi_align_launches_as_from_python(logic, dtype, ratio, batch, boxes, channels):
    shapes, name = pyramid(batch, boxes, channels), DTYPES[dtype]
    *levels, boxes_xyxy = [DeviceArray(16, shape, name) for shape in shapes[:4]] + [
        DeviceArray(16, shapes[4], "f32")
    ]
    tokens = DeviceArray(16, (batch * boxes, 49, channels), name)
    wanted = roi_align_launch(levels, boxes_xyxy, tokens, sampling_ratio=ratio, canonical_size=224.0)
    assert wanted.grid[2] == 1
    answer = logic("launch", ROI_ALIGN, ratio, dtype, *in_c(shapes))
    assert answer == f"{wanted.entry} {wanted.grid[0]} {wanted.grid[1]} {wanted.threads}"


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize(("channels", "width"), [(96, 8), (128, 8), (128, 64), (256, 8), (256, 64)])
@pytest.mark.parametrize("count", [1, 300])
def test_the_dynamic_conv_launches_as_from_python(logic, dtype, channels, width, count):
    shapes, name = regions(count, channels, width), DTYPES[dtype]
    tokens, params = (DeviceArray(16, shape, name) for shape in shapes[:2])
    weight1, bias1, weight2, bias2 = (DeviceArray(16, shape, "f32") for shape in shapes[2:])
    wanted = dynamic_conv_launch(tokens, params, (weight1, bias1), (weight2, bias2), tokens)
    answer = logic("launch", DYNAMIC_CONV, 2, dtype, *in_c(shapes))
    assert answer == f"{wanted.entry} {wanted.grid[0]} {wanted.grid[1]} {wanted.threads}"


@pytest.mark.parametrize(("batch", "boxes"), [(0, 5), (2, 0)])
def test_nothing_is_launched_where_there_is_no_region(logic, batch, boxes):
    answer = logic("launch", ROI_ALIGN, 2, F16, *in_c(pyramid(batch, boxes)))
    assert answer.split()[1] == "0"
    assert logic("launch", DYNAMIC_CONV, 2, F16, *in_c(regions(0))).split()[1] == "0"


# ---- the library ----


@pytest.mark.slow
def test_the_library_exports_two_functions_links_no_tensorrt_and_serves_its_caller(tmp_path):
    include, nvcc = os.environ.get("TENSORRT_INCLUDE"), shutil.which("nvcc")
    if not include:
        pytest.skip(
            "TENSORRT_INCLUDE is not set: give the folder of NvInferRuntime.h to build the plugin library"
        )
    if not nvcc:
        pytest.skip("nvcc is missing: install the CUDA toolkit to build the plugin library")
    library, caller, exports = (tmp_path / name for name in ("libpsdiff_trt.so", "caller.so", "exports"))
    exports.write_text("{ global: getCreators; setLoggerFinder; local: *; };\n", encoding="utf-8")
    shared = [nvcc, "-std=c++17", "-shared", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    shared += ["-isystem", include, "-I", CSRC]
    target = ["-arch=sm_80", f"-Xlinker=--version-script={exports}", CSRC / "trt_plugin.cu"]
    run([*shared, *target, "-o", library])

    symbols = [line.split()[-1] for line in run(["nm", "-D", "--defined-only", library]).splitlines()]
    assert sorted(symbols) == ["getCreators", "setLoggerFinder"]
    needed = run(["ldd", library])
    assert "nvinfer" not in needed
    assert "cudart" not in needed

    flags = ["-Xcompiler", "-fvisibility=default", "-DPSD_WITH_TENSORRT", SOURCE, "-o", caller]
    run([*shared, *flags])
    assert text_functions(caller)("play_tensorrt", str(library).encode()) == ""
