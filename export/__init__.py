"""From a checkpoint to a bundle: ONNX graphs, manifest, reference outputs."""
