"""The model repository: what is written, that it fits the graphs, and that nothing is half-written."""

import json
import shutil

import numpy as np
import pytest
from psdiff.bundle import MANIFEST, BundleError, file_sha256, load_manifest, write_manifest
from psdiff.plans import EngineRecord, EnginesRecord
from typer.testing import CliRunner

pytest.importorskip("tritonclient", reason="tritonclient is not installed")
from google.protobuf import text_format
from psdiff.__main__ import app
from psdiff.export import triton_repository
from psdiff.export.triton_config import RepositoryError, RepositoryOptions, graph_tensors
from psdiff.export.triton_repository import write_repository
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig


def config_of(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


def tensors(fields):
    return {field.name: (DataType.Name(field.data_type), list(field.dims)) for field in fields}


def add_plan(bundle, sm, *, tensorrt="tensorrt 10.13.3", precision="fp16", steps=(1, 4), most=8):
    """Engines as psdiff export --target trt leaves them; their bytes are not looked at."""
    folder = bundle / "plans" / f"sm{sm}-{tensorrt.replace(' ', '')}-{precision}"
    folder.mkdir(parents=True)
    record = EnginesRecord(
        sm=sm,
        tensorrt=tensorrt,
        precision=precision,
        embedding_space="a test",
        plugin_sha256=None,
        engines={},
    )
    for k in steps:
        plan = folder / f"e2e_k{k}.plan"
        plan.write_bytes(f"{sm} {k}".encode())
        shape = [[1, 128, 192, 3], [1, 128, 192, 3], [most, 128, 192, 3]]
        record.engines[f"e2e_k{k}"] = EngineRecord(
            file=plan.name,
            sha256=file_sha256(plan),
            graph=f"e2e_k{k}.fp16.onnx",
            graph_sha256="0" * 64,
            kernels={},
            scratch_bytes=0,
            stream_capturable=True,
            profiles=[{"image": [[1, 128, 192, 3]] * 3}, {"image": shape}],
            channels_last=[],
        )
    (folder / "engines.json").write_text(record.model_dump_json())
    return folder


@pytest.fixture
def bundle(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def test_psdiff_holds_the_whole_bundle_and_says_which(bundle, tmp_path):
    options = RepositoryOptions(threads=3, max_batch=5, queue_size=7, queue_delay_ms=1.5, queue_timeout_ms=80)
    [version] = write_repository(bundle, tmp_path / "models", options)
    assert version == tmp_path / "models" / "psdiff" / "1"
    assert load_manifest(version / "bundle") == load_manifest(bundle)
    config = config_of(version.parent)
    assert (config.name, config.backend, config.max_batch_size) == ("psdiff", "python", 5)
    told = {name: value.string_value for name, value in config.parameters.items()}
    assert told == {
        "psdiff.backend": "onnxruntime",
        "psdiff.threads": "3",
        "psdiff.manifest_sha256": file_sha256(bundle / MANIFEST),
    }
    batching = config.dynamic_batching
    assert batching.max_queue_delay_microseconds == 1500
    for policy in (*batching.priority_queue_policy.values(), batching.default_queue_policy):
        assert (policy.max_queue_size, policy.default_timeout_microseconds) == (7, 80_000)
        assert policy.allow_timeout_override
        assert policy.timeout_action == policy.REJECT
    assert (batching.priority_levels, batching.default_priority_level) == (2, 2)


def test_the_image_of_psdiff_is_that_of_the_graph(bundle, tmp_path):
    [version] = write_repository(bundle, tmp_path / "models")
    config = config_of(version.parent)
    graph, _ = graph_tensors(bundle / "backbone.onnx")
    assert tensors(config.input)["image"] == graph["image"] == ("TYPE_UINT8", [128, 192, 3])
    assert [field.name for field in config.input if not field.optional] == ["image"]


def test_engines_take_and_give_what_their_graphs_do(bundle, tmp_path):
    add_plan(bundle, 87)
    add_plan(bundle, 90, most=4)
    folders = write_repository(bundle, tmp_path / "models")
    assert [folder.parent.name for folder in folders] == ["psdiff", "psdiff_k1", "psdiff_k4"]
    config = config_of(folders[2].parent)
    inputs, outputs = graph_tensors(bundle / "e2e_k4.fp16.onnx")
    assert tensors(config.input) == inputs
    assert tensors(config.output) == outputs
    assert set(inputs) == {"image", "boxes_T", "emb_T"}
    assert set(outputs) == {"boxes_xyxy", "scores", "embeddings"}
    assert dict(config.cc_model_filenames) == {"8.7": "model_sm87.plan", "9.0": "model_sm90.plan"}
    assert (folders[2] / "model_sm90.plan").read_bytes() == b"90 4"
    assert config.platform == "tensorrt_plan"
    assert config.max_batch_size == 4  # the least of what the engines take
    # Every input stands in each specification of a CUDA graph, or the server refuses it.
    for spec in config.optimization.cuda.graph_spec:
        assert set(spec.input) == set(inputs)
    assert [spec.batch_size for spec in config.optimization.cuda.graph_spec] == [1, 4]
    for warmup in config.model_warmup:
        assert {name: list(each.dims) for name, each in warmup.inputs.items()} == {
            "image": [128, 192, 3],
            "boxes_T": [12, 4],
            "emb_T": [12, 64],
        }
        assert warmup.inputs["image"].data_type == DataType.Value("TYPE_UINT8")
        assert warmup.inputs["emb_T"].data_type == DataType.Value("TYPE_FP32")
    assert np.fromfile(folders[2].parent / "warmup" / "image", np.uint8).size == 128 * 192 * 3


def test_engines_that_a_server_cannot_load_are_left_out(bundle, tmp_path):
    add_plan(bundle, 86, tensorrt="tensorrt_rtx 1.7.1")
    add_plan(bundle, 89, precision="bf16")
    [version] = write_repository(bundle, tmp_path / "models")
    assert version.parent.name == "psdiff"


def test_an_altered_engine_is_refused(bundle, tmp_path):
    (add_plan(bundle, 87) / "e2e_k1.plan").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"e2e_k1.plan must be what engines.json says, got another file"):
        write_repository(bundle, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_two_makers_of_one_gpu_are_refused(bundle, tmp_path):
    add_plan(bundle, 87)
    add_plan(bundle, 87, tensorrt="tensorrt 10.3.0")
    with pytest.raises(
        RepositoryError, match=r"plans of sm_87 must be of one TensorRT, got .*10.13.3 and .*10.3.0"
    ):
        write_repository(bundle, tmp_path / "models")


def test_a_version_is_added_and_the_older_stays(bundle, tmp_path):
    models = tmp_path / "models"
    write_repository(bundle, models)
    before = file_sha256(models / "psdiff" / "1" / "bundle" / MANIFEST)
    manifest = load_manifest(bundle)
    write_manifest(bundle, manifest.model_copy(update={"model_id": "the next"}))
    [version] = write_repository(bundle, models, RepositoryOptions(max_batch=2))
    assert version.name == "2"
    assert file_sha256(models / "psdiff" / "1" / "bundle" / MANIFEST) == before
    config = config_of(models / "psdiff")
    assert config.max_batch_size == 2
    assert (
        config.parameters["psdiff.manifest_sha256"].string_value == file_sha256(bundle / MANIFEST) != before
    )
    with pytest.raises(RepositoryError, match=r"version must be new, got 2, which .* has already"):
        write_repository(bundle, models, RepositoryOptions(version=2))


def test_a_crash_leaves_the_repository_as_it_was(bundle, tmp_path, monkeypatch):
    models = tmp_path / "models"
    write_repository(bundle, models)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))

    def fail(folder, config):
        raise OSError("disk full")

    monkeypatch.setattr(triton_repository, "_write_config", fail)
    with pytest.raises(OSError, match="disk full"):
        write_repository(bundle, models)
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_graph_of_another_canvas_is_refused(bundle, tmp_path):
    content = json.loads((bundle / MANIFEST).read_text()) | {"height": 160}
    (bundle / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"image of backbone.onnx must be TYPE_UINT8 \[160, 192, 3\]"):
        write_repository(bundle, tmp_path / "models")


@pytest.mark.parametrize("name", ["instances", "max_batch", "queue_size", "version"])
def test_an_option_below_one_is_refused(name):
    with pytest.raises(RepositoryError, match=f"{name} must be a whole number >= 1, got 0"):
        RepositoryOptions(**{name: 0})


def test_the_command_writes_and_says_how_to_serve(bundle, tmp_path):
    out = tmp_path / "models"
    result = CliRunner().invoke(app, ["triton-repo", str(bundle), "--out", str(out), "--max-batch", "3"])
    assert result.exit_code == 0, result.output
    assert f"wrote {out / 'psdiff' / '1'}" in result.output.replace("\n", "")
    assert config_of(out / "psdiff").max_batch_size == 3


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--backend", "cuda"], 2, "backend must be one of onnxruntime, "),
        (["--version", "1"], 2, "version must be new, got 1"),
    ],
)
def test_the_command_refuses_what_does_not_fit(bundle, tmp_path, arguments, code, message):
    out = tmp_path / "models"
    write_repository(bundle, out)
    result = CliRunner().invoke(app, ["triton-repo", str(bundle), "--out", str(out), *arguments])
    assert result.exit_code == code
    assert message in result.output
