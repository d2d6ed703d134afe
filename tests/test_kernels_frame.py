"""The kernels around the network, run on the CPU: the DDIM step behind the heads, and the letterbox before it."""

import re

import kernels_on_host as host
import numpy as np
import pytest
import torch
from psdiff.kernels.frame_launches import (
    ddim_step_launch,
    nv12_letterbox_launch,
    placed_size,
    rgb_letterbox_launch,
)
from psdiff.kernels.frame_ops import ddim_step_op, letterbox_op
from psdiff.kernels.launches import DeviceArray
from psdiff.kernels.reference_frame import ddim_step, letterbox, letterbox_nv12
from psdiff.models.denoiser import apply_deltas
from psdiff.models.diffusion import (
    NoiseSchedule,
    boxes_to_signal,
    embeddings_to_signal,
    signal_to_boxes,
)
from psdiff.models.diffusion import ddim_step as models_ddim_step
from psdiff.models.preprocess import Letterbox
from torch.nn import functional as F

SCALES = {"box_scale": 2.0, "embedding_scale": 3.0}
TIMES = (600, 250), (350, -1)


def levels_at(times):
    """Of two images: signal and noise at t, as the schedule gives them, and those at t_next."""
    schedule = NoiseSchedule(1000)
    return tuple(schedule.at(torch.tensor(t)) for t in times)


def step_inputs(count, dim, dtype=torch.float32, times=TIMES):
    """state, heads, levels of two images at different timesteps; some boxes and deltas are extreme."""
    generator = torch.Generator().manual_seed(count + dim)

    def normal(*shape):
        return torch.randn(2, count, *shape, generator=generator)

    boxes_t, deltas = 1.5 * normal(4), normal(4)
    boxes_t[:, 0] = torch.tensor([9.0, -9, -9, -9])
    deltas[:, 0] = torch.tensor([3.0, -3, 20, -20])
    here, there = levels_at(times)
    levels = torch.cat([*here, *there], dim=1)[..., 0].contiguous()
    heads = tuple(x.to(dtype) for x in (normal(), deltas, 5 * normal(dim)))
    return (boxes_t, normal(dim)), heads, levels


# Pure noise, half-way, and where the noise at t is least, so that dividing by it counts most.
STEPS = [((999, 999), (998, 749)), TIMES, ((20, 0), (10, -1))]


@pytest.mark.parametrize("times", STEPS)
def test_the_reference_is_the_tail_of_the_network(times):
    state, heads, levels = step_inputs(7, 64, times=times)
    logits, deltas, embeddings = heads
    here, there = levels_at(times)
    boxes = apply_deltas(signal_to_boxes(state[0], 2.0), deltas)
    wanted = (
        models_ddim_step(state[0], boxes_to_signal(boxes, 2.0), here, there),
        models_ddim_step(state[1], embeddings_to_signal(embeddings, 3.0), here, there),
        boxes,
        logits.sigmoid(),
        F.normalize(embeddings, dim=-1),
    )
    for got, value in zip(ddim_step(state, heads, levels, **SCALES), wanted, strict=True):
        assert torch.equal(got, value)


def step_on_host(host_kernels, state, heads, levels, seed=0):
    shapes = [state[0].shape, state[1].shape, state[0].shape, heads[0].shape, state[1].shape]
    outputs = [torch.full(shape, 7.0) for shape in shapes]
    arrays = [tuple(map(host.array, part)) for part in (state, heads, outputs)]
    host_kernels.run(ddim_step_launch(*arrays[:2], host.array(levels), arrays[2], **SCALES), seed)
    return outputs


def check_step(host_kernels, state, heads, levels, seed=0):
    """At most twice the error of PyTorch in float32, output by output; returns the outputs."""
    outputs = step_on_host(host_kernels, state, heads, levels, seed)
    exact, own = (
        ddim_step(
            tuple(x.to(kind) for x in state), tuple(x.to(kind) for x in heads), levels.to(kind), **SCALES
        )
        for kind in (torch.float64, torch.float32)
    )
    for got, truth, plain in zip(outputs, exact, own, strict=True):
        # Deltas of e^20 make boxes of thousands of canvases: errors count relative to the value.
        scale = truth.abs().clamp(min=1)
        error, own_error = ((value - truth).abs() / scale for value in (got, plain))
        # The extreme one comes first; its side of 1e-4 has few digits, which must not excuse the others.
        for part in (slice(1), slice(1, None))[: state[0].shape[1]]:
            assert error[:, part].max() <= 2 * max(own_error[:, part].max().item(), 5e-7)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("count", "dim"), [(1, 64), (3, 256), (300, 64), (5, 100)])
def test_the_ddim_step_is_as_exact_as_pytorch(host_kernels, dtype, count, dim):
    check_step(host_kernels, *step_inputs(count, dim, dtype), seed=7)


@pytest.mark.parametrize("times", STEPS)
def test_the_ddim_step_is_as_exact_at_every_noise(host_kernels, times):
    check_step(host_kernels, *step_inputs(20, 64, times=times))


def test_the_ddim_step_does_not_depend_on_the_schedule(host_kernels):
    inputs = step_inputs(5, 256, torch.float16)
    first, *others = (check_step(host_kernels, *inputs, seed=seed) for seed in (0, 7, 123))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_an_embedding_of_zeros_stays_zero(host_kernels):
    state, (logits, deltas, _), levels = step_inputs(1, 64)
    outputs = step_on_host(host_kernels, state, (logits, deltas, torch.zeros(2, 1, 64)), levels)
    assert not outputs[4].any()
    assert outputs[1].isfinite().all()


def test_what_is_no_number_stays_none(host_kernels):
    nothing = float("nan")
    for part, tensor, index in ((0, 0, 2), (0, 1, 9), (1, 1, 0), (1, 1, 3), (1, 2, 5)):
        state, heads, levels = step_inputs(3, 64)
        (state, heads)[part][tensor][0, 1, index] = nothing
        wanted = ddim_step(state, heads, levels, **SCALES)
        assert any(value.isnan().any() for value in wanted)
        for got, value in zip(step_on_host(host_kernels, state, heads, levels), wanted, strict=True):
            assert torch.equal(got.isnan(), value.isnan())


@pytest.mark.parametrize(
    ("part", "index", "array", "message"),
    [
        (0, 1, DeviceArray(16, (2, 0, 64), "f32"), "emb_t must be of shape (B, N, E) with proposals in it"),
        (0, 1, DeviceArray(16, (2, 5, 66), "f32"), "embedding_dim must be a multiple of 4, got 66"),
        (1, 0, DeviceArray(16, (2, 5), "u8"), "logits must be f32 or f16 or bf16, got u8"),
        (1, 1, DeviceArray(16, (2, 5, 4), "f16"), "deltas must be f32, got f16"),
        (3, 3, DeviceArray(16, (2, 4), "f32"), "scores must be of shape (2, 5), got (2, 4)"),
    ],
)
def test_a_launch_of_the_ddim_step_names_what_is_wrong(part, index, array, message):
    def good(*shape):
        return DeviceArray(16, (2, 5, *shape), "f32")

    arguments = [
        [good(4), good(64)],
        [good(), good(4), good(64)],
        DeviceArray(16, (2, 4), "f32"),
        [good(4), good(64), good(4), good(), good(64)],
    ]
    arguments[part][index] = array
    with pytest.raises(ValueError, match=re.escape(message)):
        ddim_step_launch(*arguments, **SCALES)


@pytest.mark.parametrize("name", SCALES)
def test_a_launch_of_the_ddim_step_refuses_a_scale_of_zero(name):
    array = DeviceArray(16, (2, 5, 64), "f32")
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        ddim_step_launch((array,) * 2, (array,) * 3, array, (array,) * 5, **(SCALES | {name: 0}))


def test_both_are_sound_operators():
    state, heads, levels = step_inputs(3, 64)
    torch.library.opcheck(ddim_step_op, (*state, *heads, levels, 2.0, 3.0))
    frame = torch.from_numpy(picture(31, 45))
    torch.library.opcheck(letterbox_op, (frame, 32, 24))
    wanted = Letterbox(45, 31, 32, 24).image(frame.numpy())
    assert np.abs(letterbox_op(frame, 32, 24).numpy().astype(int) - wanted).max() <= 1


# ---- letterbox ----


def picture(height, width, seed=0):
    """Noise over a slope: every pixel differs from its neighbours."""
    slope = np.linspace(0, 120, width)[None, :, None] + np.linspace(0, 60, height)[:, None, None]
    noise = np.random.default_rng(seed).integers(0, 75, (height, width, 3))
    return (slope + noise).astype(np.uint8)


def on_host(host_kernels, frame, width, height, *, dtype="u8", pitch=None, **settings):
    canvas = torch.zeros(height, width, 3, dtype=host.DTYPES[dtype])
    pixels = torch.from_numpy(frame)
    if pitch is not None:
        rows = torch.zeros(frame.shape[0], pitch, dtype=torch.uint8)
        rows[:, : 3 * frame.shape[1]] = pixels.flatten(1)
        pointer, pixels = rows.data_ptr(), rows
    else:
        pointer = pixels.data_ptr()
    source = DeviceArray(pointer, frame.shape, "u8")
    host_kernels.run(rgb_letterbox_launch(source, host.array(canvas), pitch=pitch, **settings))
    return canvas.numpy()


SIZES = [
    ((360, 640), (160, 96)),
    ((1080, 1920), (64, 40)),
    ((97, 131), (64, 40)),
    ((40, 30), (160, 96)),
    ((96, 160), (160, 96)),
    ((1, 1), (32, 32)),
    ((7, 300), (64, 64)),
]


@pytest.mark.parametrize(("frame", "canvas"), SIZES)
def test_a_frame_lies_on_the_canvas_as_opencv_places_it(host_kernels, frame, canvas):
    image = picture(*frame)
    got = on_host(host_kernels, image, *canvas).astype(int)
    wanted = Letterbox(frame[1], frame[0], *canvas).image(image).astype(int)
    assert np.abs(got - wanted).max() <= 1
    assert np.abs(got - letterbox(image, *canvas)).max() <= 0.502


@pytest.mark.parametrize(("frame", "canvas"), SIZES)
def test_the_placed_size_is_that_of_the_models_letterbox(frame, canvas):
    grey_free = np.full((*frame, 3), 255, np.uint8)
    mask = Letterbox(frame[1], frame[0], *canvas).image(grey_free)[..., 0] == 255
    assert placed_size(frame[1], frame[0], *canvas) == (mask[0].sum(), mask[:, 0].sum())


def test_a_row_may_be_longer_than_its_pixels(host_kernels):
    image = picture(50, 33)
    assert np.array_equal(
        on_host(host_kernels, image, 32, 32, pitch=128), on_host(host_kernels, image, 32, 32)
    )


@pytest.mark.parametrize(("dtype", "error"), [("f32", 1e-5), ("f16", 2e-3)])
def test_a_canvas_may_be_normalised(host_kernels, dtype, error):
    image, mean, std = picture(90, 120), (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    got = on_host(host_kernels, image, 64, 64, dtype=dtype, mean=mean, std=std)
    wanted = (letterbox(image, 64, 64) - mean) / std
    assert np.abs(got - wanted).max() < error


def nv12_on_host(host_kernels, luma, chroma, width, height, *, dtype="u8", **settings):
    canvas = torch.zeros(height, width, 3, dtype=host.DTYPES[dtype])
    planes = [DeviceArray(plane.ctypes.data, plane.shape, "u8") for plane in (luma, chroma)]
    host_kernels.run(nv12_letterbox_launch(*planes, host.array(canvas), **settings))
    return canvas.numpy()


def nv12_picture(height, width):
    """Planes of which no pixel leaves 0..255."""
    rng = np.random.default_rng(1)
    luma = rng.integers(60, 200, (height, width)).astype(np.uint8)
    return luma, rng.integers(110, 146, (-(-height // 2), -(-width // 2), 2)).astype(np.uint8)


@pytest.mark.parametrize(
    ("matrix", "full_range", "yuv", "rgb"),
    [
        ("bt601", False, (235, 128, 128), (255, 255, 255)),
        ("bt601", False, (16, 128, 128), (0, 0, 0)),
        ("bt709", False, (235, 128, 128), (255, 255, 255)),
        ("bt709", False, (16, 128, 128), (0, 0, 0)),
        # Red of 255 in BT.601: Y = 65.481 + 16, Cb = 128 - 37.797, Cr = 128 + 112, rounded.
        ("bt601", False, (81, 90, 240), (254, 0, 0)),
        # Red of 255 in BT.709: Y = 46.56 + 16, Cb = 128 - 25.66, Cr = 240.
        ("bt709", False, (63, 102, 240), (255, 1, 0)),
        ("bt709", True, (255, 128, 128), (255, 255, 255)),
        ("bt601", True, (0, 128, 128), (0, 0, 0)),
        # Full range: R = 100 + 1.5748 * 50, G = 100 - 0.468124 * 50, B = 100.
        ("bt709", True, (100, 128, 178), (179, 77, 100)),
        # Full range: R = 100 + 1.402 * 50, G = 100 - 0.714136 * 50, B = 100.
        ("bt601", True, (100, 128, 178), (170, 64, 100)),
    ],
)
def test_colours_of_nv12_have_the_standards_values(host_kernels, matrix, full_range, yuv, rgb):
    luma = np.full((8, 8), yuv[0], np.uint8)
    chroma = np.tile(np.array(yuv[1:], np.uint8), (4, 4, 1))
    canvas = nv12_on_host(host_kernels, luma, chroma, 8, 8, matrix=matrix, full_range=full_range)
    assert np.abs(canvas.astype(int) - rgb).max() <= 1


def test_nv12_of_an_odd_size_takes_the_chroma_of_each_block(host_kernels):
    luma, chroma = nv12_picture(31, 45)
    rgb = letterbox_nv12(luma, chroma, 45, 31)
    assert rgb.min() > 0
    assert rgb.max() < 255
    # Nothing clamps, so converting each pixel before averaging is the same.
    got = nv12_on_host(host_kernels, luma, chroma, 24, 24)
    assert np.abs(got - letterbox(rgb, 24, 24)).max() < 0.51


@pytest.mark.parametrize(("frame", "canvas"), [*SIZES, ((2, 3), (32, 32))])
@pytest.mark.parametrize("colours", [("bt601", True), ("bt709", False)])
def test_nv12_lies_on_the_canvas_as_the_reference_says(host_kernels, frame, canvas, colours):
    planes, settings = nv12_picture(*frame), dict(zip(("matrix", "full_range"), colours, strict=True))
    wanted = letterbox_nv12(*planes, *canvas, **settings)
    assert np.abs(nv12_on_host(host_kernels, *planes, *canvas, **settings) - wanted).max() < 0.51
    for dtype, error in (("f32", 1e-5), ("f16", 2e-3)):
        mean, std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
        got = nv12_on_host(host_kernels, *planes, *canvas, dtype=dtype, mean=mean, std=std, **settings)
        assert np.abs(got - (wanted - mean) / std).max() < error


def test_nv12_rows_may_be_longer_than_their_pixels(host_kernels):
    luma, chroma = nv12_picture(31, 45)
    wide = np.zeros((31, 64), np.uint8), np.zeros((16, 80), np.uint8)
    wide[0][:, :45], wide[1][:, :46] = luma, chroma.reshape(16, 46)
    planes = [DeviceArray(x.ctypes.data, y.shape, "u8") for x, y in zip(wide, (luma, chroma), strict=True)]
    canvas = torch.zeros(24, 24, 3, dtype=torch.uint8)
    host_kernels.run(nv12_letterbox_launch(*planes, host.array(canvas), pitches=(64, 80)))
    assert np.array_equal(canvas.numpy(), nv12_on_host(host_kernels, luma, chroma, 24, 24))


def test_nv12_that_leaves_the_range_is_clamped_after_averaging(host_kernels):
    # Y of 255 and 16 are 278.3 and 0: clamped pixel by pixel their mean were 127.5, on average it is 139.1.
    luma = np.tile(np.array([255, 16], np.uint8), (2, 1))
    chroma = np.full((1, 1, 2), 128, np.uint8)
    assert nv12_on_host(host_kernels, luma, chroma, 1, 1).tolist() == [[[139, 139, 139]]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frame": DeviceArray(1, (0, 9, 3), "u8")}, "frame must be of shape (h, w, 3) with pixels in it"),
        ({"frame": DeviceArray(1, (9, 9, 3), "f32")}, "frame must be u8, got f32"),
        ({"canvas": DeviceArray(1, (9, 9), "u8")}, "canvas must be of shape (H, W, 3) with pixels in it"),
        ({"canvas": DeviceArray(6, (9, 9, 3), "f32")}, "canvas must start at a multiple of 4 bytes, got 0x6"),
        ({"pitch": 26}, "pitch must be at least the 27 bytes of a row, got 26"),
        ({"std": (1, 0, 1)}, "std must be above 0, got (1, 0, 1)"),
    ],
)
def test_a_launch_of_the_letterbox_names_what_is_wrong(change, message):
    good = {"frame": DeviceArray(1, (9, 9, 3), "u8"), "canvas": DeviceArray(1, (9, 9, 3), "u8")}
    with pytest.raises(ValueError, match=re.escape(message)):
        rgb_letterbox_launch(**(good | change))


def test_a_launch_of_nv12_names_what_is_wrong():
    luma, canvas = DeviceArray(1, (9, 9), "u8"), DeviceArray(1, (9, 9, 3), "u8")
    with pytest.raises(ValueError, match=re.escape("chroma must be of shape (5, 5, 2), got (4, 4, 2)")):
        nv12_letterbox_launch(luma, DeviceArray(1, (4, 4, 2), "u8"), canvas)
    with pytest.raises(ValueError, match="matrix must be bt601 or bt709, got 'bt2020'"):
        nv12_letterbox_launch(luma, DeviceArray(1, (5, 5, 2), "u8"), canvas, matrix="bt2020")
