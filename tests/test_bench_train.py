"""The benchmark of training: what it reports, on a canvas of a few pixels, and how it counts FLOPs."""

import pytest
import torch
from psdiff.benchmarks.bench_train import PARTS, conv_backward_flops, measure, verdict
from psdiff.training.recipe import Data, Recipe, Stage
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    recipe = Recipe(
        preset="psdiff_mobile",
        data=Data(frames=2),
        stages=(Stage(width=64, height=64, batch_size=1, iterations=1),),
        num_proposals=10,
        threads=1,
    )
    threads = torch.get_num_threads()
    yield measure(recipe, tmp_path_factory.mktemp("frames"), rounds=1, iterations=1)
    torch.set_num_threads(threads)


def test_the_result_names_machine_peaks_and_every_canvas(result):
    assert {"machine", "peaks", "preset", "frames", "rounds", "iterations", "loader_workers", "rows"} == set(
        result
    )
    assert [row["input"] for row in result["rows"]] == [[64, 64]]
    assert set(result["rows"][0]) == {
        *("input", "batch_size", "images_per_s", "gflop_per_image", "gflops", "conv_peak_share"),
        *("matmul_peak_share", "parts", "end_to_end", "loader"),
    }


def test_shares_are_shares_and_rates_are_positive(result):
    row = result["rows"][0]
    assert 0 < row["conv_peak_share"] < 1.5
    assert 0 < row["matmul_peak_share"] < 1.5
    assert 0 <= row["end_to_end"]["loader_share"] < 1
    assert row["end_to_end"]["images_per_s"] > 0
    assert [own["workers"] for own in row["loader"]] == [0, 1]
    assert all(own["ratio"] == own["images_per_s"] / row["images_per_s"] > 0 for own in row["loader"])


def test_the_parts_add_up_to_the_step(result):
    row = result["rows"][0]
    assert [own["part"] for own in row["parts"]] == list(PARTS)
    assert sum(own["share"] for own in row["parts"]) == pytest.approx(1)
    gflop = sum(own["gflops"] * own["ms"] / 1000 for own in row["parts"])
    assert gflop == pytest.approx(row["gflop_per_image"] * row["batch_size"])


def test_the_backward_pass_counts_at_most_twice_the_forward_pass(result):
    work = {own["part"]: own["gflops"] * own["ms"] for own in result["rows"][0]["parts"]}
    forward = work["backbone"] + work["denoiser"]
    assert forward < work["backward"] <= 2 * forward


def test_both_gradients_of_a_depthwise_convolution_count_as_much_as_the_convolution():
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
    image = torch.zeros(2, 6, 4, 5, requires_grad=True)
    mapping = {torch.ops.aten.convolution_backward: conv_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        conv(image).sum().backward()
    # 2 images, 6 channels, 4x5 places, 9 weights each, 2 FLOPs each, three times.
    assert counter.get_total_flops() == 3 * (2 * 6 * 4 * 5 * 9 * 2)


@pytest.mark.parametrize(("ratio", "said"), [(1.2, "is not the bottleneck"), (0.8, "is the bottleneck")])
def test_a_loader_slower_than_training_is_called_the_bottleneck(ratio, said):
    row = {"input": [192, 320], "loader": [{"workers": 0, "ratio": 9.0}, {"workers": 1, "ratio": ratio}]}
    assert said in verdict(row, workers=1)
