"""A bundle gets its graphs in 8 bits: calibrated on the user's pictures, proven, reported; whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import onnx
from numpy.typing import NDArray

from .. import __version__
from ..bundle import (
    PRECISION_REPORT,
    QUANTIZED_FORMS,
    REFERENCE,
    WEIGHTS,
    BundleError,
    Manifest,
    QuantizedForm,
    file_sha256,
    graph_file,
    load_manifest,
    write_manifest,
)
from ..models.detector import Detector
from ..models.sampling import Engine
from ..models.verification import INT8_TOLERANCE, Comparison, compare
from .calibration import Method, Recording, ranges_of, record
from .precision_report import PrecisionReport, proof_rows, stayed, tensor_errors
from .qdq import following, quantized, with_constants
from .quantizable import SENSITIVE, NodeId, candidates, staying
from .sensitivity import harm_of_each, most_that_pass, passes
from .shared_weights import point_into

PARTS = ("backbone", "denoise_step")

# Of the pictures, one in so many is kept from calibration, to measure errors on.
HELD_OUT_EVERY = 4

Keep = Literal["auto", "none"]


class QuantizationError(Exception):
    """The graphs in 8 bits could not be made; the bundle is as it was."""


@dataclass(frozen=True)
class QuantizationOptions:
    """How a bundle is quantised."""

    method: Method = "percentile"
    keep_fp32: Keep = "auto"
    """auto: as many nodes, the most harmful first, as it takes for the proof to hold. none: only what must."""


@dataclass
class _Source:
    """The float32 graphs of a bundle, and what is known of them."""

    graphs: dict[str, onnx.ModelProto]
    """Weights inside."""
    ranges: dict[str, Any] = field(default_factory=dict)

    @property
    def nodes(self) -> list[NodeId]:
        return [NodeId(part, name) for part in PARTS for name in candidates(self.graphs[part])]

    def quantized(self, part: str, nodes: Sequence[NodeId], form: QuantizedForm) -> onnx.ModelProto:
        names = [node.name for node in nodes if node.part == part]
        return quantized(self.graphs[part], names, self.ranges[part], form)


def quantize_bundle(
    bundle: Path,
    detector: Detector,
    canvases: Sequence[NDArray[np.uint8]],
    open_engine: Callable[[Path], Engine],
    options: QuantizationOptions | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> PrecisionReport:
    """Write the graphs in 8 bits and their report into a bundle, replacing those that are there.

    detector: of the bundle, in float32. canvases: (H, W, 3) letterboxed pictures, two at least. open_engine: opens
    the int8 graphs in a folder. on_step is told what is being done.
    Raises BundleError (not whole, no reference outputs) and QuantizationError; the bundle is then as it was.
    """
    options = options or QuantizationOptions()
    manifest = load_manifest(bundle)
    if len(canvases) < 2:
        raise QuantizationError(
            f"frames must hold at least 2 pictures, one to calibrate and one to judge, got {len(canvases)}"
        )
    source = _Source({part: onnx.load(bundle / graph_file(part)) for part in PARTS})
    steps = manifest.default_steps
    held_out = canvases[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] or canvases[-1:]
    of_calibration = [canvas for canvas in canvases if not any(canvas is other for other in held_out)]
    source.ranges = _calibrated(source, detector, of_calibration, options.method, steps, on_step)
    with tempfile.TemporaryDirectory(dir=bundle, prefix=".int8-") as temporary:
        folder = Path(temporary)
        trial = _Trial(bundle, source, detector, open_engine, folder)
        chosen, harms = _chosen(trial, options.keep_fp32, on_step)
        on_step("measuring errors on the other pictures")
        proof = trial.prove(chosen)
        recordings = [_recorded(detector, canvas, i, steps) for i, canvas in enumerate(held_out)]
        report = PrecisionReport(
            calibration=options.method,
            keep_fp32=options.keep_fp32,
            calibration_pictures=len(of_calibration),
            held_out_pictures=len(held_out),
            steps=steps,
            tools={"psdiff": __version__, **{name: version(name) for name in ("onnx", "onnxruntime")}},
            quantized={part: [node.name for node in chosen if node.part == part] for part in PARTS},
            num_candidates=len(source.nodes),
            tensors=_errors(source, chosen, recordings),
            stayed_fp32=_stayed(source, chosen, harms),
            proof=proof_rows(proof),
            holds=passes(proof, INT8_TOLERANCE),
        )
        _write(source, chosen, folder, bundle / WEIGHTS)
        (folder / PRECISION_REPORT).write_text(report.model_dump_json(indent=2) + "\n", encoding="utf-8")
        on_step("adding them to the bundle")
        _install(folder, bundle, manifest)
    return report


def _calibrated(
    source: _Source,
    detector: Detector,
    canvases: Sequence[NDArray[np.uint8]],
    method: Method,
    steps: int,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    graphs = {part: with_constants(graph, candidates(graph)) for part, graph in source.graphs.items()}
    recordings = (_recorded(detector, canvas, i, steps) for i, canvas in enumerate(canvases))

    def tell(count: int) -> None:
        more = f"calibrating by {method}: picture {count} of {len(canvases)}"
        on_step(more if count < len(canvases) else f"choosing ranges by {method}")

    on_step(f"calibrating by {method}: {len(canvases)} pictures")
    return ranges_of(graphs, recordings, method, tell)


def _recorded(detector: Detector, canvas: NDArray[np.uint8], seed: int, steps: int) -> Recording:
    return record(detector.engine, detector.settings, canvas, steps=steps, seed=seed)


class _Trial:
    """Compares the bundle, some nodes in 8 bits, with PyTorch's outputs."""

    def __init__(
        self,
        bundle: Path,
        source: _Source,
        detector: Detector,
        open_engine: Callable[[Path], Engine],
        folder: Path,
    ) -> None:
        self.source = source
        self._settings, self._open, self._folder = detector.settings, open_engine, folder
        try:
            # Opened here: numpy leaves a file that is no archive open.
            with (bundle / REFERENCE).open("rb") as file, np.load(file) as arrays:
                self._reference = dict(arrays)
        except (OSError, BadZipFile, ValueError) as error:
            raise BundleError(
                f"{bundle / REFERENCE} must hold the reference outputs of this bundle, got: {error}; export it again"
            ) from None
        self._written: dict[str, list[NodeId]] = {}

    def prove(self, nodes: Sequence[NodeId]) -> list[Comparison]:
        """The comparison of psdiff verify with these nodes in 8 bits."""
        for part in PARTS:
            own = [node for node in nodes if node.part == part]
            if self._written.get(part) != own:
                onnx.save(self.source.quantized(part, own, "int8"), self._folder / graph_file(part, "int8"))
                self._written[part] = own
        return compare(self._open(self._folder), self._reference, self._settings, INT8_TOLERANCE)


def _chosen(
    trial: _Trial, keep_fp32: Keep, on_step: Callable[[str], None]
) -> tuple[list[NodeId], dict[NodeId, float]]:
    """The nodes to quantise, in the order of the graphs, and what harm each does where that was measured."""
    nodes = trial.source.nodes
    if keep_fp32 == "none":
        return nodes, {}
    on_step("trying all nodes in 8 bits")
    if passes(trial.prove(nodes), INT8_TOLERANCE):
        return nodes, {}
    if not passes(trial.prove([]), INT8_TOLERANCE):
        raise BundleError(
            "bundle must pass psdiff verify in float32 before it is quantised, got one that fails"
        )

    def tell(count: int) -> None:
        on_step(f"trying each node in 8 bits: {count} of {len(nodes)}")

    harms = harm_of_each(nodes, trial.prove, INT8_TOLERANCE, tell)
    on_step("finding out how many of them pass together")
    found = set(most_that_pass(harms, lambda some: passes(trial.prove(some), INT8_TOLERANCE)))
    return [node for node in nodes if node in found], harms


def _errors(source: _Source, chosen: Sequence[NodeId], recordings: Sequence[Recording]) -> list[Any]:
    return [
        error
        for part in PARTS
        for error in tensor_errors(
            part, source.graphs[part], source.quantized(part, chosen, "int8"), recordings
        )
    ]


def _stayed(source: _Source, chosen: Sequence[NodeId], harms: Mapping[NodeId, float]) -> list[Any]:
    rows = []
    for part in PARTS:
        graph = source.graphs[part]
        followers = following(graph.graph, [node.name for node in chosen if node.part == part])
        reasons = {name: reason for name, reason in staying(graph) if name not in followers}
        reasons |= {name: SENSITIVE for name in candidates(graph) if NodeId(part, name) not in chosen}
        own = {node.name: value for node, value in harms.items() if node.part == part}
        rows += stayed(part, graph, reasons, own)
    return rows


def _write(source: _Source, chosen: Sequence[NodeId], folder: Path, weights: Path) -> None:
    """Both forms of both graphs. Weights that stayed as they were point into the bundle's file."""
    for form in QUANTIZED_FORMS:
        for part in PARTS:
            graph = source.quantized(part, chosen, form)
            onnx.checker.check_model(graph)
            point_into(graph, weights)
            onnx.save(graph, folder / graph_file(part, form))


def _install(folder: Path, bundle: Path, manifest: Manifest) -> None:
    """Move the files into the bundle, which can be served at every moment in between.

    While they are moved the manifest does not speak of them: an older set is taken off it first.
    """
    made = sorted(folder.iterdir())
    others = {name: digest for name, digest in manifest.files.items() if name not in {p.name for p in made}}
    files = others | {path.name: file_sha256(path) for path in made}
    if others != manifest.files:
        write_manifest(bundle, manifest.model_copy(update={"files": others}))
    for path in made:
        path.replace(bundle / path.name)
    write_manifest(bundle, manifest.model_copy(update={"files": dict(sorted(files.items()))}))
