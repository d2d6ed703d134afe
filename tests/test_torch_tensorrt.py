"""The Torch-TensorRT path: what goes into the compiler, and what is said where it is not installed.

The compiler needs a GPU. Here a stand-in records its arguments, whose names are checked against the real one where
that is installed; the test marked gpu compiles and runs.
"""

import importlib.util
import inspect
import shutil
from types import SimpleNamespace

import pytest
import torch
from psdiff.__main__ import app
from psdiff.bundle import load_manifest
from psdiff.export import torch_tensorrt_path
from psdiff.export.engines import EngineOptions, sm_of_this_machine
from psdiff.export.tensorrt_plan import EngineError
from psdiff.export.torch_tensorrt_path import compile_modules
from psdiff.models.person_search import TorchEngine, load_checkpoint
from torch.export import load as load_program
from typer.testing import CliRunner

IS_INSTALLED = importlib.util.find_spec("torch_tensorrt") is not None
NOT_INSTALLED = "torch-tensorrt is not installed: pip install 'psdiff[torch-tensorrt]'"


@pytest.fixture
def bundle(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def compiler(monkeypatch):
    """Put in a torch_tensorrt that records its arguments; a compiled module is the program itself."""
    seen = []

    def compile_program(program, **arguments):
        seen.append((program, arguments))
        return program

    def save(module, path, **arguments):
        torch.export.save(module, path)

    fake = SimpleNamespace(
        __version__="2.14.0",
        Input=lambda **arguments: arguments,
        dynamo=SimpleNamespace(compile=compile_program),
        save=save,
    )
    monkeypatch.setattr(torch_tensorrt_path, "torch_tensorrt_module", lambda: fake)
    return seen


@pytest.fixture(scope="module", params=["fp32", "fp16"])
def compiled(request, small_bundle, tmp_path_factory):
    """Modules of one precision: bundle, precision, folder, steps that were told, what the compiler got."""
    bundle = shutil.copytree(small_bundle, tmp_path_factory.mktemp("compiled") / "bundle")
    options, steps = EngineOptions(90, request.param, max_batch=3, max_proposals=20), []
    with pytest.MonkeyPatch.context() as patch:
        seen = compiler(patch)
        folder = compile_modules(bundle, options, steps.append, device="cpu")
    return SimpleNamespace(bundle=bundle, precision=request.param, folder=folder, steps=steps, seen=seen)


def test_both_modules_keep_our_operations_and_dynamic_sizes(compiled):
    _, (step, _) = compiled.seen
    called = {node.target for node in step.graph.nodes if node.op == "call_function"}
    assert called >= torch_tensorrt_path.KEPT_IN_TORCH
    sizes = [str(side) for side in step.range_constraints]
    assert len(sizes) == 2, "images and proposals"


def test_the_compiler_gets_the_shapes_of_the_engines(compiled):
    precision, parts = compiled.precision, ("backbone", "denoise_step")
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    assert compiled.folder == compiled.bundle / "plans" / f"sm90-torch-tensorrt2.14.0-{precision}"
    assert sorted(path.name for path in compiled.folder.iterdir()) == ["backbone.pt2", "denoise_step.pt2"]
    assert compiled.steps == [f"compiling {part} for sm_90 in {precision}" for part in parts]
    (_, backbone), (_, step) = compiled.seen
    assert backbone["arg_inputs"] == [
        {
            "min_shape": (1, 128, 192, 3),
            "opt_shape": (3, 128, 192, 3),
            "max_shape": (3, 128, 192, 3),
            "dtype": torch.uint8,
            "name": "image",
        }
    ]
    by_name = {each["name"]: each for each in step["arg_inputs"]}
    assert (by_name["p2"]["max_shape"], by_name["p2"]["dtype"]) == ((3, 96, 32, 48), dtype)
    assert (by_name["boxes_t"]["max_shape"], by_name["boxes_t"]["dtype"]) == ((3, 20, 4), torch.float32)
    assert by_name["t"]["dtype"] == torch.int64
    assert step["torch_executed_ops"] == torch_tensorrt_path.KEPT_IN_TORCH


@pytest.mark.parametrize("compiled", ["fp32"], indirect=True)
def test_a_saved_module_is_the_network(compiled):
    """In torch.export's own file; what Torch-TensorRT puts into it is seen on a GPU alone."""
    image = torch.randint(0, 256, (1, 128, 192, 3), dtype=torch.uint8)
    model, _ = load_checkpoint(compiled.bundle / "weights.safetensors")
    got = load_program(compiled.folder / "backbone.pt2").module()(image)
    for one, other in zip(got, TorchEngine(model).backbone(image.numpy()), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("bf16", "cpu", "precision must be fp32 or fp16 with target torch-tensorrt, got bf16"),
        pytest.param(
            "fp16",
            "cuda",
            "target torch-tensorrt must have a GPU that PyTorch sees, got none",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_what_cannot_be_compiled_is_refused(bundle, monkeypatch, precision, device, message):
    compiler(monkeypatch)
    with pytest.raises(EngineError, match=message):
        compile_modules(bundle, EngineOptions(90, precision), device=device)
    assert not (bundle / "plans").exists()


@pytest.mark.skipif(IS_INSTALLED, reason="torch-tensorrt is installed")
def test_without_the_package_the_command_says_what_to_install(bundle):
    result = CliRunner().invoke(app, ["export", str(bundle), "--target", "torch-tensorrt"])
    assert result.exit_code == 2
    assert "target torch-tensorrt must have the package torch-tensorrt, got none" in result.stderr
    assert "pip install 'psdiff[torch-tensorrt]'" in result.stderr


@pytest.mark.tensorrt
@pytest.mark.skipif(not IS_INSTALLED, reason=NOT_INSTALLED)
def test_the_compiler_has_the_arguments_that_it_is_given():
    torch_tensorrt = torch_tensorrt_path.torch_tensorrt_module()
    wanted = {"arg_inputs", "torch_executed_ops"}
    assert set(inspect.signature(torch_tensorrt.dynamo.compile).parameters) >= wanted
    assert set(inspect.signature(torch_tensorrt.save).parameters) >= {"output_format", "arg_inputs"}


@pytest.mark.gpu
@pytest.mark.tensorrt
@pytest.mark.skipif(not IS_INSTALLED, reason=NOT_INSTALLED)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch sees")
def test_a_compiled_backbone_is_the_network(bundle):
    options = EngineOptions(sm_of_this_machine(), "fp32", max_batch=2)
    folder = compile_modules(bundle, options)
    image = torch.randint(0, 256, (1, 128, 192, 3), dtype=torch.uint8)
    model, _ = load_checkpoint(bundle / "weights.safetensors")
    got = load_program(folder / "backbone.pt2").module()(image.cuda())
    for one, other in zip(got, TorchEngine(model).backbone(image.numpy()), strict=True):
        torch.testing.assert_close(one.cpu(), other, atol=1e-2, rtol=1e-2)
    assert load_manifest(bundle).model_id == "small"
