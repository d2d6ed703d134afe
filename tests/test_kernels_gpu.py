"""The CUDA kernels on a GPU: as exact as PyTorch, captured, sanitised. Skipped where there is no GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import kernel_cases as cases
import pytest
import test_kernels_frame as frame_tests
import torch
from psdiff.kernels import frame_ops, ops
from psdiff.kernels.reference import multilevel_roi_align
from psdiff.models.config import load_preset
from psdiff.models.person_search import PSDiff

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif(not ops.has_cuda_kernels(), reason="psdiff.kernels._C is not built: make test-gpu"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [(96, 8), (128, 8), (128, 64), (256, 8), (256, 64)]


def errors(ours, own, exact, dtype):
    """(error of the kernel, twice that of PyTorch)."""
    return (ours.cpu().double() - exact).abs().max().item(), 2 * cases.own_error(own.cpu(), exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("count", [0, 1, 3, 300])
def test_roi_align_is_as_exact_as_pytorch(dtype, ratio, count):
    levels, boxes = cases.pyramid(2, 40, dtype=dtype), cases.boxes_of_all_sizes(2, count)
    tokens = ops.multilevel_roi_align_op([x.cuda() for x in levels], boxes.cuda(), 7, ratio, 224.0)
    assert tokens.shape == (2 * count, 49, 40)
    settings = {"pool_size": 7, "sampling_ratio": ratio, "canonical_size": 224.0}
    maps = [level.permute(0, 3, 1, 2) for level in levels]
    exact = multilevel_roi_align([x.double() for x in maps], boxes.double(), **settings)
    own = multilevel_roi_align([x.cuda() for x in maps], boxes.cuda(), **settings)
    if count:
        error, bound = errors(tokens, own, exact, dtype)
        assert error <= bound


@pytest.mark.parametrize("ratio", [1, 2])
def test_the_gradient_of_roi_align_is_that_of_the_cpu(ratio):
    levels, boxes = cases.pyramid(2, 8), cases.boxes_of_all_sizes(2, 50)
    upstream = torch.randn(100, 49, 8, generator=torch.Generator().manual_seed(3))
    grads = []
    for device in ("cpu", "cuda"):
        maps = [level.to(device).requires_grad_() for level in levels]
        ops.multilevel_roi_align_op(maps, boxes.to(device), 7, ratio, 224.0).backward(upstream.to(device))
        grads.append([level.grad.cpu() for level in maps])
    for got, wanted in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("channels", "width"), SIZES)
@pytest.mark.parametrize("regions", [0, 1, 3, 300])
def test_dynamic_conv_is_as_exact_as_pytorch(dtype, channels, width, regions):
    tokens, params, norm1, norm2 = inputs = cases.conv_inputs(channels, width, regions, dtype)
    on_gpu = [x.cuda() for x in (tokens, params, *norm1, *norm2)]
    out = ops.dynamic_conv_op(*on_gpu, cases.EPSILON)
    assert out.shape == tokens.shape
    if regions:
        own = cases.conv_in(dtype, (*on_gpu[:2], on_gpu[2:4], on_gpu[4:]))
        error, bound = errors(out, own, cases.conv_in(torch.float64, inputs), dtype)
        assert error <= bound


def test_the_network_runs_the_kernels():
    """Through the public calls, in half precision and channels last, as a detector does."""
    maps = [level.permute(0, 3, 1, 2).cuda() for level in cases.pyramid(1, 96, dtype=torch.float16)]
    boxes = cases.boxes_of_all_sizes(1, 20).cuda()
    settings = {"pool_size": 7, "sampling_ratio": 1, "canonical_size": 112.0}
    tokens, wanted = (
        pool(maps, boxes, **settings) for pool in (ops.multilevel_roi_align, multilevel_roi_align)
    )
    torch.testing.assert_close(tokens, wanted, atol=2e-3, rtol=2e-3)
    assert "CUDA kernels" in ops.implementation("cuda")


def test_both_operators_pass_opcheck_on_the_gpu():
    maps = [level.cuda() for level in cases.pyramid(2, 8, height=16, width=16)]
    torch.library.opcheck(
        ops.multilevel_roi_align_op, (maps, cases.boxes_of_all_sizes(2, 5).cuda(), 7, 2, 112.0)
    )
    tokens, params, norm1, norm2 = cases.conv_inputs(96, 8, 3, torch.float32)
    arguments = [x.cuda() for x in (tokens, params, *norm1, *norm2)]
    torch.library.opcheck(ops.dynamic_conv_op, (*arguments, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ddim_step_and_the_letterbox_are_those_of_the_cpu(dtype):
    state, heads, levels = frame_tests.step_inputs(150, 256, dtype)
    arguments = (*state, *heads, levels)
    wanted = frame_ops.ddim_step_op(*arguments, 2.0, 3.0)
    found = frame_ops.ddim_step_op(*(x.cuda() for x in arguments), 2.0, 3.0)
    for got, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), value, rtol=1e-5, atol=1e-5)
    frame = torch.from_numpy(frame_tests.picture(1080, 1920))
    canvas, wanted = (frame_ops.letterbox_op(x, 640, 384).cpu().int() for x in (frame.cuda(), frame))
    assert (canvas - wanted).abs().max() <= 1


def test_a_captured_graph_gives_what_the_call_gave():
    tokens, params, norm1, norm2 = cases.conv_inputs(256, 64, 300, torch.float16)
    arguments = [x.cuda() for x in (tokens, params, *norm1, *norm2)]
    wanted = ops.dynamic_conv_op(*arguments, 1e-5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.dynamic_conv_op(*arguments, 1e-5)
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, wanted)


@torch.inference_mode()
def test_a_whole_denoising_step_is_captured():
    config = load_preset("psdiff_mobile").model_copy(update={"height": 96, "width": 160, "num_proposals": 8})
    model = PSDiff(config).eval().cuda()
    features = model.backbone(torch.zeros(2, 96, 160, 3, dtype=torch.uint8, device="cuda"))
    state = torch.randn(2, 8, 4, device="cuda"), torch.randn(2, 8, config.embedding_dim, device="cuda")
    times = torch.full((2,), 999, device="cuda"), torch.full((2,), -1, device="cuda")
    wanted = model.denoise_step(features, *state, *times)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.denoise_step(features, *state, *times)
    graph.replay()
    torch.cuda.synchronize()
    for got, value in zip(captured, wanted, strict=True):
        torch.testing.assert_close(got, value)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, lambda maps: maps[:3], "maps must be 4 tensors, p2 to p5, got 3"),
        (
            0,
            lambda maps: [x.double() for x in maps],
            "maps[0] must be float32, float16 or bfloat16, got Double",
        ),
        (0, lambda maps: [x[..., :7].contiguous() for x in maps], "channels must be a multiple of 4, got 7"),
        (0, lambda maps: [x.transpose(1, 2) for x in maps], "maps[0] must be contiguous"),
        (1, lambda boxes: boxes.cpu(), "boxes_xyxy must be on cuda"),
        (1, lambda boxes: boxes.half(), "boxes_xyxy must be Float, got Half"),
        (1, lambda boxes: boxes[:1], "boxes_xyxy must be of shape [2, 5, 4], got [1, 5, 4]"),
        (
            1,
            lambda boxes: boxes.repeat(1, 200000, 1),
            "boxes_xyxy must hold at most 1048576 regions, got 2000000",
        ),
        (2, lambda size: 5, "pool_size must be 7, got 5"),
        (3, lambda ratio: 3, "sampling_ratio must be 1 or 2, got 3"),
    ],
)
def test_the_extension_names_what_is_wrong(position, value, message):
    arguments = [
        [level.cuda() for level in cases.pyramid(2, 8, height=16, width=16)],
        cases.boxes_of_all_sizes(2, 5).cuda(),
        7,
        2,
        112.0,
    ]
    arguments[position] = value(arguments[position])
    # Below the operator, whose dispatcher refuses tensors of two devices in words of its own.
    with pytest.raises(ValueError, match=re.escape(message)):
        ops._cuda.roi_align(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_the_sanitizer_finds_nothing(tool):
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is missing: it comes with the CUDA toolkit")
    script = Path(__file__).parent / "host_gpu" / "run_on_gpu.py"
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "every kernel ran" in done.stdout
