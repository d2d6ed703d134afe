"""Ranges of tensors, found on pictures and on the states of the diffusion."""

import numpy as np
import onnx
import pytest
from int8_cases import pictures, prefix
from psdiff.export.calibration import ranges_of, record, spread
from psdiff.export.qdq import with_constants
from psdiff.export.quantizable import candidates
from psdiff.runtime.detector import open_detector


@pytest.mark.parametrize("method", ["entropy", "percentile", "minmax"])
def test_a_range_is_found_by_each_method(small_bundle, method):
    detector = open_detector(small_bundle)
    model = onnx.load(small_bundle / "denoise_step.onnx")
    # The layer that reads the state; entropy takes a second for each ten tensors.
    [layer] = [node for node in model.graph.node if node.name == candidates(model)[0]]
    graph = prefix(with_constants(model, [layer.name]), layer.output)
    calls = [
        record(detector.engine, detector.settings, canvas, steps=4, seed=seed)
        for seed, canvas in enumerate(pictures(2))
    ]
    timesteps = [int(call["t"][0]) for call in calls[0]["denoise_step"]]
    assert timesteps == list(detector.settings.timesteps[4]), "the states are those of the diffusion"

    def found_by(name):
        low, high = ranges_of({"denoise_step": graph}, calls, name)["denoise_step"][
            layer.input[0]
        ].range_value
        return np.ravel(low)[0].item(), np.ravel(high)[0].item()

    low, high = found_by(method)
    lowest, highest = found_by("minmax")
    # A histogram's ends are edges of bins.
    width = (highest - lowest) / 64
    assert lowest - width <= low < 0 < high <= highest + width


@pytest.mark.parametrize(("count", "most", "kept"), [(3, 5, 3), (5, 5, 5), (6, 5, 3), (100, 8, 7)])
def test_pictures_are_spread_over_a_video_of_any_length(count, most, kept):
    chosen = spread(iter(range(count)), most)
    assert len(chosen) == kept
    assert len(set(np.diff(chosen))) <= 1, "evenly"
    assert chosen[-1] + np.diff(chosen)[0] >= count, "to its end"
